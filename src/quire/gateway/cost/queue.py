"""How much prefill work lies before a request that is sent to an endpoint now.

A queue of tokens, first come first served, as the gateway sees it: what was sent is added at once; what is done is
known when a first token comes (all that was sent before it is done, too), and in between is taken to go on at the
endpoint's pace, but never beyond a request whose first token is still awaited. An answer that is not streamed says
nothing until its end, so that for those the pace alone counts.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field


@dataclass(slots=True)
class PrefillQueue:
    _sent: float = 0.0
    """Tokens ever sent."""
    _done: float = 0.0
    """Of those."""
    _time: float = 0.0
    _awaited: OrderedDict[int, float] = field(default_factory=OrderedDict)
    """By ticket, in the order of sending: where its tokens end."""
    _next: int = 0

    def left(self, now: float, seconds_per_token: float) -> float:
        """Tokens still to be computed."""
        if now > self._time:
            if self._done < self._sent:
                most = next(iter(self._awaited.values())) if self._awaited else self._sent
                if most > self._done:
                    self._done = min(self._done + (now - self._time) / seconds_per_token, most)
            self._time = now
        return self._sent - self._done

    def send(self, tokens: float, *, awaited: bool) -> int:
        """A ticket for it. `awaited`: its first token will be told (`first`)."""
        self._sent += tokens
        self._next += 1
        if awaited:
            self._awaited[self._next] = self._sent
        return self._next

    def first(self, ticket: int) -> None:
        end = self._awaited.pop(ticket, None)
        if end is not None:
            self._done = max(self._done, end)

    def gone(self, ticket: int, tokens: float) -> None:
        """It ended, for whatever reason, without a first token."""
        if self._awaited.pop(ticket, None) is not None:
            self._done = min(self._done + tokens, self._sent)
