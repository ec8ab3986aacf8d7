"""What one request's times say, and what many say together. Pure functions; seconds in, milliseconds out.

TTFT is the time to the first token, E2E to the last; ITL are the gaps between events of a stream, which may carry
several tokens each; TPOT is the time after the first token over the number of tokens after it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np


@dataclass(slots=True, kw_only=True)
class Record:
    """One request as its client saw it. Times are seconds on one monotonic clock."""

    start: float
    token_times: list[float] = field(default_factory=list)
    end: float = 0.0
    prompt_tokens: int = 0
    output_tokens: int = 0
    cached_tokens: int = 0
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Summary:
    """Of one metric, in milliseconds. None where nothing was measured."""

    count: int
    mean: float | None
    p50: float | None
    p90: float | None
    p99: float | None


def ttft_ms(record: Record) -> float:
    first = record.token_times[0] if record.token_times else record.end
    return (first - record.start) * 1e3


def e2e_ms(record: Record) -> float:
    return (record.end - record.start) * 1e3


def itls_ms(record: Record) -> list[float]:
    return [(later - earlier) * 1e3 for earlier, later in zip(record.token_times, record.token_times[1:], strict=False)]


def tpot_ms(record: Record) -> float | None:
    """None for an answer of a single token, which has no time per further token."""
    if record.output_tokens < 2:
        return None
    return (e2e_ms(record) - ttft_ms(record)) / (record.output_tokens - 1)


def summarise(values_ms: Sequence[float]) -> Summary:
    """Mean and percentiles; percentiles interpolate linearly between the two nearest ranks."""
    if not values_ms:
        return Summary(0, None, None, None, None)
    p50, p90, p99 = (float(value) for value in np.percentile(values_ms, [50, 90, 99]))
    return Summary(len(values_ms), float(np.mean(values_ms)), p50, p90, p99)


def meets(record: Record, slos_ms: Mapping[str, float]) -> bool:
    """Whether a request completed within every limit. `itl` limits the mean gap."""
    if record.error is not None:
        return False
    gaps = itls_ms(record)
    measured = {
        "ttft": ttft_ms(record),
        "e2e": e2e_ms(record),
        "tpot": tpot_ms(record),
        "itl": sum(gaps) / len(gaps) if gaps else None,
    }
    return all((value := measured[name]) is None or value <= limit for name, limit in slos_ms.items())


def goodput(records: Sequence[Record], slos_ms: Mapping[str, float], duration: float) -> float:
    """Requests per second that completed within every limit."""
    return sum(meets(record, slos_ms) for record in records) / duration if duration > 0 else 0.0
