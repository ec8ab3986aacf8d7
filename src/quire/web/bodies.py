"""Bodies of other servers' answers, which come in pieces and may have no end."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Protocol


class Content(Protocol):
    """aiohttp's `StreamReader`. Its `read(n)` gives what has come by now, be that the whole or not."""

    def iter_any(self) -> AsyncIterator[bytes]: ...


async def read_body(content: Content, limit: int) -> bytes:
    """All of it. Raises `ValueError` if that is more than `limit` bytes."""
    body = bytearray()
    async for piece in content.iter_any():
        body += piece
        if len(body) > limit:
            raise ValueError(f"its answer has more than {limit} bytes")
    return bytes(body)
