"""Kubernetes' quantities."""

from __future__ import annotations

import pytest

from quire.core.errors import ConfigError
from quire.fleet.manifest.quantity import quantity


@pytest.mark.parametrize(
    ("text", "value"), [("500m", 0.5), ("2", 2), (2, 2), (0.5, 0.5), ("16Gi", 16 * 2**30), ("1e3", 1000), ("5k", 5000)]
)
def test_quantities(text, value):
    assert quantity(text, "x") == pytest.approx(value)


@pytest.mark.parametrize("text", ["", "-1", "0", "1Xi", "Gi", "1e99", "inf", "nan", "9" * 400])
def test_what_is_no_quantity(text):
    with pytest.raises(ConfigError):
        quantity(text, "x")
