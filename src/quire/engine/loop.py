"""The engine: requests in, outputs out, one step at a time."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping

from quire.core.errors import QuireError
from quire.core.model_info import ModelInfo
from quire.core.pooling import check_pooling
from quire.core.request import EngineOutput, EngineRequest, FinishReason
from quire.engine.kv_publisher import KVEventPublisher
from quire.engine.pace import Pace
from quire.engine.runner import Launched, Runner
from quire.sched.admit import admit, cancel, queue_refusal
from quire.sched.apply import apply
from quire.sched.decide import decide
from quire.sched.settle import fail, settle
from quire.sched.state import SchedulerState, Step
from quire.wire.rpc import Stats

MAX_ITERATIONS_KEPT = 4096
"""Steps whose token counts are kept for `stats`. Whoever asks twice a second misses none; nobody has to ask."""


class Engine:
    """Single-threaded: whoever owns it calls `submit`, `cancel` and `step` from one thread.

    `kv_events`: gets what each step changed in the prefix cache, of a pool that keeps a journal.
    """

    def __init__(
        self,
        *,
        info: ModelInfo,
        state: SchedulerState,
        runner: Runner,
        clock: Callable[[], float],
        kv_events: KVEventPublisher | None = None,
    ) -> None:
        self.info = info
        self._state = state
        self._runner = runner
        self._clock = clock
        self._kv_events = kv_events
        self._pace = Pace()
        self._in_flight: deque[tuple[Step, Launched]] = deque()
        self._last_settled = 0.0
        self._num_steps = 0
        self._iteration_tokens: deque[int] = deque(maxlen=MAX_ITERATIONS_KEPT)
        self.stalled = False
        """Whether the last step had nothing that could run, although requests wait."""

    @property
    def has_work(self) -> bool:
        return self._state.has_work or bool(self._in_flight)

    def has_room_for(self, request: EngineRequest) -> bool:
        """Whether `submit` would queue this request rather than refuse it because too many wait."""
        return queue_refusal(self._state, len(request.prompt_token_ids)) is None

    def submit(self, request: EngineRequest) -> EngineOutput | None:
        """Queue a request. What cannot be served is answered at once: the output that ends it, with its error."""
        try:
            check_pooling(request.pooling, self.info.pooling, len(request.prompt_token_ids))
            admit(self._state, request.for_types(self.info.num_token_types), self._clock())
        except QuireError as error:
            return _ended(request.request_id, error)
        return None

    def cancel(self, request_id: str) -> EngineOutput | None:
        """End a request at once and free its blocks; None if it had ended already."""
        if cancel(self._state, request_id) is None:
            return None
        return EngineOutput(request_id=request_id, finish_reason=FinishReason.ABORT)

    def step(self) -> list[EngineOutput]:
        """Decide, apply, launch; settle what has been computed: of this step, or of an earlier one where the runner may
        be steps ahead.

        An exception is a fault of ours or of the machine. The pool stays whole, but what was to be copied may not have
        been: whoever goes on must cancel every live request first.
        """
        now = self._clock()
        step = apply(self._state, decide(self._state, now), now)
        self.stalled = not step.scheduled and not self._in_flight
        self._in_flight.append((step, self._runner.launch(step)))
        outputs: list[EngineOutput] = []
        # With nothing to compute, what is in flight is all that can bring news.
        while len(self._in_flight) > (self._runner.steps_ahead if step.scheduled else 0):
            outputs.extend(self._settle(*self._in_flight.popleft()))
        return outputs

    def _settle(self, step: Step, launched: Launched) -> list[EngineOutput]:
        run = launched.wait()
        outputs = self._fail(step, run.failures) if run.failures else []
        done = self._clock()
        outputs.extend(settle(self._state, step, run.results, done))
        self._tell_cache()
        self._num_steps += 1
        if step.scheduled:
            self._iteration_tokens.append(step.num_tokens)
            self._note_pace(step, done - max(step.started, self._last_settled))
        self._last_settled = done
        return outputs

    def _fail(self, step: Step, failures: Mapping[str, QuireError]) -> list[EngineOutput]:
        """End those that still wait for what went wrong: another request may have the same name by now."""
        wanted = {chunk.state.request_id for chunk in step.scheduled if chunk.is_wanted}
        failed = [fail(self._state, name, error) for name, error in failures.items() if name in wanted]
        return [output for output in failed if output is not None]

    def _tell_cache(self) -> None:
        journal = self._state.pool.journal
        if journal is not None and self._kv_events is not None:
            events = journal.take()
            if events:
                self._kv_events.publish(events)

    def _note_pace(self, step: Step, seconds: float) -> None:
        num_decodes = sum(chunk.samples and chunk.num_tokens == 1 for chunk in step.scheduled)
        self._pace.note(step.num_tokens - num_decodes, num_decodes, seconds)

    def stats(self) -> Stats:
        """Gauges of now and totals since the start; hands over, and forgets, the tokens of each step so far."""
        state = self._state
        iteration_tokens = list(self._iteration_tokens)
        self._iteration_tokens.clear()
        return Stats(
            step=self._num_steps,
            num_running=state.num_running,
            num_waiting=state.num_waiting,
            num_waiting_tokens=state.num_waiting_tokens,
            kv_cache_usage=state.pool.usage,
            prefix_cache_queries=state.totals.prefix_cache_queries,
            prefix_cache_hits=state.totals.prefix_cache_hits,
            num_preemptions=state.totals.preemptions,
            num_swaps=state.totals.swaps_out,
            prompt_tokens=state.totals.prompt_tokens,
            generation_tokens=state.totals.generation_tokens,
            iteration_tokens=iteration_tokens,
            num_cached_blocks=state.pool.num_cached,
            prefill_seconds_per_token=self._pace.prefill_seconds_per_token,
            decode_seconds_per_step=self._pace.decode_seconds_per_step,
            decode_seconds_per_sequence=self._pace.decode_seconds_per_sequence,
            kv_event_batches=0 if self._kv_events is None else self._kv_events.num_published,
            kv_event_batches_dropped=0 if self._kv_events is None else self._kv_events.num_dropped,
        )

    def check_integrity(self) -> None:
        """Every KV block is accounted for exactly once, or AssertionError. Called when idle."""
        self._state.check_integrity()


def _ended(request_id: str, error: QuireError) -> EngineOutput:
    return EngineOutput(request_id=request_id, finish_reason=FinishReason.ERROR, error=error.to_info())
