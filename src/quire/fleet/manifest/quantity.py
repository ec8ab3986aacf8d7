"""Kubernetes' quantities: `500m`, `2`, `16Gi`. Source: kubernetes.io, "Quantity" of resource.Quantity."""

from __future__ import annotations

import re

from quire.core.errors import ConfigError

_SUFFIXES = {
    "n": 1e-9,
    "u": 1e-6,
    "m": 1e-3,
    "": 1.0,
    "k": 1e3,
    "M": 1e6,
    "G": 1e9,
    "T": 1e12,
    "P": 1e15,
    "Ki": 2.0**10,
    "Mi": 2.0**20,
    "Gi": 2.0**30,
    "Ti": 2.0**40,
    "Pi": 2.0**50,
}
_QUANTITY = re.compile(r"(\d{1,18}(?:\.\d{0,9})?(?:[eE][+-]?\d{1,2})?)([A-Za-z]{0,2})")


def quantity(value: str | int | float, path: str) -> float:
    """The number that `value` stands for, above zero. Raises `ConfigError` naming `path`."""
    match = _QUANTITY.fullmatch(str(value))
    number = None if match is None or match[2] not in _SUFFIXES else float(match[1]) * _SUFFIXES[match[2]]
    if number is None or not 0 < number < 2**60:
        raise ConfigError(
            f"{path} is {str(value)[:40]!r}.", param=path, remedy="It must be a quantity such as 500m, 2 or 16Gi."
        )
    return number
