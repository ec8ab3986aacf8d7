"""Looks at endpoints from time to time: whether they are well, and which models they have."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass, field

import aiohttp
import msgspec

from quire.gateway.endpoint import Endpoint, Pool
from quire.gateway.resilience.guard import Guard
from quire.gateway.resilience.settings import ResilienceSettings

STEP = 0.25
"""Seconds between two looks at the clock for endpoints that are ejected."""
OWN_DELAY = 1.5
"""Times the timeout: a look that took longer failed because this process was busy, which is no word on the endpoint."""
MAX_MODELS_BYTES = 1024 * 1024
MAX_MODELS = 4096


class _Model(msgspec.Struct):
    id: str


class _Models(msgspec.Struct):
    data: list[_Model]


_decoder = msgspec.json.Decoder(_Models)


@dataclass(slots=True, kw_only=True)
class Checks:
    """One task for each endpoint. The only writer of `Endpoint.models`."""

    pool: Pool
    guard: Guard
    http: aiohttp.ClientSession
    """Without cookies, proxies from the environment, or redirects; closed by whoever made it."""
    settings: ResilienceSettings = field(default_factory=ResilienceSettings)
    _tasks: dict[str, asyncio.Task[None]] = field(default_factory=dict)
    _stepping: asyncio.Task[None] | None = None
    _stopped: bool = False

    def start(self) -> None:
        self.pool.watch(self._arrived, self._left)
        self._stepping = asyncio.create_task(self._step())

    async def stop(self) -> None:
        self._stopped = True
        tasks = [*self._tasks.values(), *filter(None, (self._stepping,))]
        self._tasks.clear()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _arrived(self, endpoint: Endpoint) -> None:
        if not self._stopped:
            self._tasks[endpoint.key] = asyncio.create_task(self._watch(endpoint))

    def _left(self, endpoint: Endpoint) -> None:
        if (task := self._tasks.pop(endpoint.key, None)) is not None:
            task.cancel()

    async def _step(self) -> None:
        while True:
            await asyncio.sleep(STEP)
            self.guard.step()

    async def _watch(self, endpoint: Endpoint) -> None:
        looks_between = max(round(self.settings.models_interval / self.settings.health_interval), 1)
        count, loop = 0, asyncio.get_running_loop()
        while True:
            asked = loop.time()
            healthy = await self._is_healthy(endpoint)
            if healthy or loop.time() - asked < OWN_DELAY * self.settings.health_timeout:
                self.guard.looked(endpoint, healthy=healthy)
            if healthy and (count % looks_between == 0 or endpoint.models is None):
                await self._learn_models(endpoint)
            count += 1
            await asyncio.sleep(self.settings.health_interval)

    async def _is_healthy(self, endpoint: Endpoint) -> bool:
        """A server that has no /health but answers is well enough."""
        status, _ = await self._get(endpoint, "/health", 0)
        return status is not None and status < 500

    async def _learn_models(self, endpoint: Endpoint) -> None:
        """What was known stays when it cannot be read."""
        status, body = await self._get(endpoint, "/v1/models", MAX_MODELS_BYTES)
        if status != 200:
            return
        with contextlib.suppress(msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            endpoint.models = frozenset(model.id for model in _decoder.decode(body).data[:MAX_MODELS])

    async def _get(self, endpoint: Endpoint, path: str, max_bytes: int) -> tuple[int | None, bytes]:
        timeout = aiohttp.ClientTimeout(total=self.settings.health_timeout)
        try:
            async with self.http.get(endpoint.url + path, timeout=timeout, allow_redirects=False) as answer:
                body = bytearray()
                async for piece in answer.content.iter_any():
                    body += piece
                    if len(body) > max_bytes:
                        break
                return answer.status, bytes(body)
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError):
            return None, b""
