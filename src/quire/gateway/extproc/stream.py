"""One request of Envoy's: a stream of messages, each answered in turn.

The body is needed before an endpoint can be chosen. Envoy holds it back (BUFFERED) or sends it in pieces and waits for
them to come back (FULL_DUPLEX_STREAMED); it says which in its first message. Where trailers follow a body, its last
message does not say that it is the last.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field

from envoy.extensions.filters.http.ext_proc.v3 import processing_mode_pb2

from quire.core.errors import QuireError, RequestError, RequestTooLarge
from quire.gateway.director import Attempt, Director
from quire.gateway.errors import Saturated
from quire.gateway.extproc import messages
from quire.gateway.extproc.messages import Message, Response
from quire.gateway.proxy.holding import Holding, Share
from quire.gateway.request import InferenceRequest, Outcome

DUPLEX = processing_mode_pb2.ProcessingMode.FULL_DUPLEX_STREAMED
BUFFERED = processing_mode_pb2.ProcessingMode.BUFFERED


@dataclass(frozen=True, slots=True, kw_only=True)
class Door:
    """What every stream needs."""

    director: Director
    read: Callable[[str, Mapping[str, str], bytes], InferenceRequest]
    """Path with query, headers, body. Raises `QuireError`."""
    rewritten: Callable[[InferenceRequest], bytes | None]
    """The body that asks for the target's model; None where it stays."""
    usage: Callable[[bytes], tuple[int | None, int | None]]
    """Output and cached tokens, of the end of an answer's body."""
    max_body_bytes: int
    holding: Holding
    """For the bodies of all streams."""


@dataclass(slots=True, eq=False)
class ExchangeStream:
    """The messages of one request, and what the director was told of it. Made where a loop runs."""

    door: Door
    headers: dict[str, str] = field(default_factory=dict)
    subset: frozenset[str] | None = None
    body: bytearray = field(default_factory=bytearray)
    request_whole: bool = False
    """The request's body comes in one message."""
    request_duplex: bool = False
    response_duplex: bool = False
    request: InferenceRequest | None = None
    attempt: Attempt | None = None
    status: int | None = None
    tail: bytes = b""
    """The last bytes of the answer, where usage stands."""
    ended: bool = False
    share: Share = field(init=False)
    broken_off: asyncio.Future[QuireError] = field(init=False)

    def __post_init__(self) -> None:
        self.share = Share(self.door.holding)
        self.broken_off = asyncio.get_running_loop().create_future()

    def break_off(self, error: QuireError) -> None:
        """End the stream as soon as no message is being answered. Envoy answers the request with the error, and where
        an answer has begun it resets it: what it lets us say then is no part of that answer."""
        if not self.broken_off.done():
            self.broken_off.set_result(error)

    async def next_of(self, messages: AsyncIterator[Message]) -> Message | None:
        """None behind the last. Raises what the stream was broken off with."""
        reading = asyncio.ensure_future(anext(messages, None))
        try:
            await asyncio.wait((reading, self.broken_off), return_when=asyncio.FIRST_COMPLETED)
            if self.broken_off.done():
                raise self.broken_off.result()
            return reading.result()
        finally:
            reading.cancel()

    async def answer(self, message: Message) -> AsyncIterator[Response]:
        """What one message of Envoy's is answered with."""
        if message.HasField("protocol_config"):
            self.request_duplex = message.protocol_config.request_body_mode == DUPLEX
            self.request_whole = message.protocol_config.request_body_mode == BUFFERED
            self.response_duplex = message.protocol_config.response_body_mode == DUPLEX
        kind = message.WhichOneof("request")
        if kind == "request_headers":
            self.headers = messages.headers_of(message)
            self.subset = messages.subset_of(message)
            if message.request_headers.end_of_stream:
                yield await self._choose(buffered=False)
            elif not self.request_duplex:
                yield messages.request_headers()  # the choice goes out with the body's answer
        elif kind == "request_body":
            end = message.request_body.end_of_stream or self.request_whole
            async for response in self._take_body(message.request_body.body, end):
                yield response
        elif kind == "response_headers":
            yield self._begin(message)
        elif kind == "response_body":
            for response in self._pass_on(message.response_body.body, message.response_body.end_of_stream):
                yield response
        elif kind == "request_trailers":
            if self.request is None and self.request_duplex:
                async for response in self._choose_and_return(end=False):
                    yield response
            yield messages.trailers(response=False)
        elif kind == "response_trailers":
            self.ended = True
            yield messages.trailers(response=True)

    async def _take_body(self, piece: bytes, end: bool) -> AsyncIterator[Response]:
        if len(self.body) + len(piece) > self.door.max_body_bytes:
            raise RequestTooLarge(
                f"The body is larger than {self.door.max_body_bytes} bytes.", remedy="Send less, or raise the bound."
            )
        if not self.share.take(len(piece)):
            raise Saturated("The gateway holds as much as it may.", remedy="Try again later.", retry_after=1.0)
        self.body += piece
        if end and self.request_duplex:
            async for response in self._choose_and_return(end=True):
                yield response
        elif end:
            yield await self._choose(buffered=True)
        elif not self.request_duplex:
            yield messages.request_body(None, None)

    async def _choose_and_return(self, *, end: bool) -> AsyncIterator[Response]:
        """For a duplex stream: the choice, then the body."""
        yield await self._choose(buffered=False)
        assert self.request is not None
        body = self.door.rewritten(self.request)
        for response in messages.streamed(bytes(self.body) if body is None else body, end=end, response=False):
            yield response

    async def _choose(self, *, buffered: bool) -> Response:
        if self.request is not None:
            raise RequestError("The request's body goes on behind its end.", remedy="Send one body.")
        path = self.headers.get(":path", "/")
        request = self.door.read(path, self.headers, bytes(self.body))
        request.subset = self.subset if self.subset is not None else request.subset
        choice = await self.door.director.choose(request)
        self.request = request  # from here on, `close` gives its place back
        request.break_off = self.break_off
        self.attempt = self.door.director.sent(request, choice.endpoint, choice)
        addresses = [endpoint.address for endpoint in choice.conclusion.endpoints]
        body = self.door.rewritten(request)
        mutation = messages.chosen_headers(addresses, choice.conclusion.headers, body)
        response = messages.request_body(mutation, body) if buffered else messages.request_headers(mutation)
        return messages.with_destination(response, addresses)

    def _begin(self, message: Message) -> Response:
        for header in message.response_headers.headers.headers:
            if header.key == ":status":
                text = header.raw_value.decode("latin-1") if header.raw_value else header.value
                self.status = int(text) if text.isdecimal() else None
        if message.response_headers.end_of_stream:
            self.ended = True
        served = {} if self.attempt is None else {messages.SERVED: self.attempt.endpoint.address}
        return messages.response_headers(served)

    def _pass_on(self, piece: bytes, end: bool) -> list[Response]:
        if self.request is not None and self.attempt is not None and piece and (self.status or 200) < 400:
            self.door.director.first_byte(self.request, self.attempt)
        self.tail = (self.tail + piece)[-4096:]
        self.ended = self.ended or end
        return messages.streamed(piece, end=end, response=True) if self.response_duplex else [messages.response_body()]

    def refuse(self, error: QuireError) -> Response:
        return messages.refused(error, self.headers.get(":path", "/").partition("?")[0])

    def close(self) -> None:
        """The stream is over, however it went. What was chosen is given back, once."""
        self.share.release()
        request, self.request = self.request, None
        if request is None:
            return
        request.break_off = None
        try:
            if self.attempt is not None:
                self.door.director.finished(request, self.attempt, self._outcome(self.attempt))
        finally:
            self.door.director.abandon(request)

    def _outcome(self, attempt: Attempt) -> Outcome:
        output, cached = self.door.usage(self.tail)
        gone = self.status is not None or self.broken_off.done()
        return Outcome(
            status=self.status,
            error="" if self.ended else "cancelled" if gone else "no answer",
            first_byte=attempt.first_byte,
            finished=self.door.director.clock(),
            output_tokens=output,
            cached_tokens=cached,
        )
