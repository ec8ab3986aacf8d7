"""One attempt at one endpoint, from its counting to its outcome."""

from __future__ import annotations

from dataclasses import dataclass, field

from quire.gateway.director import Attempt, Director
from quire.gateway.endpoint import Endpoint
from quire.gateway.proxy.connections import Connections
from quire.gateway.proxy.upstream import Connection
from quire.gateway.proxy.usage import Usage
from quire.gateway.request import InferenceRequest, Outcome
from quire.gateway.schedule import Choice


@dataclass(slots=True)
class Try:
    """Counted from its making, which has to follow the choice at once; `close` counts it off, once."""

    director: Director
    request: InferenceRequest
    choice: Choice
    attempt: Attempt = field(init=False)
    answer: Connection | None = None
    usage: Usage = field(default_factory=Usage)
    error: str = "cancelled"
    """Until it is known better: whoever is interrupted on the way was cancelled."""
    closed: bool = False

    def __post_init__(self) -> None:
        self.attempt = self.director.sent(self.request, self.choice.endpoint, self.choice)

    @property
    def endpoint(self) -> Endpoint:
        return self.attempt.endpoint

    def close(self, connections: Connections) -> None:
        if self.closed:
            return
        self.closed = True
        answer, status = self.answer, None
        if answer is not None:
            status = answer.status or None
            if answer.complete:
                connections.release(self.endpoint, answer)
            else:
                answer.abort()
        outcome = Outcome(
            status=status,
            error=self.error,
            first_byte=self.attempt.first_byte,
            finished=self.director.clock(),
            output_tokens=self.usage.output_tokens,
            prompt_tokens=self.usage.prompt_tokens,
            cached_tokens=self.usage.cached_tokens,
        )
        self.director.finished(self.request, self.attempt, outcome)
