"""The external processing door over real gRPC, told what Envoy tells and what it should not."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass

import grpc.aio
import pytest
from envoy.config.core.v3 import base_pb2
from envoy.extensions.filters.http.ext_proc.v3 import processing_mode_pb2
from envoy.service.ext_proc.v3 import external_processor_pb2 as ext_proc
from envoy.service.ext_proc.v3 import external_processor_pb2_grpc

from quire.gateway.director import Director, Gate
from quire.gateway.endpoint import Endpoint, Pool
from quire.gateway.errors import Evicted
from quire.gateway.extproc.door import make_door
from quire.gateway.extproc.server import ExtProcServer
from quire.gateway.extproc.stream import Door
from quire.gateway.plugin import Conclusion, Observer, Picker, ProfileHandler
from quire.gateway.request import InferenceRequest, Outcome
from quire.gateway.schedule import Profile, Scheduler

MODE = processing_mode_pb2.ProcessingMode
BODY = json.dumps({"model": "m", "messages": []}).encode()


class First(Picker, ProfileHandler, Observer):
    name = "first"
    faulty = False

    def __init__(self) -> None:
        self.errors: list[str] = []

    def pick(
        self, request: InferenceRequest, candidates: Sequence[Endpoint], totals: Sequence[float]
    ) -> Sequence[Endpoint]:
        return candidates

    def next_profiles(
        self, request: InferenceRequest, profiles: Sequence[str], results: Mapping[str, Sequence[Endpoint]]
    ) -> Sequence[str]:
        return [name for name in profiles if name not in results]

    def conclude(self, request: InferenceRequest, results: Mapping[str, Sequence[Endpoint]]) -> Conclusion:
        return Conclusion(results["default"])

    def sent(self, request: InferenceRequest, endpoint: Endpoint, choice: Conclusion) -> None:
        if self.faulty:
            raise ZeroDivisionError

    def finished(self, request: InferenceRequest, endpoint: Endpoint, outcome: Outcome) -> None:
        self.errors.append(outcome.error)


class Counted(Gate):
    def __init__(self) -> None:
        self.inside: list[str] = []
        self.entered: list[str] = []

    async def enter(self, request: InferenceRequest) -> None:
        self.inside.append(request.id)
        self.entered.append(request.id)

    def leave(self, request: InferenceRequest) -> None:
        self.inside.remove(request.id)


@dataclass
class Stage:
    endpoint: Endpoint
    gate: Counted
    plugin: First
    door: Door
    stub: external_processor_pb2_grpc.ExternalProcessorStub
    hooks: list
    server: ExtProcServer

    async def say(self, *messages: ext_proc.ProcessingRequest) -> list[ext_proc.ProcessingResponse]:
        """All answers to these messages, behind which the stream ends."""
        async with asyncio.timeout(10):
            return [response async for response in self.stub.Process(iter_of(messages))]

    async def settled(self) -> None:
        async with asyncio.timeout(10):
            while self.gate.inside:
                await asyncio.sleep(0.005)
        assert self.endpoint.load.requests == 0


async def iter_of(messages: Sequence[ext_proc.ProcessingRequest]) -> AsyncIterator[ext_proc.ProcessingRequest]:
    for message in messages:
        yield message


@contextlib.asynccontextmanager
async def stage(*, max_streams: int = 100, **settings: int) -> AsyncIterator[Stage]:
    endpoint, gate, plugin = Endpoint("a", "127.0.0.1", 1), Counted(), First()
    pool = Pool()
    pool.put(endpoint)
    scheduler = Scheduler({"default": Profile("default", (), (), plugin)}, plugin)
    director = Director(pool=pool, scheduler=scheduler, clock=time.monotonic, gate=gate, observers=(plugin,))
    hooks: list = []
    door = make_door(director, hooks=hooks, **{"max_body_bytes": 10_000, **settings})
    server = ExtProcServer(door, "127.0.0.1", 0, max_streams=max_streams)
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        yield Stage(
            endpoint, gate, plugin, door, external_processor_pb2_grpc.ExternalProcessorStub(channel), hooks, server
        )
        await server.stop(0)


def headers(mode: int | None = MODE.BUFFERED, *, end: bool = False, **named: str) -> ext_proc.ProcessingRequest:
    pairs = {":path": "/v1/chat/completions", ":method": "POST"} | {k.replace("_", "-"): v for k, v in named.items()}
    pairs[":path"] = pairs.pop("path", pairs[":path"])
    listed = [base_pb2.HeaderValue(key=key, raw_value=value.encode("latin-1")) for key, value in pairs.items()]
    said = ext_proc.HttpHeaders(headers=base_pb2.HeaderMap(headers=listed), end_of_stream=end)
    message = ext_proc.ProcessingRequest(request_headers=said)
    if mode is not None:
        message.protocol_config.request_body_mode = mode
    return message


def body(data: bytes = BODY, *, end: bool = True) -> ext_proc.ProcessingRequest:
    return ext_proc.ProcessingRequest(request_body=ext_proc.HttpBody(body=data, end_of_stream=end))


TRAILERS = ext_proc.ProcessingRequest(request_trailers=ext_proc.HttpTrailers())


def destination(response: ext_proc.ProcessingResponse) -> str:
    return str(response.dynamic_metadata["envoy.lb"]["x-gateway-destination-endpoint"])


@pytest.mark.parametrize("fault", ["observer", "two bodies", "two heads"])
async def test_whatever_goes_wrong_behind_the_choice_its_place_is_given_back(fault: str) -> None:
    async with stage() as at:
        at.plugin.faulty = fault == "observer"
        again = {"observer": [], "two bodies": [body()], "two heads": [headers(end=True)]}[fault]
        with contextlib.suppress(grpc.aio.AioRpcError):
            await at.say(headers(), body(), *again)
        assert len(at.gate.entered) == 1
        await at.settled()


async def test_a_body_with_trailers_behind_it() -> None:
    async with stage() as at:
        buffered = await at.say(headers(MODE.BUFFERED), body(end=False), TRAILERS)
        assert destination(buffered[1]) == "127.0.0.1:1"
        duplex = await at.say(
            headers(MODE.FULL_DUPLEX_STREAMED), body(BODY[:9], end=False), body(BODY[9:], end=False), TRAILERS
        )
        kinds = [response.WhichOneof("response") for response in duplex]
        assert kinds == ["request_headers", "request_body", "request_trailers"]
        assert destination(duplex[0]) == "127.0.0.1:1"
        returned = duplex[1].request_body.response.body_mutation.streamed_response
        assert (returned.body, returned.end_of_stream) == (BODY, False)
        await at.settled()


async def test_refusals_have_the_shape_of_the_api() -> None:
    async with stage() as at:
        for path in ("/v1/messages?beta=true", "/v1/chat/completions"):
            refusal = (await at.say(headers(path=path), body(b"{")))[-1].immediate_response
            told = json.loads(refusal.body)
            assert refusal.status.code == 400
            assert told["error"]["type"] == "invalid_request_error"
            assert (told.get("type") == "error") == path.startswith("/v1/messages")


async def test_bodies_of_all_streams_are_bounded() -> None:
    async with stage(max_held=1000) as at:
        begun = asyncio.Event()

        async def slowly() -> AsyncIterator[ext_proc.ProcessingRequest]:
            yield headers(MODE.FULL_DUPLEX_STREAMED)
            yield body(b"x" * 900, end=False)
            yield body(b"x", end=False)
            await begun.wait()

        first = at.stub.Process(slowly())
        reading = asyncio.ensure_future(first.read())
        async with asyncio.timeout(10):
            while at.door.holding.now < 901:  # before that, another's body could take the room that it needs
                await asyncio.sleep(0.005)
        refused = (await at.say(headers(), body(BODY + b" " * 200)))[-1]
        assert refused.immediate_response.status.code == 429
        begun.set()
        await reading
        async with asyncio.timeout(10):
            while at.door.holding.now:
                await asyncio.sleep(0.005)
        taken = (await at.say(headers(), body(BODY + b" " * 200)))[-1]
        assert not taken.HasField("immediate_response")
        await at.settled()


async def test_names_of_requests_are_bounded() -> None:
    async with stage() as at:
        for name in ("mine", "x" * 200, "a b", ""):
            await at.say(headers(x_request_id=name), body())
        assert at.gate.entered[0] == "mine"
        assert all(len(name) == 32 for name in at.gate.entered[1:])
        await at.settled()


async def test_what_was_not_read_is_not_rewritten() -> None:
    async with stage() as at:

        def for_every_model(request: InferenceRequest) -> None:
            request.target_model = "v2"

        at.hooks.append(for_every_model)
        response = (await at.say(headers(path="/v1/audio/translations"), body(b"--form")))[-1]
        assert destination(response) == "127.0.0.1:1"
        assert not response.request_body.response.HasField("body_mutation")
        await at.settled()


def response_headers() -> ext_proc.ProcessingRequest:
    listed = [base_pb2.HeaderValue(key=":status", raw_value=b"200")]
    return ext_proc.ProcessingRequest(response_headers=ext_proc.HttpHeaders(headers=base_pb2.HeaderMap(headers=listed)))


@pytest.mark.parametrize("begun", [False, True])
async def test_a_request_at_its_endpoint_gives_way(begun: bool) -> None:
    async with stage() as at:
        asked: list[InferenceRequest] = []
        at.hooks.append(asked.append)
        stream = at.stub.Process()
        messages = [headers(), body(), response_headers()][: 3 if begun else 2]
        async with asyncio.timeout(10):
            for message in messages:
                await stream.write(message)
                assert not (await stream.read()).HasField("immediate_response")
            assert asked[0].break_off is not None
            asked[0].break_off(Evicted("A request of higher priority waits.", retry_after=2.0))
            told = (await stream.read()).immediate_response
            assert told.status.code == 429
            sent = {one.header.key: one.header.raw_value for one in told.headers.set_headers}
            assert sent["x-llm-d-request-dropped-reason"] == b"evicted-priority"
            assert sent["retry-after"] == b"2"
            assert json.loads(told.body)["error"]["code"] == "evicted"
            assert await stream.read() is grpc.aio.EOF
        assert asked[0].break_off is None
        await at.settled()
        assert at.plugin.errors == ["cancelled"]


async def test_streams_are_bounded() -> None:
    async with stage(max_streams=1) as at:
        stream = at.stub.Process()
        async with asyncio.timeout(10):
            await stream.write(headers())
            await stream.read()
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await at.say(headers(), body())
            assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            await stream.done_writing()
            assert await stream.read() is grpc.aio.EOF
        assert destination((await at.say(headers(), body()))[-1]) == "127.0.0.1:1"


async def test_streams_that_are_open_when_the_server_stops_are_told(caplog: pytest.LogCaptureFixture) -> None:
    async with stage() as at:
        stream = at.stub.Process()
        async with asyncio.timeout(10):
            for message in (headers(), body()):
                await stream.write(message)
                await stream.read()
            stopping = asyncio.create_task(at.server.stop(0))
            assert (await stream.read()).immediate_response.status.code == 503
            assert await stream.read() is grpc.aio.EOF
            await stopping
        await at.settled()
    assert caplog.records == []
