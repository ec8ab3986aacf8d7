"""Clients that are slow, leave, or send what cannot be served; and the gateway's own end."""

from __future__ import annotations

import asyncio
import json

import aiohttp
import pytest
import uvloop

from quire.config.server import ListenConfig
from quire.core.errors import Unauthorized
from quire.gateway.director import Gate
from quire.gateway.errors import ShuttingDown, UpstreamError
from quire.gateway.proxy.settings import ProxySettings
from quire.gateway.request import InferenceRequest
from quire.gateway.resilience.settings import ResilienceSettings

CHAT = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}


def request_bytes(**more: object) -> bytes:
    body = json.dumps(CHAT | more).encode()
    return b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(body) + body


async def until(condition) -> None:
    while not condition():
        await asyncio.sleep(0.005)


async def leaves_within_a_stream(rig, fake) -> None:
    async def endless(_, wire) -> None:
        await wire.write(fake.STREAM_HEAD + fake.chunk(fake.delta("w")))
        await wire.gone()

    async with rig([endless]) as gateway:
        reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
        writer.write(request_bytes(stream=True))
        await reader.readuntil(b"data: ")
        assert gateway.servers[0].open == 1
        writer.transport.abort()
        await until(lambda: gateway.servers[0].open == 0 and gateway.open_load == 0)
    assert gateway.recorder.outcomes[0][1].error == "cancelled"


async def test_a_client_that_leaves_ends_its_request_upstream(rig, fake) -> None:
    await leaves_within_a_stream(rig, fake)


def test_a_client_that_leaves_ends_its_request_upstream_on_uvloop(rig, fake) -> None:
    uvloop.run(leaves_within_a_stream(rig, fake))


async def test_a_client_that_leaves_before_the_answer_too(rig, fake) -> None:
    async with rig([fake.never], [fake.answer]) as gateway:
        _, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
        writer.write(request_bytes())
        await until(lambda: gateway.servers[0].received)
        writer.transport.abort()
        await until(lambda: gateway.servers[0].open == 0 and gateway.open_load == 0)
    assert gateway.recorder.sent_to == ["a"]
    assert gateway.pool.all[0].available


async def slow_reader(rig, fake) -> None:
    written = 0

    async def floods(_, wire) -> None:
        nonlocal written
        await wire.write(fake.STREAM_HEAD)
        piece = fake.chunk(b"data: " + b"x" * 65536 + b"\n\n")
        for _ in range(2000):
            await wire.write(piece)
            written += len(piece)
        await wire.write(fake.LAST_CHUNK)

    async with rig([floods], settings=ProxySettings(idle_timeout=0.3)) as gateway:
        reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port, limit=1024)
        writer.write(request_bytes(stream=True))
        await reader.readexactly(100)
        before = -1
        while written != before:  # until nothing moves any more
            before = written
            await asyncio.sleep(0.2)
        assert written < 40 * 1024 * 1024  # what kernel and transports hold, of 131 MB
        await asyncio.sleep(0.5)  # longer than an endpoint may be silent: it is not the endpoint that is slow
        total = 100
        while piece := await reader.read(1 << 20):
            total += len(piece)
            if piece.endswith(b"0\r\n\r\n"):
                break
        assert total > 2000 * 65536
        writer.close()
        await gateway.settled()
    assert gateway.recorder.outcomes[0][1].error == ""


async def test_a_client_that_reads_slowly_slows_the_endpoint_down(rig, fake) -> None:
    await slow_reader(rig, fake)


def test_a_client_that_reads_slowly_slows_the_endpoint_down_on_uvloop(rig, fake) -> None:
    uvloop.run(slow_reader(rig, fake))


async def test_a_client_that_sends_a_byte_at_a_time(rig, fake) -> None:
    async with rig([fake.answer], listen=ListenConfig(port=0, request_read_timeout=0.5)) as gateway:
        reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
        sending = asyncio.create_task(_drip(writer, request_bytes(), 0.05))
        answer = await reader.read()
        assert answer.startswith(b"HTTP/1.1 408 ")
        sending.cancel()
        writer.close()
        reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
        await _drip(writer, request_bytes(), 0.0)
        assert (await reader.readline()).startswith(b"HTTP/1.1 200 ")
        writer.close()
    assert len(gateway.servers[0].received) == 1


async def _drip(writer: asyncio.StreamWriter, data: bytes, seconds: float) -> None:
    for at in range(len(data)):
        writer.write(data[at : at + 1])
        await writer.drain()
        await asyncio.sleep(seconds)


@pytest.mark.parametrize("said", [True, False])
async def test_a_body_that_is_too_large(rig, fake, said) -> None:
    async def pieces():
        for _ in range(40):
            yield b" " * 1000

    data = b" " * 40_000 if said else pieces()
    async with (
        rig([fake.answer], settings=ProxySettings(max_body=20_000)) as gateway,
        aiohttp.ClientSession() as http,
        http.post(f"{gateway.url}/v1/messages", data=data) as answer,
    ):
        assert (answer.status, (await answer.json())["error"]["type"]) == (413, "request_too_large")
    assert not gateway.servers[0].received


async def test_all_bodies_together_are_bounded(rig, fake) -> None:
    settings = ProxySettings(max_held=10_000)
    async with rig([fake.never, fake.answer], settings=settings) as gateway, aiohttp.ClientSession() as http:
        url = f"{gateway.url}/v1/chat/completions"
        _, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
        writer.write(request_bytes(user="x" * 6000))
        await until(lambda: gateway.servers[0].received)
        async with http.post(url, json=CHAT | {"user": "x" * 6000}) as answer:
            assert (answer.status, (await answer.json())["error"]["code"]) == (429, "saturated")
        writer.transport.abort()
        await gateway.settled()
        async with http.post(url, json=CHAT | {"user": "x" * 6000}) as answer:
            assert answer.status == 200
        await gateway.settled()
        assert gateway.app.proxy.holding.now == 0


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'"x"', b'{"model": 5}', b"[" * 100_000, b'{"a":' * 100_000])
async def test_a_body_that_is_none(rig, fake, body) -> None:
    async with rig([fake.answer]) as gateway, aiohttp.ClientSession() as http:
        async with http.post(f"{gateway.url}/v1/chat/completions", data=body) as answer:
            assert (answer.status, (await answer.json())["error"]["type"]) == (400, "invalid_request_error")
        async with http.post(f"{gateway.url}/v1/messages", data=body) as answer:
            error = await answer.json()
            assert (error["type"], error["error"]["type"]) == ("error", "invalid_request_error")
    assert not gateway.servers[0].received


async def test_hooks_see_a_request_first_and_may_refuse_it(rig, fake) -> None:
    seen = []

    async def authenticate(request) -> None:
        if request.headers.get("authorization") != "Bearer good":
            raise Unauthorized("Who are you?")
        request.tenant = "t"

    async with rig([fake.answer], hooks=[authenticate, seen.append]) as gateway, aiohttp.ClientSession() as http:
        for key, status in (("bad", 401), ("good", 200)):
            headers = {"authorization": f"Bearer {key}"}
            async with http.post(f"{gateway.url}/v1/chat/completions", json=CHAT, headers=headers) as answer:
                assert answer.status == status
    assert [request.tenant for request in seen] == ["t"]
    assert len(gateway.recorder.sent_to) == 1


async def test_a_fault_of_our_own_is_an_answer_that_tells_nothing(rig, fake) -> None:
    def breaks(_request) -> None:
        raise ZeroDivisionError("secret")

    async with (
        rig([fake.answer], hooks=[breaks]) as gateway,
        aiohttp.ClientSession() as http,
        http.post(f"{gateway.url}/v1/chat/completions", json=CHAT) as answer,
    ):
        assert answer.status == 500
        assert "secret" not in await answer.text()
    assert gateway.open_load == 0


async def test_draining_ends_what_is_open_and_takes_nothing_new(rig, fake) -> None:
    gate = asyncio.Event()
    async with rig([fake.stream(3, gate=gate)]) as gateway, aiohttp.ClientSession() as http:
        url = f"{gateway.url}/v1/chat/completions"
        async with http.post(url, json=CHAT | {"stream": True}) as streaming:
            draining = asyncio.create_task(gateway.app.drain(30))
            await until(lambda: gateway.app.proxy.draining)
            async with http.post(url, json=CHAT) as refused:
                assert (refused.status, (await refused.json())["error"]["code"]) == (503, "draining")
            async with http.get(f"{gateway.url}/ready") as ready:
                assert ready.status == 503
            assert not draining.done()
            gate.set()
            assert (await streaming.read()).endswith(b"data: [DONE]\n\n")
        await draining


async def test_what_does_not_end_in_time_is_told_so(rig, fake) -> None:
    counted = []
    async with (
        rig([fake.stream(3, gate=asyncio.Event())], count=counted.append) as gateway,
        aiohttp.ClientSession() as http,
        http.post(f"{gateway.url}/v1/chat/completions", json=CHAT | {"stream": True}) as streaming,
    ):
        await gateway.app.drain(0.05)
        last = (await streaming.read()).strip().split(b"\n\n")[-1]
    assert "stopping" in json.loads(last.removeprefix(b"data: "))["error"]["message"]
    assert gateway.open_load == 0
    assert gateway.pool.all[0].available
    assert [(one.status, one.error, one.tries) for one in counted] == [(200, "upstream_error", 1)]


async def test_what_waits_for_a_place_is_told_so_too(rig, fake) -> None:
    class Full(Gate):
        def __init__(self) -> None:
            self.waiting: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        async def enter(self, request: InferenceRequest) -> None:
            await self.waiting

        def leave(self, request: InferenceRequest) -> None: ...

        def close(self) -> None:
            self.waiting.set_exception(ShuttingDown("The gateway is shutting down."))

    async with rig([fake.answer]) as gateway, aiohttp.ClientSession() as http:
        gateway.director.gate = full = Full()
        gateway.app.refuse_waiting = full.close
        asking = asyncio.ensure_future(http.post(f"{gateway.url}/v1/chat/completions", json=CHAT))
        await until(lambda: gateway.app.proxy.num_open)
        await gateway.app.drain(0.05)
        async with await asking as refused:
            assert (refused.status, (await refused.json())["error"]["code"]) == (503, "shutting_down")
        with pytest.raises(UpstreamError, match="stopping"):
            await gateway.app.connections.acquire(gateway.pool.all[0])


async def test_a_large_answer_counts_as_held_until_its_client_has_it(rig, fake) -> None:
    size = 24 * 1024 * 1024
    settings = ProxySettings(max_buffered_answer=2 * size)
    async with rig([fake.body("x" * size)], settings=settings) as gateway:
        holding = gateway.app.proxy.holding
        reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port, limit=1024)
        writer.write(request_bytes())
        head = await reader.readuntil(b"\r\n\r\n")
        assert b"content-length: %d\r\n" % (size + 2) in head
        for _ in range(20):
            await asyncio.sleep(0)
        assert holding.now > size
        left = size + 2
        while left:
            left -= len(await reader.read(1024 * 1024))
        await until(lambda: holding.now == 0)
        writer.close()


async def test_a_draining_endpoint_ends_what_it_has_and_gets_nothing_new(rig, fake) -> None:
    gate = asyncio.Event()
    async with rig([fake.stream(3, gate=gate)], [fake.answer]) as gateway, aiohttp.ClientSession() as http:
        url = f"{gateway.url}/v1/chat/completions"
        async with http.post(url, json=CHAT | {"stream": True}) as streaming:
            first = gateway.pool.all[0]
            first.labels = {"quire.ai/state": "draining"}
            for _ in range(3):
                async with http.post(url, json=CHAT) as answer:
                    assert answer.status == 200
            gateway.pool.remove(first.key)  # gone from discovery, even
            gate.set()
            assert (await streaming.read()).endswith(b"data: [DONE]\n\n")
    assert gateway.recorder.sent_to == ["a", "b", "b", "b"]


# --- hedging ------------------------------------------------------------------------------------------------

HEDGED = ProxySettings(resilience=ResilienceSettings(hedge_delay=0.05, hedge_share=1.0))


async def test_a_slow_answer_is_asked_for_elsewhere(rig, fake) -> None:
    async with rig([fake.never], [fake.stream(3)], settings=HEDGED) as gateway, aiohttp.ClientSession() as http:
        async with http.post(f"{gateway.url}/v1/chat/completions", json=CHAT | {"stream": True}) as answer:
            assert (await answer.read()).endswith(b"data: [DONE]\n\n")
        await until(lambda: gateway.servers[0].open == 0)
        await gateway.settled()
    assert gateway.recorder.sent_to == ["a", "b"]
    assert [(name, outcome.error) for name, outcome in gateway.recorder.outcomes] == [("a", "cancelled"), ("b", "")]
    assert gateway.open_load == 0


async def test_an_answer_in_time_is_not_asked_for_twice(rig, fake) -> None:
    slow = ProxySettings(resilience=ResilienceSettings(hedge_delay=30.0))
    async with rig([fake.answer], [fake.answer], settings=slow) as gateway, aiohttp.ClientSession() as http:
        async with http.post(f"{gateway.url}/v1/chat/completions", json=CHAT) as answer:
            assert answer.status == 200
        await gateway.settled()
    assert gateway.recorder.sent_to == ["a"]


async def test_the_second_failing_leaves_the_first(rig, fake) -> None:
    gate = asyncio.Event()

    async def later(received, wire) -> None:
        await gate.wait()
        await fake.answer(received, wire)

    async def busy(received, wire) -> None:
        await fake.body({}, 503)(received, wire)
        gate.set()

    async with rig([later], [busy], settings=HEDGED) as gateway, aiohttp.ClientSession() as http:
        async with http.post(f"{gateway.url}/v1/chat/completions", json=CHAT) as answer:
            assert (answer.status, (await answer.json())["object"]) == (200, "chat.completion")
        await gateway.settled()
    assert gateway.recorder.sent_to == ["a", "b"]
    assert gateway.open_load == 0


async def test_a_client_that_leaves_a_race_ends_both(rig, fake) -> None:
    async with rig([fake.never], [fake.never], settings=HEDGED) as gateway:
        _, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
        writer.write(request_bytes())
        await until(lambda: gateway.servers[1].received)
        writer.transport.abort()
        await until(lambda: not any(server.open for server in gateway.servers) and gateway.open_load == 0)
        await gateway.settled()
