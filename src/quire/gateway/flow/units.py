"""Kubernetes quantities and Go durations, as configurations of llm-d write them."""

from __future__ import annotations

import re
from decimal import ROUND_CEILING, Decimal
from typing import Final

from quire.core.errors import ConfigError

LARGEST: Final = 2**63 - 1
_BINARY: Final = {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40, "Pi": 2**50, "Ei": 2**60}
_DECIMAL: Final = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "P": 10**15, "E": 10**18}
_QUANTITY: Final = re.compile(r"\+?([0-9]{1,20}(?:\.[0-9]{0,20})?)(?:([KMGTPE]i|[kMGTPE]|)|[eE]([+-]?[0-9]{1,2}))")
_SECONDS: Final = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "μs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
_PART: Final = r"([0-9]{1,18}(?:\.[0-9]{0,18})?|\.[0-9]{1,18})(ns|us|µs|μs|ms|s|m|h)"
_DURATION: Final = re.compile(rf"\+?(?:{_PART}){{1,8}}")
_PARTS: Final = re.compile(_PART)


def parse_quantity(value: str | int, param: str) -> int:
    """A whole number like `5000`, `"1Gi"`, `"500M"` or `"1e9"`; parts of one are rounded up. Raises `ConfigError`.

    Source: Kubernetes' resource.Quantity, without the suffixes for parts of one: `500m` would be half a request.
    """
    if isinstance(value, int):
        number = value
    else:
        match = _QUANTITY.fullmatch(value)
        if match is None:
            raise _bad(value, param, "is not a quantity", 'Write a number, or one like "1Gi", "500M" or "1k".')
        digits, suffix, exponent = match.groups()
        scale = Decimal(10) ** int(exponent) if exponent else Decimal(_BINARY.get(suffix) or _DECIMAL[suffix])
        number = int((Decimal(digits) * scale).to_integral_value(ROUND_CEILING))
    if not 0 <= number <= LARGEST:
        raise _bad(value, param, "is out of range", f"Choose a number from 0 to {LARGEST}.")
    return number


def parse_duration(value: str, param: str) -> float:
    """Seconds of a Go duration like `"1m30s"`, `"200ms"` or `"0"`; not negative. Raises `ConfigError`."""
    if value == "0":
        return 0.0
    if _DURATION.fullmatch(value) is None:
        raise _bad(value, param, "is not a duration", 'Write one like "1m30s", "200ms" or "2h".')
    seconds = sum(float(number) * _SECONDS[unit] for number, unit in _PARTS.findall(value))
    if seconds > LARGEST * 1e-9:
        raise _bad(value, param, "is out of range", "The longest is 292 years.")
    return seconds


def _bad(value: object, param: str, what: str, remedy: str) -> ConfigError:
    return ConfigError(f"{param}: {value!r} {what}.", param=param, remedy=remedy)
