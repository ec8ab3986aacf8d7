"""Looks at real servers: their health and their models."""

from __future__ import annotations

import asyncio
import time

import aiohttp
import pytest
from aiohttp import web

from quire.gateway.endpoint import Endpoint, Pool
from quire.gateway.resilience.checks import Checks
from quire.gateway.resilience.guard import Guard
from quire.gateway.resilience.settings import ResilienceSettings

QUICK = ResilienceSettings(health_interval=0.01, models_interval=0.02, health_timeout=0.2)


class Server:
    """/health and /v1/models as the test sets them."""

    def __init__(self) -> None:
        self.health = 200
        self.models: object = {"data": [{"id": "m"}, {"id": "adapter", "parent": "m"}]}
        self.looks = 0
        self.holds_up = False

    async def start(self) -> Endpoint:
        app = web.Application()
        app.add_routes([web.get("/health", self._health), web.get("/v1/models", self._models)])
        self.runner = web.AppRunner(app)
        await self.runner.setup()
        site = web.TCPSite(self.runner, "127.0.0.1", 0)
        await site.start()
        return Endpoint("e", "127.0.0.1", self.runner.addresses[0][1])

    async def _health(self, _: web.Request) -> web.Response:
        self.looks += 1
        if self.holds_up:
            time.sleep(QUICK.health_timeout * 2)
        return web.Response(status=self.health, headers={"location": "/elsewhere"})

    async def _models(self, _: web.Request) -> web.Response:
        if isinstance(self.models, bytes):
            return web.Response(body=self.models)
        return web.json_response(self.models)


@pytest.fixture
async def looked_at():
    server = Server()
    endpoint = await server.start()
    pool = Pool()
    guard = Guard(pool=pool, clock=time.monotonic, settings=QUICK)
    async with aiohttp.ClientSession() as http:
        checks = Checks(pool=pool, guard=guard, http=http, settings=QUICK)
        checks.start()
        yield server, pool.put(endpoint), pool
        await checks.stop()
        await server.runner.cleanup()


async def until(condition) -> None:
    while not condition():
        await asyncio.sleep(0.002)


async def test_models_are_learnt_and_follow(looked_at) -> None:
    server, endpoint, _ = looked_at
    await until(lambda: endpoint.models == {"m", "adapter"})
    server.models = {"data": [{"id": "n"}]}
    await until(lambda: endpoint.models == {"n"})
    for nonsense in (
        {"data": 5},
        [],
        {"data": [{"id": 3}]},
        {"data": [{"id": "x" * 2_000_000}]},
        b'{"data":[{"id":"\xff"}]}',
    ):
        server.models = nonsense
        looks = server.looks
        await until(lambda looks=looks: server.looks > looks + 6)
        assert endpoint.models == {"n"}


async def test_health_takes_several_looks_to_lose_and_one_to_regain(looked_at) -> None:
    server, endpoint, _ = looked_at
    await until(lambda: server.looks)
    server.health, server.looks = 503, 0
    await until(lambda: not endpoint.available)
    assert server.looks >= QUICK.unhealthy_after
    server.health = 200
    await until(lambda: endpoint.available)
    server.health = 404  # a server without /health; a redirect is not followed
    looks = server.looks
    await until(lambda: server.looks > looks + 6)
    assert endpoint.available


async def test_a_server_that_is_gone_is_not_available(looked_at) -> None:
    server, endpoint, _ = looked_at
    await until(lambda: endpoint.models)
    await server.runner.cleanup()
    await until(lambda: not endpoint.available)
    assert endpoint.models == {"m", "adapter"}


async def test_a_look_that_this_process_held_up_is_no_word_on_the_endpoint(looked_at) -> None:
    server, endpoint, _ = looked_at
    server.holds_up = True
    await until(lambda: server.looks > 6)
    assert endpoint.available


async def test_whoever_left_is_not_looked_at(looked_at) -> None:
    server, endpoint, pool = looked_at
    await until(lambda: server.looks)
    pool.remove(endpoint.key)
    await asyncio.sleep(0)
    looks = server.looks
    await asyncio.sleep(0.1)
    assert server.looks <= looks + 1
