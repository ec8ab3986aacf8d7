"""Server-sent events, cut between events, so that a stream that breaks off can be ended by one of ours."""

from __future__ import annotations

from typing import Final

MAX_HELD: Final = 64 * 1024
"""An event may be larger; it is then passed on in parts."""
_ENDS: Final = (b"\n\n", b"\r\n\r\n", b"\r\r")


class WholeEvents:
    """Most servers send each event in one piece, and then nothing is held or copied."""

    __slots__ = ("_held", "_within")

    def __init__(self) -> None:
        self._held = bytearray()
        self._within = False

    def add(self, piece: bytes) -> bytes:
        """What can go on: all up to the end of the last event that is whole."""
        held = self._held
        if not held and piece.endswith(_ENDS):
            self._within = False
            return piece
        searched = max(len(held) - 3, 0)
        held += piece
        end = max(held.rfind(mark, searched) + len(mark) if mark in held[searched:] else 0 for mark in _ENDS)
        if not end and len(held) > MAX_HELD:
            end, self._within = len(held), True
        elif end:
            self._within = False
        whole = bytes(held[:end])
        del held[:end]
        return whole

    def close(self) -> bytes:
        """What has to go before an event of ours: the end of one that was passed on in part."""
        return b"\n\n" if self._within else b""

    def rest(self) -> bytes:
        """What is left at the stream's own end."""
        return bytes(self._held)
