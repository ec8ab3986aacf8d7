"""What an answer says that it cost, read from its end without parsing the rest."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable
from typing import Any, Final

MAX_TAIL: Final = 2048
"""Bytes kept of each of the last pieces."""
MAX_USAGE: Final = 1024
MAX_LOOKED_AT: Final = 256
"""Fields of that name, from the end on: more than the kept end of a stream can hold of chunks, and no more of a body
that is made of nothing else."""
_decoder = json.JSONDecoder()


class Usage:
    """Sees each piece of an answer pass. A quote inside a string of JSON is escaped, so that `"usage":` is always a
    field's name."""

    __slots__ = ("_num_events", "_tail", "_tap", "cached_tokens", "output_tokens", "prompt_tokens")

    def __init__(self, tap: Callable[[bytes], None] | None = None) -> None:
        """`tap` is given every piece as well: an answer that is compared with another."""
        self._tap = tap
        self.output_tokens: int | None = None
        self.prompt_tokens: int | None = None
        self.cached_tokens: int | None = None
        self._num_events = 0
        self._tail: deque[bytes] = deque(maxlen=8)

    def see(self, piece: bytes) -> None:
        if self._tap is not None:
            self._tap(piece)
        self._num_events += piece.count(b"data: {")
        self._tail.append(piece if len(piece) <= MAX_TAIL else piece[-MAX_TAIL:])

    def end(self) -> None:
        """The stream is over. If it said nothing of tokens, its events are counted."""
        self._read(b"".join(self._tail))
        if self.output_tokens is None and self._num_events:
            self.output_tokens = self._num_events

    def whole(self, body: bytes) -> None:
        if self._tap is not None:
            self._tap(body)
        self._read(body)

    def _read(self, text: bytes) -> None:
        at = len(text)
        for _ in range(MAX_LOOKED_AT):
            at = text.rfind(b'"usage":', 0, at)  # null in every chunk but the last
            if at < 0:
                return
            usage = _object_at(text, at + len(b'"usage":'))
            if usage is not None:
                self._take(usage)
                return

    def _take(self, usage: dict[str, Any]) -> None:
        """OpenAI's names, those of its Responses, and Anthropic's."""
        self.output_tokens = _count(usage.get("completion_tokens", usage.get("output_tokens")))
        self.prompt_tokens = _count(usage.get("prompt_tokens", usage.get("input_tokens")))
        details = usage.get("prompt_tokens_details", usage.get("input_tokens_details"))
        cached = details.get("cached_tokens") if isinstance(details, dict) else usage.get("cache_read_input_tokens")
        self.cached_tokens = _count(cached)


def _object_at(text: bytes, start: int) -> dict[str, Any] | None:
    try:
        window = text[start : start + MAX_USAGE].decode("utf-8", "replace").lstrip()
        value, _ = _decoder.raw_decode(window)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _count(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31 else None
