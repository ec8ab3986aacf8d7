"""Whether Triton is here, without importing it."""

from __future__ import annotations

import importlib.util
import os

TRITON = "triton"
"""In the place of an instruction set's name: Triton's kernels on a CPU, by its interpreter."""
GPU_TYPES = ("cuda", "xpu")
"""torch's names of the devices that Triton compiles for; ROCm's are called cuda."""


def is_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def interprets() -> bool:
    """Whether Triton, once imported, interprets kernels rather than compiles them. It looks at this once."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")
