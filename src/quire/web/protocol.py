"""uvicorn's HTTP protocol with what it lacks: bounds on slow clients, on heads, and on connections.

* A request has to be there, head and body, `read_timeout` seconds after its first byte; so has the first request of a
  connection. Otherwise 408, or the end of the connection if an answer has begun.
* What is not body (request line, headers, chunk sizes, trailers) is bounded in bytes and in number of headers: 431.
* An answer that is not read for `write_timeout` seconds ends its connection.
* Over `max_connections` a new connection gets a 503 and is closed.
* At most `max_pipelined` requests wait behind the one that is answered; when a connection ends, all of them are told.
* An HTTP/1.0 client gets a body without a length as it is, up to the connection's end; chunks are not for it.
* A request of HTTP/1.1 names one host (RFC 9112, 3.2): otherwise 400.
* Trailers are no headers, and an upgrade that is offered is not taken (RFC 9110, 6.5.1 and 7.8).
"""

from __future__ import annotations

import asyncio
import weakref
from dataclasses import dataclass
from typing import Any

import httptools
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from quire.core.errors import QuireError, Refusal, RequestError
from quire.web.answers import HeadersTooLarge, RequestTimeout, error_json

FRAMING_PER_BODY_BYTE = 8
"""Chunks of one byte have six bytes of framing; more than this is no body."""


BODY_WRITER = "quire.body_writer"
"""Name of an ASGI extension, whose `writer` is a `BodyWriter`."""


class BodyWriter:
    """Writes pieces of a body that `send` began, without a coroutine and a message for each."""

    __slots__ = ("_cycle",)

    def __init__(self, cycle: RequestResponseCycle) -> None:
        self._cycle = weakref.ref(cycle)  # whose scope knows this

    @property
    def usable(self) -> bool:
        """Once `http.response.start` was sent, for a body whose length was not said."""
        cycle = self._cycle()
        return cycle is not None and cycle.response_started and bool(cycle.chunked_encoding)

    def write(self, data: bytes) -> bool:
        """`data` is not empty. False: the client lags behind; `send` waits for it, with an empty piece too."""
        cycle = self._cycle()
        if cycle is None or cycle.disconnected or cycle.response_complete:
            return True
        cycle.transport.write(b"%x\r\n%b\r\n" % (len(data), data))
        return not cycle.flow.write_paused


def _without_chunks(app: ASGIApp, cycle: RequestResponseCycle) -> ASGIApp:
    """`app` for a client of HTTP/1.0, whose connection ends with the answer anyhow."""
    cycle.waiting_for_100_continue = False

    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        until_the_end = False

        async def send_plainly(message: Message) -> None:
            nonlocal until_the_end
            if message["type"] == "http.response.start":
                until_the_end = all(name.lower() != b"content-length" for name, _ in message.get("headers", ()))
                cycle.chunked_encoding = False if until_the_end else None
            elif until_the_end:
                cycle.expected_content_length = len(message.get("body", b""))
            await send(message)

        await app(scope, receive, send_plainly)

    return answer


@dataclass(frozen=True, slots=True, kw_only=True)
class ConnectionLimits:
    read_timeout: float
    write_timeout: float
    max_connections: int
    max_head_bytes: int = 64 * 1024
    max_headers: int = 128
    max_pipelined: int = 128


class GuardedProtocol(HttpToolsProtocol):
    """Made by uvicorn once per connection."""

    def __init__(self, *args: Any, limits: ConnectionLimits, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.url = b""  # of the request that is being read; uvicorn has none before the first
        self._limits = limits
        self._read_timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None
        self._in_message = False
        self._in_head = False
        self._num_bytes = 0
        self._num_body_bytes = 0
        self._num_fields = 0
        self._fault: QuireError = RequestError("This is not a valid HTTP request.")
        self._refused = False
        self._answering: RequestResponseCycle | None = None
        """`cycle` is the newest one: with pipelining another may still be answered."""

    # --- connection ---------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as in uvicorn
        super().connection_made(transport)
        self._arm_read_timer()
        if len(self.connections) > self._limits.max_connections:
            self._refuse(Refusal("There are too many connections.", remedy="Try again later.", retry_after=1.0))

    def connection_lost(self, exc: Exception | None) -> None:
        self._disarm_read_timer()
        self.resume_writing()
        for cycle in (self._answering, *(waiting for waiting, _ in self.pipeline)):
            if cycle is not None and not cycle.response_complete:
                cycle.disconnected = True
                cycle.message_event.set()
        self.pipeline.clear()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._refused:
            return
        self._num_bytes += len(data)
        self._unset_keepalive_if_required()
        try:
            self._parse(data)
        except httptools.HttpParserError:
            self._refuse(self._fault)
            return
        framing = self._num_bytes - (1 + FRAMING_PER_BODY_BYTE) * self._num_body_bytes
        if self._in_message and framing > self._limits.max_head_bytes:
            self._refuse(self._head_too_large())
        if not self._in_message and self._is_idle():
            self._arm_read_timer()  # bytes that begin no request do not keep a connection alive

    def _parse(self, data: bytes) -> None:
        while True:
            try:
                self.parser.feed_data(data)
                return
            except httptools.HttpParserUpgrade as upgrade:
                data = self._without_upgrade() + data[upgrade.args[0] :]
                self.parser = httptools.HttpRequestParser(self)

    def _without_upgrade(self) -> bytes:
        """The head as it would be without the offer. The parser takes what follows one that has it for the other
        protocol, also where it is the request's body, as clients send it that offer h2c with a POST."""
        version = self.parser.get_http_version().encode()
        lines = [b"%b %b HTTP/%b\r\n" % (self.parser.get_method(), self.url, version)]
        lines += [b"%b: %b\r\n" % header for header in self.headers if header[0] != b"upgrade"]
        return b"".join(lines) + b"\r\n"

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: ASGIApp) -> None:  # type: ignore[override]
        self._answering = cycle
        if cycle.scope["http_version"] == "1.0":
            app = _without_chunks(app, cycle)
        super()._start_asgi_task(cycle, app)  # type: ignore[arg-type]  # uvicorn's types for the same

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.pipeline:
            self.flow.pause_reading()  # uvicorn reads on after each answer, however many wait

    def _is_idle(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    # --- the parser's callbacks ---------------------------------------------------------------------------------

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_message = self._in_head = True
        self._num_bytes = self._num_body_bytes = self._num_fields = 0
        self._disarm_read_timer()
        self._arm_read_timer()

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._in_head:
            super().on_header(name, value)
        self._num_fields += 1
        if self._num_fields > self._limits.max_headers:
            self._fault = self._head_too_large()
            raise self._fault

    def on_headers_complete(self) -> None:
        self._in_head = False
        if self.parser.should_upgrade():
            if self.parser.get_method() == b"CONNECT":
                raise self._fault
            return  # comes again, without
        if len(self.pipeline) >= self._limits.max_pipelined:
            raise self._fault
        num_hosts = sum(name == b"host" for name, _ in self.headers)
        if num_hosts > 1 or (num_hosts == 0 and self.parser.get_http_version() == "1.1"):
            self._fault = RequestError(
                f"The request has {num_hosts} Host headers.", param="host", remedy="Send exactly one."
            )
            raise self._fault
        super().on_headers_complete()
        self.scope["extensions"] = {BODY_WRITER: {"writer": BodyWriter(self.cycle)}}

    def on_body(self, body: bytes) -> None:
        self._num_body_bytes += len(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        if self.parser.should_upgrade():
            return
        self._in_message = False
        self._disarm_read_timer()
        super().on_message_complete()

    # --- too slow -----------------------------------------------------------------------------------------------

    def _arm_read_timer(self) -> None:
        if self._read_timer is None:
            self._read_timer = self.loop.call_later(self._limits.read_timeout, self._read_timed_out)

    def _disarm_read_timer(self) -> None:
        if self._read_timer is not None:
            self._read_timer.cancel()
            self._read_timer = None

    def _read_timed_out(self) -> None:
        self._read_timer = None
        behind_another = bool(self.pipeline) or (self._in_head and not self._is_idle())
        if behind_another:
            self._arm_read_timer()  # a pipelined request; the one before it is still being answered
        elif self._in_message and not self._in_head and self.cycle.response_started:
            self.transport.abort()
        else:
            seconds = self._limits.read_timeout
            self._refuse(RequestTimeout(f"The request did not arrive within {seconds:g} s."))

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._write_timer is None:
            self._write_timer = self.loop.call_later(self._limits.write_timeout, self.transport.abort)

    def resume_writing(self) -> None:
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None
        super().resume_writing()

    # --- refusing -----------------------------------------------------------------------------------------------

    def _head_too_large(self) -> QuireError:
        return HeadersTooLarge(
            f"The request's head has more than {self._limits.max_headers} headers "
            f"or {self._limits.max_head_bytes} bytes.",
            remedy="Send fewer or shorter headers.",
        )

    def _refuse(self, error: QuireError) -> None:
        """Answer below ASGI, and close."""
        if self._refused or self.transport.is_closing():
            return
        self._refused = True
        self._disarm_read_timer()
        if self.cycle is not None and not self.cycle.response_complete:
            if self.cycle.response_started or self.cycle is not self._answering:
                self.transport.abort()
                return
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        path = self.url.partition(b"?")[0].decode("latin-1")  # as far as it was read
        body = error_json(error, path)
        head = [STATUS_LINE[error.status], b"content-type: application/json\r\nconnection: close\r\n"]
        if error.retry_after is not None:
            head.append(b"retry-after: %d\r\n" % max(1, round(error.retry_after)))
        head.append(b"content-length: %d\r\n\r\n" % len(body))
        self.transport.write(b"".join(head) + body)
        self.transport.close()
