"""The queue behind the director's gate, on the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from heapq import heapify, heappop, heappush
from math import inf
from typing import Protocol

import structlog

from quire.gateway.director import DEFAULT_OUTPUT_TOKENS, Gate, no_such_model
from quire.gateway.endpoint import Clock, Endpoint
from quire.gateway.errors import Dropped, ShuttingDown
from quire.gateway.flow.pace import Pace
from quire.gateway.flow.policies import Waiting, flow_of, lane_key
from quire.gateway.flow.queue import FlowQueue, Lane, QueueSettings, Rejection
from quire.gateway.flow.rate import DispatchRate
from quire.gateway.flow.reclaim import Reclaimer
from quire.gateway.flow.refusals import given_way, refusal
from quire.gateway.flow.saturation import EngineQueues, SaturationDetector, Shares
from quire.gateway.flow.snapshot import FlowSnapshot, LaneSnapshot
from quire.gateway.plugin import Conclusion, Observer
from quire.gateway.request import InferenceRequest, Outcome

Candidates = Callable[[InferenceRequest], Sequence[Endpoint]]
"""`Director.candidates`."""


class Cancellable(Protocol):
    def cancel(self) -> None: ...


CallLater = Callable[[float, Callable[[], None]], Cancellable]
"""Calls the function after so many seconds, unless cancelled: `loop.call_later`."""

_Ready = tuple[int, int, int, Lane, Sequence[Endpoint]]
"""By what lanes with endpoints take turns, the lane, and its endpoints."""


@dataclass(slots=True)
class _Inside:
    """A request that was let go and has not left."""

    request: InferenceRequest
    places: Sequence[Endpoint]
    """Where it may go, until it is sent."""
    tokens: int


class FlowController(Gate, Observer):
    """Lets requests go while the endpoints that could serve them are not full; the others wait, in `FlowQueue`'s order.

    Nothing runs without a reason: something leaves, the metrics or the pool have changed (`poke`), or the next request
    expires. It must be among the director's observers too: so it knows which requests have reached an endpoint's count.

    Looking at all that waits takes time that grows with the models (and subsets) asked for, whose names are in the
    hands of callers: it is done for a tenth of the time at most (`Pace`), and an arrival by itself costs no more
    than a look at its own candidates.
    """

    name = "flow-control"

    def __init__(
        self,
        settings: QueueSettings,
        candidates: Candidates,
        clock: Clock,
        *,
        detector: SaturationDetector | None = None,
        awaited: Callable[[InferenceRequest], bool] = lambda _request: True,
        evict: bool = False,
        call_later: CallLater | None = None,
        cpu: Clock | None = None,
    ) -> None:
        """`awaited` says of a request without endpoints whether one may come (a model scaled to zero, say); if not it
        is refused at once. With `evict`, requests in flight of negative priority are ended when others wait,
        where their door can do that (`InferenceRequest.break_off`). `cpu` tells the time that this thread has worked;
        `clock`, if None."""
        self._settings = settings
        self._candidates = candidates
        self._clock = clock
        self._detector = detector or EngineQueues()
        self._awaited = awaited
        self._call_later = call_later
        self._queue = FlowQueue(settings)
        self._futures: dict[Waiting, asyncio.Future[None]] = {}
        self._inside: dict[int, _Inside] = {}
        self._shares = Shares()
        self._rate = DispatchRate(clock())
        self._cpu = cpu or clock
        self._pace = Pace()
        self._contested: dict[int, int] = {}
        """By identity of an endpoint: the highest priority that waits for it, as of the last look at all."""
        self._reclaimer = Reclaimer(self._end) if evict else None
        self._timer: Cancellable | None = None
        self._timer_at = inf
        self._poked = False
        self._closed = False

    # --- the gate -------------------------------------------------------------------------------------------

    async def enter(self, request: InferenceRequest) -> None:
        now = self._clock()
        if self._closed:
            raise self._shutting_down()
        candidates = self._candidates(request)
        if not candidates and not self._awaited(request):
            raise no_such_model(request.target_model or request.model)
        if len(self._queue) and self._would_overtake(request, candidates):
            if self._pace.may(now):
                self._cycle(now)
            else:  # somebody may have left since the last look, and those who wait have not been asked
                await self._queue_up(request, candidates, now, unseen=True)
                return
        lane = self._queue.lane(lane_key(request))
        if candidates and (lane is None or request.priority > lane.priority):
            saturation = self._saturation(candidates, now)
            if saturation < self._queue.ceiling(request.priority, saturation, lane):
                self._let_go(request, candidates, now)
                return
        await self._queue_up(request, candidates, now)

    def _would_overtake(self, request: InferenceRequest, candidates: Sequence[Endpoint]) -> bool:
        """Whether somebody of its priority or a higher one waits for what it asks for."""
        lane = self._queue.lane(lane_key(request))
        if lane is not None and request.priority <= lane.priority:
            return True
        contested = self._contested
        return any(contested.get(id(endpoint), -inf) >= request.priority for endpoint in candidates)

    async def _queue_up(
        self, request: InferenceRequest, candidates: Sequence[Endpoint], now: float, *, unseen: bool = False
    ) -> None:
        waiting = self._offer(request, now, has_endpoints=bool(candidates))
        self._contest(request.priority, candidates)
        if unseen:
            self.poke()
        await self._wait(waiting)

    def _offer(self, request: InferenceRequest, now: float, *, has_endpoints: bool) -> Waiting:
        place, displaced = self._queue.offer(request, now, has_endpoints=has_endpoints)
        for waiting in displaced:
            self._reject(waiting, Rejection.DISPLACED, now)
        if isinstance(place, Rejection):
            raise self._error(request, place, now)
        lane = self._queue.lane(place.lane)
        assert lane is not None
        self._set_timer(now, min(self._timer_at, self._queue.deadline(lane, lane.oldest)))
        return place

    async def _wait(self, waiting: Waiting) -> None:
        future = asyncio.get_running_loop().create_future()
        self._futures[waiting] = future
        try:
            await future
        except asyncio.CancelledError:
            if not self._queue.cancel(waiting) and id(waiting.request) in self._inside:
                self.leave(waiting.request)  # let go in the same instant: nobody else will give its place back
            if not len(self._queue):
                self._set_timer(self._clock(), inf)
            raise
        finally:
            self._futures.pop(waiting, None)

    def leave(self, request: InferenceRequest) -> None:
        inside = self._inside.pop(id(request), None)
        assert inside is not None, f"request {request.id} leaves, and has not entered"
        self._settle(inside)
        if self._reclaimer is not None:
            self._reclaimer.left(request, self._clock())
        self.poke()

    def poke(self) -> None:
        """Look again, soon: metrics, or the endpoints that there are, have changed. Pokes until then are one."""
        if self._poked or not len(self._queue):
            return
        self._poked = True
        delay = self._pace.delay(self._clock())
        if delay:
            self._later(delay, self._look)
        else:
            asyncio.get_running_loop().call_soon(self._look)

    def close(self) -> None:
        """Turn away all that wait, and all that come."""
        self._closed = True
        if self._timer is not None:
            self._timer.cancel()
        for waiting, future in self._futures.items():
            self._queue.cancel(waiting)
            if not future.done():
                future.set_exception(self._shutting_down())

    # --- as an observer -------------------------------------------------------------------------------------

    def sent(self, request: InferenceRequest, endpoint: Endpoint, choice: Conclusion) -> None:
        inside = self._inside.get(id(request))
        if inside is None:
            return
        self._settle(inside)
        if self._reclaimer is not None:
            self._reclaimer.sent(request, endpoint, self._clock())

    def finished(self, request: InferenceRequest, endpoint: Endpoint, outcome: Outcome) -> None:
        """What it wrote goes to its flow's account; its prompt did when it was let go."""
        tokens = 2.0 * (outcome.output_tokens or 0)
        band = self._settings.band(request.priority)
        band.fairness.served(flow_of(request), tokens, self._clock())

    # --- what is looked at from outside ---------------------------------------------------------------------

    def snapshot(self) -> FlowSnapshot:
        now = self._clock()
        lanes = [
            LaneSnapshot(
                model=lane.key.model,
                priority=priority,
                requests=len(queue),
                has_endpoints=lane.has_endpoints,
                saturation=lane.saturation,
                oldest=now - lane.oldest.enqueued,
            )
            for lane in self._queue.lanes
            for priority, queue in lane.bands.items()
        ]
        return FlowSnapshot(
            waiting=len(self._queue),
            size=self._queue.size,
            inside=len(self._inside),
            dispatch_rate=self._rate.per_second(now),
            lanes=lanes,
        )

    # --- inside ---------------------------------------------------------------------------------------------

    def _look(self) -> None:
        self._poked = False
        if not self._closed:
            self._cycle(self._clock())

    def _cycle(self, now: float) -> None:
        """Let go what can go: the highest priority first, lanes of the same priority in turns."""
        looks, gone, began = len(self._queue.lanes), 0, self._cpu()
        try:
            ready = self._ready(now)
            for expired, reason in self._queue.expire(now):
                self._reject(expired, reason, now)
            gone = self._dispatch(ready, now)
        finally:  # even where a plugin failed, nobody waits for ever
            self._set_timer(now, self._queue.next_deadline())
            # What let a request go is no part of it: that work is done once for each request.
            self._pace.worked((self._cpu() - began) * looks / max(looks + gone, 1), self._clock())

    def _dispatch(self, ready: list[_Ready], now: float) -> int:
        """How many were let go."""
        heapify(ready)
        gone = 0
        known: dict[tuple[int, ...], float] = {}  # most lanes have the same endpoints
        contested: set[tuple[int, ...]] = set()
        while ready:
            _, _, order, lane, candidates = heappop(ready)
            if not lane.bands:
                continue
            places = tuple(map(id, candidates))
            if places not in known:
                known[places] = self._saturation(candidates, now)
            saturation = known[places]
            waiting = self._queue.dispatch(lane, now, saturation)
            if waiting is None:
                if places not in contested:  # by the highest priority, which comes first
                    contested.add(places)
                    self._contest(lane.priority, candidates)
                self._reclaim(lane, candidates, saturation, now)
                continue
            gone += 1
            future = self._futures[waiting]
            if not future.done():  # else cancelled, and about to find out
                self._let_go(waiting.request, candidates, now)
                known.clear()
                future.set_result(None)
            if lane.bands:
                heappush(ready, (-lane.priority, lane.turn, order, lane, candidates))
        return gone

    def _ready(self, now: float) -> list[_Ready]:
        ready: list[_Ready] = []
        self._contested.clear()
        for order, lane in enumerate(self._queue.lanes):
            candidates = self._candidates(lane.oldest.request)
            self._queue.set_endpoints(lane, now, has_endpoints=bool(candidates))
            if candidates:
                ready.append((-lane.priority, lane.turn, order, lane, candidates))
        return ready

    def _contest(self, priority: int, candidates: Sequence[Endpoint]) -> None:
        contested = self._contested
        for endpoint in candidates:
            if contested.get(id(endpoint), -inf) < priority:
                contested[id(endpoint)] = priority

    def _saturation(self, candidates: Sequence[Endpoint], now: float) -> float:
        try:
            return self._detector.saturation(candidates, now, self._shares.of(candidates))
        except Exception as error:  # one plugin's fault never holds requests up
            structlog.get_logger().warning("saturation_unknown", plugin=self._detector.name, error=str(error))
            return 0.0

    def _reclaim(self, lane: Lane, candidates: Sequence[Endpoint], saturation: float, now: float) -> None:
        if self._reclaimer is None:
            return
        if 0.0 < lane.ceiling <= saturation:  # one of 0 is held back whatever room there is
            footprint = saturation / max(len(self._inside), 1)
            self._reclaimer.blocked(lane.priority, candidates, saturation - lane.ceiling, footprint, now)

    def _end(self, request: InferenceRequest) -> None:
        if request.break_off is not None:
            retry_after = self._rate.retry_after(len(self._queue) + 1, self._clock())
            request.break_off(given_way(request, retry_after=retry_after))

    def _let_go(self, request: InferenceRequest, candidates: Sequence[Endpoint], now: float) -> None:
        output = DEFAULT_OUTPUT_TOKENS if request.max_tokens is None else request.max_tokens
        inside = _Inside(request, candidates, request.prompt_tokens + output)
        self._inside[id(request)] = inside
        self._shares.add(inside.places, inside.tokens, 1)
        self._rate.add(now)

    def _settle(self, inside: _Inside) -> None:
        """It is on its way no more."""
        if inside.places:
            self._shares.add(inside.places, inside.tokens, -1)
            inside.places = ()

    def _set_timer(self, now: float, at: float) -> None:
        """It may go off too early, where what would have expired has gone."""
        if at == self._timer_at:
            return
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._timer_at = at
        if at < inf:
            self._timer = self._later(max(at - now, 0.0), self._expired)

    def _later(self, delay: float, call: Callable[[], None]) -> Cancellable:
        return (self._call_later or asyncio.get_running_loop().call_later)(delay, call)

    def _expired(self) -> None:
        self._timer, self._timer_at = None, inf
        if self._pace.may(self._clock()):
            self._look()
        else:
            self.poke()

    def _reject(self, waiting: Waiting, reason: Rejection, now: float) -> None:
        future = self._futures.get(waiting)
        if future is not None and not future.done():
            future.set_exception(self._error(waiting.request, reason, now, now - waiting.enqueued))

    def _error(self, request: InferenceRequest, reason: Rejection, now: float, waited: float = 0.0) -> Dropped:
        return refusal(
            request,
            reason,
            waiting=len(self._queue),
            waited=waited,
            retry_after=self._rate.retry_after(len(self._queue) + 1, now),
        )

    def _shutting_down(self) -> ShuttingDown:
        return ShuttingDown("The gateway is shutting down.", retry_after=1.0)
