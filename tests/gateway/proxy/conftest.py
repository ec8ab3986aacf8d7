"""A gateway on a real socket before fake model servers on real sockets, all in the test's event loop."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import sys
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

import openai
import pytest

from quire.config.server import ListenConfig
from quire.gateway.director import Director
from quire.gateway.endpoint import Endpoint, Pool
from quire.gateway.plugin import Conclusion, Observer, Picker, ProfileHandler, Scorer
from quire.gateway.proxy.app import Gateway, build_app
from quire.gateway.proxy.settings import ProxySettings
from quire.gateway.request import InferenceRequest, Outcome
from quire.gateway.schedule import Profile, Scheduler, WeightedScorer
from quire.web.server import Server, bind, uvicorn_config


def _load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("gateway_fake_server", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


_fake = _load(Path(__file__).parent.parent / "fake_server.py")


@pytest.fixture
def fake() -> ModuleType:
    """The module `fake_server`."""
    return _fake


class FewestOpen(Scorer):
    name = "fewest"

    def score(self, request: InferenceRequest, candidates: Sequence[Endpoint]) -> Sequence[float]:
        return [1 / (1 + endpoint.load.requests) for endpoint in candidates]


class Best(Picker):
    name = "best"

    def pick(
        self, request: InferenceRequest, candidates: Sequence[Endpoint], totals: Sequence[float]
    ) -> Sequence[Endpoint]:
        order = sorted(range(len(candidates)), key=lambda index: -totals[index])
        return [candidates[index] for index in order]


class Single(ProfileHandler):
    def next_profiles(
        self, request: InferenceRequest, profiles: Sequence[str], results: Mapping[str, Sequence[Endpoint]]
    ) -> Sequence[str]:
        return [name for name in profiles if name not in results]

    def conclude(self, request: InferenceRequest, results: Mapping[str, Sequence[Endpoint]]) -> Conclusion:
        return Conclusion(results["default"])


@dataclass
class Recorder(Observer):
    """What the director was told of attempts, in order."""

    name: str = "recorder"
    sent_to: list[str] = field(default_factory=list)
    first_bytes: list[str] = field(default_factory=list)
    outcomes: list[tuple[str, Outcome]] = field(default_factory=list)

    def sent(self, request: InferenceRequest, endpoint: Endpoint, choice: Conclusion) -> None:
        self.sent_to.append(endpoint.name)

    def first_byte(self, request: InferenceRequest, endpoint: Endpoint, ttft: float) -> None:
        self.first_bytes.append(endpoint.name)

    def finished(self, request: InferenceRequest, endpoint: Endpoint, outcome: Outcome) -> None:
        self.outcomes.append((endpoint.name, outcome))


@dataclass
class Rig:
    """`servers[0]` is the endpoint `a`, which is chosen first while all have the same load."""

    servers: list
    pool: Pool
    director: Director
    app: Gateway
    recorder: Recorder
    port: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def openai(self) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0)

    async def settled(self) -> None:
        """Wait until everything that came in has been counted off; a client sees its answer a moment earlier."""
        while self.app.proxy.num_open:
            await asyncio.sleep(0)

    @property
    def open_load(self) -> int:
        return sum(endpoint.load.requests for endpoint in self.pool)


MakeRig = Callable[..., contextlib.AbstractAsyncContextManager[Rig]]


@contextlib.asynccontextmanager
async def _rig(
    *behaviours: list, settings: ProxySettings | None = None, listen: ListenConfig | None = None, **build: object
) -> AsyncIterator[Rig]:
    servers = [_fake.FakeServer(list(of_one)) for of_one in behaviours]
    pool, recorder = Pool(), Recorder()
    for server, name in zip(servers, "abcdefgh", strict=False):
        await server.start()
        pool.put(Endpoint(name, "127.0.0.1", server.port))
    profile = Profile("default", (), (WeightedScorer(FewestOpen()),), Best())
    scheduler = Scheduler({"default": profile}, Single())
    director = Director(pool=pool, scheduler=scheduler, clock=time.monotonic, observers=(recorder,))
    app = build_app(director, settings, **build)  # type: ignore[arg-type]
    listen = listen or ListenConfig(port=0)
    with bind(listen) as listener:
        config = uvicorn_config(app, listen)
        server = Server(config)
        server.lifespan = config.lifespan_class(config)
        await server.startup(sockets=[listener])  # not `serve` and `shutdown`, which rest 100 ms and more
        await server.on_tick(0)
        try:
            yield Rig(servers, pool, director, app, recorder, listener.getsockname()[1])
        finally:
            for one in server.servers:
                one.close()
            for connection in list(server.server_state.connections):
                connection.transport.abort()
            await asyncio.gather(*server.server_state.tasks, return_exceptions=True)
            await app.stop()
            for one in servers:
                await one.stop()


@pytest.fixture
def rig() -> MakeRig:
    """`async with rig([behaviour, …] for each endpoint …) as gateway`."""
    return _rig
