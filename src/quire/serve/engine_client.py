"""The front end's side of the engine: submit, cancel, watch, and bring back to life.

One task, `supervise`, owns the life of the engine: it starts a process, waits for `Ready`, hands out its outputs, and
notices its death (the process ends, or falls silent for too long). Requests in flight are then run again on a new
engine, where promise P1 gives the same tokens. A request that keeps being there when engines die is taken for their
cause and answered with `EngineDead` (see `_bury`). Deaths in a row, with no request served between, end in giving up.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Sequence
from functools import partial

import structlog
import zmq.asyncio

from quire.core.errors import (
    DeadlineExceeded,
    EngineDead,
    EngineStartFailed,
    ErrorInfo,
    QueueFull,
    QuireError,
    from_info,
)
from quire.core.model_info import ModelInfo
from quire.core.request import EngineOutput, EngineRequest, FinishReason
from quire.serve.engine_link import EngineLink
from quire.serve.engine_process import EngineCommand, EngineProcess
from quire.serve.inbox import Flight, Inbox, patience
from quire.serve.sampling import num_listed
from quire.serve.supervision import EngineListener, EngineState, Supervision
from quire.wire.rpc import Cancel, FromEngine, Outputs, Ready, StartFailed, Stats, Stop, Submit

TICK = 0.25
LONE_SUSPECT_DEATHS = 2
MAX_DEATHS = 4
MAX_NUMBERS_PER_MESSAGE = 1_000_000  # prompt tokens and the like; keeps a message far below what a socket accepts


class EngineClient:
    """Talks to one engine at a time. Use within one event loop."""

    def __init__(
        self,
        command: EngineCommand,
        first: EngineProcess,
        *,
        context: zmq.asyncio.Context,
        listener: EngineListener,
        supervision: Supervision,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._command = command
        self._process = first
        self._context = context
        self._listener = listener
        self._bounds = supervision
        self._clock = clock
        self._link: EngineLink | None = None
        self._flights: dict[str, Flight] = {}
        self._ready = asyncio.Event()  # ready, or failed for good
        self._stopping = asyncio.Event()
        self._deaths_in_a_row = 0
        self._last_word = 0.0
        self._failure: QuireError | None = None
        self.state = EngineState.STARTING
        self.model: ModelInfo | None = None
        self.stats: Stats | None = None
        self.restarts = 0

    # --- what callers use ---------------------------------------------------------------------------------------

    async def wait_ready(self, timeout: float | None = None) -> ModelInfo:
        """The model, once an engine is up. Raises what ended it, or `EngineDead` after `timeout` seconds."""
        try:
            async with asyncio.timeout(timeout):
                await self._ready.wait()
        except TimeoutError:
            raise EngineDead(
                f"The engine is still starting after {timeout:g} s.", remedy="Try again later.", retry_after=5.0
            ) from None
        if self._failure is not None:
            raise from_info(self._failure.to_info())  # a new one: what is raised again keeps all its tracebacks
        assert self.model is not None
        return self.model

    def submit(self, requests: Sequence[EngineRequest]) -> Inbox:
        """Send `requests`, whose ids no other request in flight may have; their outputs come to one inbox.

        Requests made while an engine starts wait for it, `Supervision.start_wait` at most. Raises `QueueFull`, and
        `EngineDead` when there is no engine any more.
        """
        if self.state in (EngineState.FAILED, EngineState.STOPPED):
            raise EngineDead(headline(self._failure) if self._failure else "The engine has been stopped.")
        if len(self._flights) + len(requests) > self._bounds.max_in_flight:
            raise QueueFull(
                f"{len(self._flights)} requests are in flight already.", remedy="Try again later.", retry_after=1.0
            )
        inbox = Inbox.of_size(len(requests))
        now = self._clock()
        for request in requests:
            assert request.request_id not in self._flights
            self._flights[request.request_id] = Flight(request, inbox, now)
        self._dispatch()
        return inbox

    def cancel(self, request_ids: Sequence[str]) -> None:
        """Forget requests; those that have ended already are no matter."""
        known = [self._flights.pop(request_id) for request_id in request_ids if request_id in self._flights]
        sent = [flight.request.request_id for flight in known if flight.sent]
        if sent and self._link is not None:
            self._link.post(Cancel(sent))
        if known:
            self._dispatch()

    def finish(self, request_ids: Sequence[str]) -> None:
        """As `cancel`, for requests whose reader has all it wants: they count as served."""
        self._deaths_in_a_row = 0
        self.cancel(request_ids)

    @property
    def num_in_flight(self) -> int:
        return len(self._flights)

    @property
    def max_in_flight(self) -> int:
        """How many requests `submit` takes before others have ended."""
        return self._bounds.max_in_flight

    @property
    def failure(self) -> QuireError | None:
        return self._failure

    def heartbeat_age(self) -> float | None:
        """Seconds since the engine's last word; None while there is no engine."""
        return self._clock() - self._last_word if self.state is EngineState.READY else None

    async def stop(self) -> None:
        """End the engine: tell it, then kill it if it has not gone in time."""
        self._stopping.set()
        if self._link is not None:
            self._link.post(Stop())
        elif self.state is EngineState.STARTING:
            self._process.kill()
        if not await asyncio.to_thread(self._process.wait, self._bounds.stop_timeout):
            self._process.kill()
            await asyncio.to_thread(self._process.wait)

    # --- the engine's life --------------------------------------------------------------------------------------

    async def supervise(self) -> None:
        """Keep an engine running until `stop`, or until it is given up (`failure` says why)."""
        expiring = asyncio.create_task(self._expire_while_starting())
        try:
            await self._keep_alive()
        except Exception as error:
            # A fault of ours, or a command that cannot be run any more: say so rather than leave requests waiting.
            structlog.get_logger().exception("the engine is no longer supervised")
            self._end(EngineState.FAILED, EngineDead(f"The engine cannot be started: {error}."))
        finally:
            expiring.cancel()

    async def _keep_alive(self) -> None:
        while True:
            try:
                cause = await self._live(self._process)
            finally:
                self._process.kill()
            if self._stopping.is_set():
                break
            self._bury(cause)
            if self.model is None or self._deaths_in_a_row > self._bounds.max_restarts:
                self._end(EngineState.FAILED, self._give_up(cause))
                return
            delay = self._bounds.first_back_off * 2 ** (self._deaths_in_a_row - 1)
            if await _is_set_within(self._stopping, min(delay, self._bounds.max_back_off)):
                break
            self.restarts += 1
            self._process = await asyncio.to_thread(self._command.start)
            if self._stopping.is_set():
                self._process.kill()
                break
        self._end(EngineState.STOPPED, EngineDead("The server has stopped its engine."))

    async def _live(self, process: EngineProcess) -> QuireError:
        """One engine's life, from the start of its process to its death, whose cause is returned."""
        self._last_word = self._clock()
        exited = asyncio.Event()
        loop = asyncio.get_running_loop()
        process.on_exit(partial(_set_from_thread, loop, exited))
        try:
            link = EngineLink(self._context, process.socket_path)
        except zmq.ZMQError:
            if not await asyncio.to_thread(process.wait, 1.0):
                raise
            return _exit_error(process, EngineStartFailed)  # it ended at once, and took the socket's directory along
        with link:
            listening = loop.create_task(self._listen(link))
            watching = loop.create_task(self._watch(link))
            leaving = loop.create_task(exited.wait())
            tasks: set[asyncio.Task[QuireError] | asyncio.Task[bool]] = {listening, watching, leaving}
            try:
                await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                if leaving.done() and not listening.done():
                    # Its last words may still be on the way: StartFailed, or the outputs of its last step.
                    await asyncio.wait({listening}, timeout=0.1)
                for speaking in (listening, watching):
                    if speaking.done():
                        return speaking.result()
                return _exit_error(process, EngineStartFailed if self._link is None else EngineDead)
            finally:
                self._link = None
                self.state = EngineState.STARTING
                self._ready.clear()
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

    async def _listen(self, link: EngineLink) -> QuireError:
        while True:
            message = await link.receive()
            if message is None:
                return EngineDead("The engine sent something that is not a message.")
            self._last_word = self._clock()
            if isinstance(message, StartFailed):
                return from_info(message.error)
            self._take(link, message)
            # Receiving does not wait while messages are there: let those run who read what has come.
            await asyncio.sleep(0)

    def _take(self, link: EngineLink, message: FromEngine) -> None:
        if isinstance(message, Outputs):
            for output in message.outputs:
                self._deliver(output)
            self._dispatch()
        elif isinstance(message, Stats):
            self.stats = message
            self._listener.engine_stats(message)
        elif isinstance(message, Ready):
            self._link = link
            self.model = message.model
            self.state = EngineState.READY
            self._listener.engine_ready(message.model)
            self._ready.set()
            replayed = sum(flight.deaths > 0 for flight in self._flights.values())
            if replayed:
                self._listener.requests_replayed(replayed)
            self._dispatch()

    async def _watch(self, link: EngineLink) -> QuireError:
        """Returns when the engine has to be given up as hanging."""
        while True:
            await asyncio.sleep(TICK)
            silence = self._clock() - self._last_word
            limit = self._bounds.start_timeout
            if self.state is EngineState.READY:
                limit = 2 * self._bounds.heartbeat_timeout
            # Words that wait to be heard mean that we were late, not the engine.
            if silence > limit and not link.has_mail():
                return EngineDead(f"The engine gave no sign of life for {silence:.1f} s and was killed.")

    # --- flights ------------------------------------------------------------------------------------------------

    def _dispatch(self) -> None:
        """Send what waits. Of the requests that may kill engines, one at a time."""
        if self._link is None:
            return
        waiting = [flight for flight in self._flights.values() if not flight.sent]
        if not waiting:
            return
        quarantined = any(flight.sent and flight.deaths >= LONE_SUSPECT_DEATHS for flight in self._flights.values())
        batch: list[EngineRequest] = []
        num_numbers = 0
        for flight in waiting:
            if flight.deaths >= LONE_SUSPECT_DEATHS:
                if quarantined:
                    continue
                quarantined = True
            flight.sent = True
            batch.append(flight.request)
            num_numbers += len(flight.request.prompt_token_ids) + num_listed(flight.request.sampling)
            if num_numbers > MAX_NUMBERS_PER_MESSAGE:
                self._link.post(Submit(batch))
                batch, num_numbers = [], 0
        if batch:
            self._link.post(Submit(batch))

    def _deliver(self, output: EngineOutput) -> None:
        flight = self._flights.get(output.request_id)
        if flight is None:
            return  # cancelled meanwhile
        try:
            news = flight.accept(output)
        except QuireError as error:
            self._refuse(flight, error)
            return
        if news is not None and not flight.inbox.put(news):
            self.cancel([output.request_id])
        elif output.finish_reason is not None or output.error is not None:
            self._flights.pop(output.request_id, None)
            if output.error is None:
                self._deaths_in_a_row = 0

    def _refuse(self, flight: Flight, error: QuireError) -> None:
        """Answer a request with an error of the front end's own."""
        self.cancel([flight.request.request_id])
        info: ErrorInfo = error.to_info()
        output = EngineOutput(request_id=flight.request.request_id, finish_reason=FinishReason.ERROR, error=info)
        flight.inbox.put(output)

    async def _expire_while_starting(self) -> None:
        """Answer requests that have waited too long for an engine, be it starting or about to be started again."""
        while True:
            await asyncio.sleep(TICK)
            if self.state is EngineState.STARTING:
                now = self._clock()
                for flight in list(self._flights.values()):
                    self._expire(flight, now)

    def _expire(self, flight: Flight, now: float) -> None:
        if now - flight.request.arrival_time > patience(flight.request.deadlines):
            text = "The engine is starting, and the request's deadline passed."
            self._refuse(flight, DeadlineExceeded(text, remedy="Try again later.", retry_after=5.0))
        elif now - flight.queued_at > self._bounds.start_wait:
            text = f"The engine did not start within {self._bounds.start_wait:g} s."
            self._refuse(flight, EngineDead(text, remedy="Try again later.", retry_after=5.0))

    def _bury(self, cause: QuireError) -> None:
        """Take stock after a death: who is to be run again, and who is not.

        A request that saw two deaths is a suspect. A lone suspect is condemned; several are run again one at a time,
        so that the next death has one suspect only, and the innocent ones get their answer. `MAX_DEATHS` is the
        bound for whatever else may happen.
        """
        self._deaths_in_a_row += 1
        self._listener.engine_died()
        present = [flight for flight in self._flights.values() if flight.sent]
        structlog.get_logger().error(
            "the engine died", cause=cause.message, requests=len(present), in_a_row=self._deaths_in_a_row
        )
        for flight in present:
            flight.engine_died(self._clock())
        suspects = [flight for flight in present if flight.deaths >= LONE_SUSPECT_DEATHS]
        for flight in suspects:
            if len(suspects) == 1 or flight.deaths >= MAX_DEATHS:
                text = f"The engine died {flight.deaths} times while it ran this request; last: {headline(cause)}"
                self._refuse(flight, EngineDead(text, remedy="Do not send it again unchanged."))

    def _give_up(self, cause: QuireError) -> QuireError:
        if self.model is None:
            return cause
        lines = "\n".join(self._process.last_lines[-10:])
        return EngineDead(
            f"The engine died {self._deaths_in_a_row} times in a row and was given up; last: {headline(cause)}\n"
            f"{lines}",
            remedy="Restart the server.",
        )

    def _end(self, state: EngineState, failure: QuireError) -> None:
        self.state = state
        self._failure = failure
        self._ready.set()
        for flight in list(self._flights.values()):
            self._refuse(flight, EngineDead(headline(failure)))


def headline(error: QuireError) -> str:
    """Without the engine's log, which is for the operator and not for those who call the API."""
    return error.message.partition("\n")[0]


def _exit_error(process: EngineProcess, kind: type[QuireError]) -> QuireError:
    code = process.returncode
    how = f"signal {-code}" if code is not None and code < 0 else f"exit code {code}"
    lines = "\n".join(process.last_lines[-10:])
    return kind(f"The engine process ended with {how}." + (f"\nIts last words:\n{lines}" if lines else ""))


def _set_from_thread(loop: asyncio.AbstractEventLoop, event: asyncio.Event) -> None:
    with contextlib.suppress(RuntimeError):  # the loop has ended, and nobody waits
        loop.call_soon_threadsafe(event.set)


async def _is_set_within(event: asyncio.Event, seconds: float) -> bool:
    try:
        async with asyncio.timeout(seconds):
            return await event.wait()
    except TimeoutError:
        return False
