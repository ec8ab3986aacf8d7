"""How torch's threads wait for each other."""

from __future__ import annotations

import os

SPIN_COUNT = "20000"
"""Measured as a compromise: as fast as spinning for long when the machine is quiet, and soon asleep when it is not."""


def limit_spinning() -> None:
    """Let OpenMP threads spin briefly at a barrier, then sleep. Only of effect before torch is loaded.

    By default they spin for milliseconds, and with anything else running on the same cores a step then takes twenty
    times as long; sleeping at once (OMP_WAIT_POLICY=PASSIVE) costs a third of the speed on a quiet machine. What the
    environment says already is left alone.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)
