"""One HTTP/1.1 connection to an endpoint.

Our own over httptools, rather than aiohttp's client, for what a streamed piece costs: it goes from the parser's
callback straight to the client's transport, and no task wakes up for it.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import httptools

from quire.gateway.errors import UpstreamError, UpstreamTimeout

HIGH_WATER: Final = 256 * 1024
"""Bytes held for a reader that lags, before the endpoint is no longer read."""
FRAMING_PER_BODY_BYTE: Final = 8
"""Chunks of one byte have six bytes of framing; more than this is no body."""
_NAME = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_NO_VALUE = re.compile(rb"[\x00-\x08\x0a-\x1f\x7f]")


@dataclass(frozen=True, slots=True, kw_only=True)
class Waits:
    """Seconds for one exchange."""

    first_byte: float
    idle: float
    total: float


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadLimits:
    max_bytes: int
    max_headers: int


class Connection(asyncio.Protocol):
    """One request at a time: `send`, `begin`, then `read` or `relay` to the end; then another, or `abort`."""

    def __init__(self, name: str, limits: HeadLimits, lost: Callable[[Connection], None]) -> None:
        self.name = name
        """The endpoint's, for messages."""
        self.status = 0
        self.headers: list[tuple[bytes, bytes]] = []
        self.complete = False
        """The answer is there to its end, as far as it was read."""
        self.reusable = False
        self.untouched = False
        """Nothing of an answer has come; with `reused`, an end of the connection is no sign of a dead endpoint."""
        self.reused = False
        self.busy = False
        self.idle_since = 0.0
        self._limits = limits
        self._lost = lost
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._parser: httptools.HttpResponseParser | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._error: UpstreamError | None = None
        self._sink: Callable[[bytes], bool] | None = None
        self._pieces: list[bytes] = []
        self._reset()

    def _reset(self) -> None:
        self.status = 0
        self.headers = []
        self.complete = self.reusable = False
        self.untouched = True
        self._pieces = []
        self._sink = None
        self._num_held = self._num_bytes = self._num_head_bytes = self._num_body_bytes = 0
        self._body_begun = self._head_only = self._until_close = self._paused = False
        self._sent_at = self._last_data = self._loop.time()

    # --- for the one who asks -----------------------------------------------------------------------------------

    @property
    def open(self) -> bool:
        return self._transport is not None and not self._transport.is_closing()

    @property
    def sent(self) -> bool:
        """All of the request has gone out; an answer may come before that."""
        return self._transport is not None and not self._transport.get_write_buffer_size()

    def send(self, data: bytes, waits: Waits, *, head_only: bool = False) -> None:
        """`head_only`: the answer has no body whatever its head says, as to HEAD."""
        assert self._transport is not None
        assert not self.busy
        self._reset()
        self.busy = True
        self._head_only = head_only
        self._waits = waits
        self._parser = httptools.HttpResponseParser(self)
        self._transport.write(data)
        self._timer = self._loop.call_later(min(waits.first_byte, waits.total), self._check_time)

    async def begin(self) -> None:
        """Wait for the first byte of the body, or the end of an answer that has none. Raises `UpstreamError`."""
        while not (self._body_begun or self.complete):
            await self._wait()

    async def read(self) -> bytes:
        """What has come since; nothing at the end. Raises `UpstreamError`."""
        while not self._pieces:
            if self.complete:
                return b""
            self._resume()
            await self._wait()
        pieces, self._pieces, self._num_held = self._pieces, [], 0
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    async def relay(self, write: Callable[[bytes], bool]) -> bool:
        """Give `write` each piece as it comes. True: that was all. False: it said that its reader lags; call again
        when that has caught up. Raises `UpstreamError`."""
        self._sink = write
        if not self._drain_into(write):
            return self.complete
        self._resume()
        if not self.complete:
            await self._wait()
        return self.complete

    def abort(self) -> None:
        """Close now; whatever else the endpoint says is not heard."""
        self._stop_timer()
        self._sink = None
        self.busy = False
        if self._transport is not None:
            self._transport.abort()

    def finish(self) -> None:
        """The answer was read to its end: ready for the next request, if `reusable`."""
        assert self.complete
        self._stop_timer()
        self._sink = None
        self.busy = False
        self._resume()  # its end may have come with so much that reading stopped

    async def _wait(self) -> None:
        if self._error is not None:
            raise self._error
        self._waiter = self._loop.create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None
        if self._error is not None and not self._pieces:
            raise self._error

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    # --- backpressure -------------------------------------------------------------------------------------------

    def _pause(self) -> None:
        if not self._paused and self._transport is not None and not self._transport.is_closing():
            self._paused = True
            self._transport.pause_reading()

    def _resume(self) -> None:
        if self._paused:
            self._paused = False
            self._last_data = self._loop.time()
            if self._transport is not None and not self._transport.is_closing():
                self._transport.resume_reading()

    # --- time ---------------------------------------------------------------------------------------------------

    def _check_time(self) -> None:
        """The one timer of an exchange. It looks at when something came last, so that a piece sets no timer."""
        now, waits = self._loop.time(), self._waits
        if self._paused:
            due = now + waits.idle  # the client is slow, not the endpoint
        elif self._body_begun:
            due = self._last_data + waits.idle
        else:
            due = self._sent_at + waits.first_byte
        total_due = self._sent_at + waits.total
        if now < min(due, total_due):
            self._timer = self._loop.call_at(min(due, total_due), self._check_time)
        elif total_due <= due:
            self.fail(UpstreamTimeout(f"The answer did not end within {waits.total:g} s.", kind="timeout"))
        elif self._body_begun:
            self.fail(UpstreamTimeout(f"Endpoint {self.name} fell silent for {waits.idle:g} s.", kind="timeout"))
        else:
            self.fail(
                UpstreamTimeout(f"Endpoint {self.name} did not answer in {waits.first_byte:g} s.", kind="timeout")
            )

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def fail(self, error: UpstreamError) -> None:
        """End the exchange with `error`, which whoever waits gets."""
        if self._error is None and not self.complete:
            self._error = error
        self._stop_timer()
        if self._transport is not None:
            self._transport.abort()
        self._wake()

    # --- the transport's calls ----------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # uvloop's is no subclass
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        if not self.busy or self._parser is None or self.complete:
            self._fail_garbage("spoke without being asked")
            return
        self.untouched = False
        self._last_data = self._loop.time()
        self._num_bytes += len(data)
        wrong = ""
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade):
            wrong = "did not answer in HTTP"
        else:
            if self._num_bytes - (1 + FRAMING_PER_BODY_BYTE) * self._num_body_bytes > self._limits.max_bytes:
                wrong = f"sent a head or framing of more than {self._limits.max_bytes} bytes"
        self._hand_over()
        if wrong:
            self._fail_garbage(wrong)

    def _hand_over(self) -> None:
        if self._sink is not None:
            if not self._drain_into(self._sink):
                self._pause()
            if self.complete or self._paused:
                self._wake()
        else:
            if self._num_held > HIGH_WATER:
                self._pause()
            if self._pieces or self.complete:
                self._wake()

    def _drain_into(self, write: Callable[[bytes], bool]) -> bool:
        """All that one read brought goes on in one piece: each costs the client's side a system call."""
        pieces = self._pieces
        if not pieces:
            return True
        self._pieces, self._num_held = [], 0
        return write(pieces[0] if len(pieces) == 1 else b"".join(pieces))

    def _fail_garbage(self, what: str) -> None:
        self.reusable = False
        self.fail(UpstreamError(f"Endpoint {self.name} {what}.", kind="garbage"))

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        if self._until_close and exc is None and self._error is None:
            self.complete = True
        elif self._error is None and not self.complete:
            what = "closed the connection before it answered" if self.untouched else "broke off its answer"
            self._error = UpstreamError(f"Endpoint {self.name} {what}.", kind="reset")
        self.reusable = False
        self._lost(self)
        self._wake()

    # --- the parser's callbacks ---------------------------------------------------------------------------------

    def on_message_begin(self) -> None:
        if self.status:
            raise ValueError("an answer to no question")

    def on_header(self, name: bytes, value: bytes) -> None:
        if self.status:
            return  # a trailer
        self._num_head_bytes += len(name) + len(value)
        if len(self.headers) >= self._limits.max_headers or self._num_head_bytes > self._limits.max_bytes:
            raise ValueError("too much of a head")
        if not _NAME.fullmatch(name) or _NO_VALUE.search(value):
            raise ValueError("a header that cannot be passed on")
        self.headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        assert self._parser is not None
        status = self._parser.get_status_code()
        if not 100 <= status <= 599 or status == 101:
            raise ValueError("a status that there is not")
        if status < 200:
            self.headers = []  # an interim answer; the real one follows
            return
        self.status = status
        names = {name for name, _ in self.headers}
        bodiless = status in (204, 304) or self._head_only
        self._until_close = not bodiless and not names & {b"content-length", b"transfer-encoding"}
        if self._head_only:
            self._finish_message(keep=False)  # the parser would wait for a body

    def on_body(self, data: bytes) -> None:
        if self.complete:
            return
        self._num_body_bytes += len(data)
        if not self._body_begun:
            self._body_begun = True
            self._stop_timer()
            self._timer = self._loop.call_later(min(self._waits.idle, self._waits.total), self._check_time)
        self._pieces.append(data)
        self._num_held += len(data)

    def on_message_complete(self) -> None:
        assert self._parser is not None
        if self.status:
            self._finish_message(keep=self._parser.should_keep_alive())

    def _finish_message(self, *, keep: bool) -> None:
        self.complete = True
        self.reusable = keep
