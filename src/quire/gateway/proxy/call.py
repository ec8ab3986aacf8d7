"""One client's call while it is answered: what goes to the endpoint, and how its answer comes back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Final

from starlette.types import Scope, Send

from quire.core.errors import QuireError
from quire.gateway.endpoint import Endpoint
from quire.gateway.errors import UpstreamError
from quire.gateway.parse import with_model
from quire.gateway.plugin import Conclusion
from quire.gateway.proxy.answers import broken_stream
from quire.gateway.proxy.events import WholeEvents
from quire.gateway.proxy.headers import answer_headers, request_head
from quire.gateway.proxy.holding import Holding, Share
from quire.gateway.proxy.upstream import Connection
from quire.gateway.proxy.usage import Usage
from quire.gateway.request import Api, InferenceRequest
from quire.web.protocol import BODY_WRITER, BodyWriter

LARGE: Final = 64 * 1024
"""Bytes of an answer, above which it counts as held until its client has taken most of it."""


@dataclass(slots=True)
class Call:
    request: InferenceRequest
    scope: Scope
    send: Send
    deadline: float
    """By the gateway's clock; the answer has to be whole by then."""
    holding: Holding
    own_headers: Mapping[str, str] = field(default_factory=dict)
    """What plugins add to the answer."""
    started: bool = False
    """Something of an answer has gone to the client; from here on nothing can be tried again."""
    status: int = 0
    """Sent to the client."""
    in_stream: bool = False
    events: WholeEvents = field(default_factory=WholeEvents)
    """The answer is a stream of events, and its last one has not been sent."""
    tried: frozenset[str] = frozenset()
    """Keys of the endpoints where it was, or is, attempted."""
    tap: Callable[[bytes], None] | None = None
    """Is given what the answer's body is made of, too."""
    _body: bytes = field(init=False, default=b"")
    _body_model: str = field(init=False, default="")

    @property
    def repeatable(self) -> bool:
        """Whether doing it twice does no more than doing it once."""
        return self.request.api is not Api.OTHER or self.scope["method"] in ("GET", "HEAD", "OPTIONS")

    def message(self, endpoint: Endpoint, conclusion: Conclusion) -> bytes:
        """What is sent to the endpoint, head and body."""
        scope, body = self.scope, self._body_for(self.request.target_model)
        target = scope.get("raw_path") or scope["path"].encode()
        if scope["query_string"]:
            target += b"?" + scope["query_string"]
        own = {"x-request-id": self.request.id, **conclusion.headers}
        return request_head((scope["method"], target), scope["headers"], endpoint, own, len(body)) + body

    def _body_for(self, model: str) -> bytes:
        request = self.request
        was_read = request.model or request.api is not Api.OTHER  # else it may be no JSON
        if not was_read or not model or model == request.model:
            return request.body
        if model != self._body_model:
            self._body, self._body_model = with_model(request.body, model), model
        return self._body

    async def deliver(self, answer: Connection, endpoint: Endpoint, usage: Usage, max_buffered: int) -> None:
        """Pass an answer on: a stream as it comes, anything else when it is whole (up to `max_buffered` bytes)."""
        headers = answer_headers(answer.headers, endpoint, self.request.id)
        headers += [(name.lower().encode(), value.encode("latin-1")) for name, value in self.own_headers.items()]
        said = dict(headers)
        packed = b"content-encoding" in said
        if said.get(b"content-type", b"").startswith(b"text/event-stream") and not packed:
            await self._stream(answer, headers, usage)
            return
        length_said = any(name == b"content-length" for name, _ in answer.headers)
        if self.request.stream or (self.request.api is Api.OTHER and not length_said and not answer.complete):
            await self._pass_on(answer, headers, b"", usage)  # speech and the like
            return
        share = Share(self.holding)
        try:
            body, whole = await _hold(answer, share, max_buffered)
            if not whole:
                share.release()
                await self._pass_on(answer, headers, body, usage)
                return
            usage.whole(body)
            await self._send_whole(answer, headers, body)
        finally:
            share.release()

    async def _send_whole(self, answer: Connection, headers: list[tuple[bytes, bytes]], body: bytes) -> None:
        length: bytes | None = b"%d" % len(body)
        if answer.status in (204, 304):
            length = None
        elif self.scope["method"] == "HEAD":  # of the answer that GET would get, where that is known
            length = next((value for name, value in answer.headers if name == b"content-length"), None)
        if length is not None:
            headers.append((b"content-length", length))
        await self._start(answer.status, headers)
        if len(body) > LARGE:
            await self.send({"type": "http.response.body", "body": body, "more_body": True})
            body = b""  # sent, or held by the server in front: the end waits for the client
        await self.send({"type": "http.response.body", "body": body})

    async def _start(self, status: int, headers: list[tuple[bytes, bytes]]) -> None:
        self.started, self.status = True, status
        await self.send({"type": "http.response.start", "status": status, "headers": headers})

    async def _stream(self, answer: Connection, headers: list[tuple[bytes, bytes]], usage: Usage) -> None:
        await self._start(answer.status, headers)
        self.in_stream = True
        try:
            await self._relay(answer, usage, self.events)
        except UpstreamError as error:
            await self.end_stream(error)
            raise
        finally:
            usage.end()
        self.in_stream = False
        await self.send({"type": "http.response.body", "body": self.events.rest()})

    async def end_stream(self, error: QuireError) -> None:
        """Tell the error as the last event of a stream that cannot go on; nothing where there is none."""
        if self.in_stream:
            self.in_stream = False
            last = self.events.close() + broken_stream(error, self.request.api)
            await self.send({"type": "http.response.body", "body": last})

    async def _relay(self, answer: Connection, usage: Usage, events: WholeEvents) -> None:
        """Pass on what comes as whole events; the rest, behind the last of them, stays there."""
        writer: BodyWriter | None = self.scope.get("extensions", {}).get(BODY_WRITER, {}).get("writer")
        if writer is None or not writer.usable:
            while piece := await answer.read():
                usage.see(piece)
                if whole := events.add(piece):
                    await self.send({"type": "http.response.body", "body": whole, "more_body": True})
            return
        write, see, add = writer.write, usage.see, events.add

        def pass_on(piece: bytes) -> bool:
            see(piece)
            whole = add(piece)
            return write(whole) if whole else True

        while not await answer.relay(pass_on):
            await self.send({"type": "http.response.body", "body": b"", "more_body": True})  # waits for the client

    async def _pass_on(
        self, answer: Connection, headers: list[tuple[bytes, bytes]], begun: bytes, usage: Usage
    ) -> None:
        """An answer that is not held until it is whole. If it breaks off so does ours, which the client sees by its
        framing."""
        await self._start(answer.status, headers)
        await self.send({"type": "http.response.body", "body": begun, "more_body": True})
        usage.see(begun)
        while piece := await answer.read():
            usage.see(piece)
            await self.send({"type": "http.response.body", "body": piece, "more_body": True})
        usage.end()
        await self.send({"type": "http.response.body", "body": b""})


async def _hold(answer: Connection, share: Share, most: int) -> tuple[bytes, bool]:
    """What came of an answer, and whether that is all of it; it is not where there is no room for more."""
    pieces: list[bytes] = []
    while piece := await answer.read():
        pieces.append(piece)
        if share.size + len(piece) > most or not share.take(len(piece)):
            return b"".join(pieces), False
    return b"".join(pieces), True
