"""Spans: input features within which 4-bit weights' scales are whole multiples of one step (see `ops.weight`)."""

from __future__ import annotations

SPANS = (256, 128, 64)


def span_of(k: int, group_size: int) -> int:
    """The widest span that `k` features divide into, or 0 where none is wider than a group."""
    return next((span for span in SPANS if k % span == 0 and span > group_size), 0)
