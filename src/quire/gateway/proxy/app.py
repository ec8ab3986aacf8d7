"""The gateway as an ASGI application: its own routes, and everything else passed on."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

import aiohttp
import msgspec
import structlog
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route, Router
from starlette.types import Receive, Scope, Send

from quire.core.errors import Cancelled, Draining, QuireError, RequestTooLarge
from quire.gateway.director import Director
from quire.gateway.errors import Saturated
from quire.gateway.parse import api_of, parse
from quire.gateway.proxy.answers import error_answer
from quire.gateway.proxy.call import Call
from quire.gateway.proxy.connections import Connections
from quire.gateway.proxy.forward import Forwarder
from quire.gateway.proxy.holding import Holding, Share
from quire.gateway.proxy.settings import ProxySettings
from quire.gateway.request import Api, InferenceRequest
from quire.gateway.resilience.budget import Budget
from quire.gateway.resilience.checks import Checks
from quire.gateway.resilience.guard import Guard
from quire.gateway.resilience.hedge import Hedging
from quire.web.answers import for_status, json_response
from quire.web.limits import request_id_of
from quire.wire.openai import Model, ModelList

LAST_WORDS = 1.0
"""Seconds to tell clients that the gateway stops."""
Hook = Callable[[InferenceRequest], Awaitable[None] | None]
"""Looks at a request before it is admitted, and may write `tenant`; raises `QuireError` to refuse it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    """What became of a call, for counting."""

    api: Api
    request: InferenceRequest | None
    """None if it could not be read."""
    status: int
    """Sent to the client; 0 if it left before."""
    error: str
    """Code of our error, also of one that ended a stream; empty if there was none."""
    seconds: float
    """From its arrival."""
    tries: int
    """Endpoints that were asked."""


def count_nothing(_: Finished) -> None:
    return


@dataclass(slots=True, kw_only=True)
class Proxy:
    """Everything that is not one of the gateway's own routes."""

    director: Director
    forwarder: Forwarder
    settings: ProxySettings
    holding: Holding
    hooks: Sequence[Hook] = ()
    count: Callable[[Finished], None] = count_nothing
    draining: bool = False
    num_open: int = 0
    _none_open: asyncio.Event = field(default_factory=asyncio.Event)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Whatever goes wrong becomes an answer, as long as none has begun."""
        api, request_id = api_of(scope["path"]), request_id_of(scope).decode()
        call: Call | None = None
        share = Share(self.holding)
        status, failure = 0, ""
        self.num_open += 1
        arrived = self.director.clock()
        try:
            if self.draining:
                raise Draining("The gateway is stopping.", remedy="Try again elsewhere.", retry_after=1.0)
            body = await self._read(scope, receive, share)
            trust = self.settings.trust_subset
            request = parse(request_id, scope["path"], scope["headers"], body, arrived, trust_subset=trust)
            call = Call(request, scope, send, arrived + self.settings.total_timeout, self.holding)
            await self._answer(call, receive)
        except Cancelled as left:
            failure = left.code
        except Exception as error:
            failure = error.code if isinstance(error, QuireError) else QuireError.code
            if call is not None and call.started:
                structlog.get_logger().warning("answer_broken_off", request_id=request_id, error=str(error))
                return
            if not isinstance(error, QuireError):
                structlog.get_logger().error("proxy_failed", request_id=request_id, exc_info=error)
                error = QuireError("Something went wrong in the gateway.", remedy="See its log.")
            status = error.status
            await error_answer(error, scope["path"], request_id)(scope, receive, send)
        finally:
            self._count(api, call, status, failure, self.director.clock() - arrived)
            share.release()
            self.num_open -= 1
            if not self.num_open:
                self._none_open.set()

    def _count(self, api: Api, call: Call | None, status: int, error: str, seconds: float) -> None:
        request = None if call is None else call.request
        tries = 0 if call is None else len(call.tried)
        status = status if call is None or not call.started else call.status
        self.count(Finished(api=api, request=request, status=status, error=error, seconds=seconds, tries=tries))

    async def drain(self, timeout: float) -> None:
        """Refuse new requests, and wait for those that are open, `timeout` seconds at most."""
        self.draining = True
        self._none_open.clear()
        if self.num_open:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._none_open.wait(), timeout)

    async def _read(self, scope: Scope, receive: Receive, share: Share) -> bytes:
        most = self.settings.max_body
        for name, value in scope["headers"]:
            if name == b"content-length" and (not value.isdigit() or int(value[:20]) > most):
                raise _too_large(most)
        pieces: list[bytes] = []
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise Cancelled("The client went away.")
            pieces.append(message.get("body", b""))
            if share.size + len(pieces[-1]) > most:
                raise _too_large(most)
            if not share.take(len(pieces[-1])):
                raise Saturated("The gateway holds as much as it may.", remedy="Try again later.", retry_after=1.0)
            if not message.get("more_body", False):
                return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    async def _answer(self, call: Call, receive: Receive) -> None:
        """Forward the call. If its client goes away meanwhile, or it has to give way to others, everything about it is
        cancelled at once."""
        answering = asyncio.current_task()
        assert answering is not None
        leaving = asyncio.ensure_future(receive())  # the body was read: nothing else can come
        end: QuireError | None = None

        def end_with(error: QuireError) -> None:
            nonlocal end
            if end is None:  # cancelled once, it must be left to clean up
                end = error
                answering.cancel()

        def left(_: object) -> None:
            end_with(Cancelled("The client went away."))

        leaving.add_done_callback(left)
        call.request.break_off = end_with
        try:
            for hook in self.hooks:
                pending = hook(call.request)
                if pending is not None:
                    await pending
            await self.forwarder.forward(call)
        except asyncio.CancelledError:
            if end is None:
                raise
            answering.uncancel()
            if not isinstance(end, Cancelled):
                await call.end_stream(end)
            raise end from None
        finally:
            call.request.break_off = None
            leaving.remove_done_callback(left)
            leaving.cancel()


def _too_large(most: int) -> RequestTooLarge:
    return RequestTooLarge(f"The body is larger than {most} bytes.", remedy="Send less, or raise --max-body-bytes.")


class OwnRoutes:
    """What the gateway says of itself."""

    def __init__(self, proxy: Proxy, started: int) -> None:
        self._proxy = proxy
        self._pool = proxy.director.pool
        self._started = started

    async def health(self, _: Request) -> Response:
        """200 as long as this process answers, whatever the endpoints do."""
        return Response(b'{"status":"ok"}', media_type="application/json")

    async def ready(self, _: Request) -> Response:
        """200 when a request sent now would find an endpoint."""
        usable = sum(endpoint.available and not endpoint.draining for endpoint in self._pool.all)
        status = "draining" if self._proxy.draining else "ok" if usable else "no_endpoints"
        body = {"status": status, "endpoints": len(self._pool), "usable_endpoints": usable}
        ready = status == "ok"
        return Response(
            msgspec.json.encode(body),
            200 if ready else 503,
            None if ready else {"retry-after": "1"},
            media_type="application/json",
        )

    async def models(self, _: Request) -> Response:
        """What any endpoint that can be used answers to."""
        names = {name for endpoint in self._pool.all if endpoint.available for name in endpoint.models or ()}
        return json_response(ModelList(data=[Model(id=name, created=self._started) for name in sorted(names)]))


@dataclass(slots=True, kw_only=True)
class Gateway:
    """The ASGI application, and what is started and stopped with it."""

    proxy: Proxy
    connections: Connections
    guard: Guard
    settings: ProxySettings
    router: Router
    refuse_waiting: Callable[[], None] = lambda: None
    """Ends the requests that wait in flow control, with an error, when the time to drain is over."""
    _checks: Checks | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        if api_of(scope["path"]) is not Api.OTHER:  # most calls; the router would try each route
            await self.proxy(scope, receive, send)
            return
        scope["app"] = self  # tells Starlette's routes to raise their 405 rather than to answer it
        try:
            await self.router(scope, receive, send)
        except HTTPException as error:
            ours = for_status(error.status_code, scope["path"][:200])
            answer = error_answer(ours, scope["path"], request_id_of(scope).decode())
            answer.headers.update(error.headers or {})  # Allow, which a 405 has to have
            await answer(scope, receive, send)

    def start(self, http: aiohttp.ClientSession) -> None:
        """Begin to look at the endpoints' health and models, over `http`."""
        self._checks = Checks(pool=self.guard.pool, guard=self.guard, http=http, settings=self.settings.resilience)
        self._checks.start()

    async def drain(self, timeout: float) -> None:
        """Refuse new requests, and wait for those that are open, `timeout` seconds at most. Those that are left then
        end with an error that says so."""
        await self.proxy.drain(timeout)
        self.refuse_waiting()
        self.connections.close()
        await self.proxy.drain(LAST_WORDS)

    async def stop(self) -> None:
        if self._checks is not None:
            await self._checks.stop()
        self.connections.close()


def build_app(
    director: Director,
    settings: ProxySettings | None = None,
    *,
    hooks: Sequence[Hook] = (),
    routes: Sequence[BaseRoute] = (),
    count: Callable[[Finished], None] = count_nothing,
) -> Gateway:
    """`hooks` are called before the director (authenticate, then admit); `routes` are the gateway's own beside those
    that it always has: /metrics, /explain; `count` is told of each call that is over. Adds a `Guard` to the director's
    observers."""
    settings = settings or ProxySettings()
    resilience = settings.resilience
    connections = Connections(settings)
    director.pool.watch(lambda _: None, connections.forget)
    guard = Guard(pool=director.pool, clock=director.clock, settings=resilience)
    director.observers = (*director.observers, guard)
    forwarder = Forwarder(
        director=director,
        connections=connections,
        settings=settings,
        retries=Budget(share=resilience.retry_share, burst=resilience.retry_burst),
        hedging=Hedging(resilience),
    )
    proxy = Proxy(
        director=director,
        forwarder=forwarder,
        settings=settings,
        hooks=hooks,
        count=count,
        holding=Holding(settings.max_held),
    )
    own = OwnRoutes(proxy, int(time.time()))
    table = [
        Route("/health", own.health, methods=["GET"]),
        Route("/ready", own.ready, methods=["GET"]),
        Route("/v1/models", own.models, methods=["GET"]),
        *routes,
    ]
    router = Router(table, redirect_slashes=False, default=proxy)
    return Gateway(proxy=proxy, connections=connections, guard=guard, settings=settings, router=router)
