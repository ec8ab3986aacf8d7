"""One gateway from start to end: wire the parts, serve, drain, stop."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import sys
from collections.abc import Callable
from contextlib import AsyncExitStack

import aiohttp
import structlog
import zmq.asyncio
from starlette.types import ASGIApp

from quire.config.gateway import GatewayConfig
from quire.core.errors import ConfigError
from quire.gateway.endpoint import Pool
from quire.gateway.parts import Parts, make_parts, proxy_settings, shadow_of
from quire.gateway.proxy.app import Finished, Gateway, build_app
from quire.gateway.proxy.mirror import Mirrors
from quire.gateway.routes import own_routes
from quire.web.auth import ApiKey
from quire.web.server import Server, StopOrders, allow_open_files, bind, url, uvicorn_config

FIRST_LOOKS = 2.0


def to_stdout(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


async def run(
    config: GatewayConfig, *, orders: StopOrders | None = None, announce: Callable[[str], None] = to_stdout
) -> int:
    """Serve until told to stop; the exit code. Raises `ConfigError` for what the operator has to mend."""
    if orders is None:
        orders = StopOrders()
        orders.listen(asyncio.get_running_loop())
    allow_open_files(4 * config.max_connections + 256)
    async with AsyncExitStack() as stack:
        context = zmq.asyncio.Context()
        stack.callback(context.destroy, linger=0)
        session = await stack.enter_async_context(open_session())
        parts = make_parts(config, session, context)
        gateway = build_gateway(parts)
        listener = stack.enter_context(bind(config))
        stack.push_async_callback(parts.stop)
        await parts.start()
        stack.push_async_callback(gateway.stop)
        gateway.start(session)
        await _first_looks(parts.pool)
        following = asyncio.create_task(parts.policy.follow())
        stack.callback(following.cancel)
        if config.extproc_port is not None:
            await stack.enter_async_context(ExtProc(config, parts))
        app: ASGIApp = gateway if config.api_key is None else ApiKey(gateway, config.api_key)
        server = Server(uvicorn_config(app, config))
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        await server.listening.wait()
        gc.collect()
        gc.freeze()  # what is there now stays: looking through it for garbage stops everything for 20 ms and more
        announce(f"quire gateway at {url(config, listener)}")
        draining = asyncio.create_task(orders.drain.wait())
        await asyncio.wait({draining, serving}, return_when=asyncio.FIRST_COMPLETED)
        structlog.get_logger().info("stopping", open_requests=gateway.proxy.num_open)
        drained = asyncio.create_task(gateway.drain(config.shutdown_timeout))
        hurrying = asyncio.create_task(orders.now.wait())
        await asyncio.wait({drained, hurrying, serving}, return_when=asyncio.FIRST_COMPLETED)
        server.should_exit = True
        server.force_exit = orders.now.is_set()
        await serving
        for task in (draining, drained, hurrying):
            task.cancel()
        await asyncio.gather(draining, drained, hurrying, return_exceptions=True)
    return 0


async def _first_looks(pool: Pool) -> None:
    """Until every endpoint has said which models it has, so that the first client finds them; not for long."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(FIRST_LOOKS):
            while any(endpoint.models is None for endpoint in pool.all):
                await asyncio.sleep(0.02)


def open_session() -> aiohttp.ClientSession:
    """For metrics, health and tokens: no cookies, no proxies of the environment; requests themselves go another way."""
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, limit_per_host=8), cookie_jar=aiohttp.DummyCookieJar(), trust_env=False
    )


def build_gateway(parts: Parts) -> Gateway:
    gateway = build_app(
        parts.director,
        proxy_settings(parts.config),
        hooks=[parts.apply_traffic],
        routes=own_routes(parts),
        count=_counting(parts),
    )
    mirrors = Mirrors(forwarder=gateway.proxy.forwarder, shadow=parts.shadow, shadowed=shadow_of)
    gateway.proxy.forwarder.mirror = mirrors.begin
    if parts.flow is not None:
        gateway.refuse_waiting = parts.flow.close
    parts.policy.changed = parts.policy_changed
    return gateway


def _counting(parts: Parts) -> Callable[[Finished], None]:
    def count(finished: Finished) -> None:
        parts.metrics.http_request(finished.api.value, finished.status)
        if finished.request is not None:
            parts.metrics.arrived(finished.request)
            if finished.error:
                parts.explainer.dropped(finished.request, finished.error)
        if finished.error:
            parts.metrics.turned_away(finished.error)
        for _ in range(finished.tries - 1):
            parts.metrics.retried()

    return count


class ExtProc:
    """The door for Envoy, open while its context is."""

    def __init__(self, config: GatewayConfig, parts: Parts) -> None:
        try:
            from quire.gateway.extproc.door import make_door
            from quire.gateway.extproc.server import ExtProcServer
        except ImportError as error:
            raise ConfigError(
                f"The external processing door lacks {error.name}.",
                param="extproc_port",
                remedy="Install quire-llm[envoy].",
            ) from error
        assert config.extproc_port is not None
        door = make_door(parts.director, hooks=[parts.apply_traffic], max_body_bytes=config.max_body_bytes)
        self._server = ExtProcServer(door, config.host, config.extproc_port, max_streams=config.extproc_max_streams)
        self._grace = config.shutdown_timeout

    async def __aenter__(self) -> ExtProc:
        await self._server.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._server.stop(self._grace)
