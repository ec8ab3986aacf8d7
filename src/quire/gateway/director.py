"""What a request passes between the parser and the wire, for both doors.

`choose` → `sent` → `first_byte` → `finished`; `choose_again` where an attempt failed before its first byte. The door
calls them; whoever came through `choose` must come to `finished` or `abandon`, else its place is never given back.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from quire.core.errors import ModelNotFound, QuireError
from quire.gateway.endpoint import Clock, Endpoint, Pool
from quire.gateway.errors import NoEndpoint
from quire.gateway.faults import PluginFaults
from quire.gateway.plugin import Admitter, Observer, Producer
from quire.gateway.request import InferenceRequest, Outcome
from quire.gateway.schedule import Choice, Scheduler

BYTES_PER_TOKEN = 4
"""llm-d's estimate, where nobody counted."""
DEFAULT_OUTPUT_TOKENS = 256
"""Expected of a request that does not bound its output."""


class Gate(ABC):
    """Flow control, as the director sees it."""

    @abstractmethod
    async def enter(self, request: InferenceRequest) -> None:
        """Waits until the request may be scheduled. Raises `Dropped`."""

    @abstractmethod
    def leave(self, request: InferenceRequest) -> None:
        """The request is over; called once for each that entered."""


class OpenGate(Gate):
    """No flow control: everything goes through at once."""

    async def enter(self, request: InferenceRequest) -> None:
        return

    def leave(self, request: InferenceRequest) -> None:
        return


@dataclass(slots=True)
class Attempt:
    """One request at one endpoint, and what was counted into the endpoint's load for it."""

    endpoint: Endpoint
    sent: float
    prefill_tokens: int
    tokens: int
    first_byte: float | None = None


@dataclass(slots=True, kw_only=True)
class Director:
    pool: Pool
    scheduler: Scheduler
    clock: Clock
    gate: Gate = field(default_factory=OpenGate)
    producers: Sequence[Producer] = ()
    admitters: Sequence[Admitter] = ()
    observers: Sequence[Observer] = ()
    priorities: Mapping[str, int] = field(default_factory=dict)
    """InferenceObjective's name → priority."""
    chosen: Callable[[InferenceRequest, Choice], None] = lambda _request, _choice: None
    """Is told of each choice, for explaining."""
    expected_cached: Callable[[InferenceRequest, Endpoint], int] = lambda _request, _endpoint: 0
    """Prompt tokens thought to be cached at an endpoint."""
    _faults: PluginFaults = field(init=False)

    def __post_init__(self) -> None:
        self._faults = PluginFaults(self.clock)

    def candidates(self, request: InferenceRequest, excluded: frozenset[str] = frozenset()) -> list[Endpoint]:
        """Endpoints that could serve it at all: available, not draining, with the model, inside the subset."""
        model, subset, selector = request.target_model, request.subset, request.selector
        return [
            endpoint
            for endpoint in self.pool.all
            if endpoint.available
            and not endpoint.draining
            and (endpoint.models is None or not model or model in endpoint.models)
            and (not excluded or endpoint.key not in excluded)
            and (subset is None or endpoint.address in subset)
            and (not selector or all(endpoint.labels.get(name) == value for name, value in selector.items()))
        ]

    async def choose(self, request: InferenceRequest) -> Choice:
        """Admission, flow control, producers, scheduling. Raises `Dropped`."""
        request.target_model = request.target_model or request.model
        request.priority = self.priorities.get(request.objective, 0)
        if not request.prompt_tokens:
            ids = request.prompt_token_ids
            request.prompt_tokens = len(ids) if ids is not None else -(-len(request.prompt) // BYTES_PER_TOKEN)
        self._aim(request, frozenset())
        self._admit(request, after_producers=False)
        await self.gate.enter(request)
        try:
            await self._produce(request)
            self._admit(request, after_producers=True)
            return self.choose_again(request)
        except BaseException:
            self.gate.leave(request)
            raise

    def choose_again(self, request: InferenceRequest, excluded: frozenset[str] = frozenset()) -> Choice:
        """Schedule a request that is through the gate, without the endpoints where it failed."""
        began = self.clock()
        self._aim(request, excluded)
        candidates = self.candidates(request, excluded)
        if not candidates:
            raise self._nobody(request, excluded)
        choice = self.scheduler.schedule(request, candidates)
        choice.seconds = self.clock() - began
        self.chosen(request, choice)
        return choice

    def _admit(self, request: InferenceRequest, *, after_producers: bool) -> None:
        for admitter in self.admitters:
            if admitter.after_producers == after_producers:
                admitter.admit(request, self.pool.all)

    def _aim(self, request: InferenceRequest, excluded: frozenset[str]) -> None:
        """Turn to the first fallback that has endpoints, if the target has none. If all have none it stays: it is the
        target that the queue holds the request for."""
        if not request.fallbacks or self.candidates(request, excluded):
            return
        target = request.target_model, request.selector
        for index, (model, selector) in enumerate(request.fallbacks):
            request.target_model, request.selector = model, selector
            if self.candidates(request, excluded):
                request.fallbacks = request.fallbacks[index + 1 :]
                return
        request.target_model, request.selector = target

    async def _produce(self, request: InferenceRequest) -> None:
        candidates = self.candidates(request)
        for producer in self.producers:
            try:
                pending = producer.produce(request, candidates)
                if pending is not None:
                    await pending
            except Exception as error:  # one plugin's fault never costs the request
                self._faults.tell("producer_failed", producer.name, error)

    def sent(self, request: InferenceRequest, endpoint: Endpoint, choice: Choice) -> Attempt:
        """Count the request at the endpoint. Called with the choice, before anything is awaited, so that the next
        choice sees it."""
        self._tell(lambda observer: observer.sent(request, endpoint, choice.conclusion))
        prefill = max(request.prompt_tokens - self.expected_cached(request, endpoint), 0)
        output = DEFAULT_OUTPUT_TOKENS if request.max_tokens is None else request.max_tokens
        attempt = Attempt(endpoint, self.clock(), prefill, request.prompt_tokens + output)
        endpoint.load.requests += 1
        endpoint.load.prefill_tokens += prefill
        endpoint.load.tokens += attempt.tokens
        return attempt

    def first_byte(self, request: InferenceRequest, attempt: Attempt) -> None:
        if attempt.first_byte is not None:
            return
        attempt.first_byte = self.clock()
        attempt.endpoint.load.prefill_tokens -= attempt.prefill_tokens
        ttft = attempt.first_byte - attempt.sent
        self._tell(lambda observer: observer.first_byte(request, attempt.endpoint, ttft))

    def finished(self, request: InferenceRequest, attempt: Attempt, outcome: Outcome) -> None:
        """The attempt is over; the request may go on elsewhere (`choose_again`) or end (`abandon`)."""
        load = attempt.endpoint.load
        load.requests -= 1
        load.tokens -= attempt.tokens
        if attempt.first_byte is None:
            load.prefill_tokens -= attempt.prefill_tokens
        self._tell(lambda observer: observer.finished(request, attempt.endpoint, outcome))

    def _tell(self, told: Callable[[Observer], None]) -> None:
        """Each, whatever the others make of it."""
        for observer in self.observers:
            try:
                told(observer)
            except Exception as error:
                self._faults.tell("observer_failed", observer.name or type(observer).__name__, error)

    def abandon(self, request: InferenceRequest) -> None:
        """The request is over, served or not: gives its place in flow control back. Once per `choose` that returned."""
        self.gate.leave(request)

    def _nobody(self, request: InferenceRequest, excluded: frozenset[str]) -> QuireError:
        """Why there is no candidate."""
        everyone, model = self.pool.all, request.target_model
        if not everyone:
            return NoEndpoint("No endpoint is known.", retry_after=1.0)
        serving = [endpoint for endpoint in everyone if endpoint.models is None or model in endpoint.models]
        if not serving:
            return no_such_model(model)
        down = sum(not endpoint.available for endpoint in serving)
        draining = sum(endpoint.draining for endpoint in serving)
        tried = sum(endpoint.key in excluded for endpoint in serving)
        return NoEndpoint(
            f"Of {len(serving)} endpoints with the model {model!r}, {down} are down, {draining} are draining "
            f"and {tried} have just failed.",
            retry_after=1.0,
        )


def no_such_model(model: str) -> ModelNotFound:
    return ModelNotFound(
        f"No endpoint serves the model {model!r}.", param="model", remedy="See /v1/models for those there are."
    )
