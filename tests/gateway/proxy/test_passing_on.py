"""Requests and answers go through as they are."""

from __future__ import annotations

import asyncio
import gzip
import json

import aiohttp
import pytest
import uvloop

from quire.gateway.proxy.settings import ProxySettings

MESSAGES = [{"role": "user", "content": "hi"}]
CHAT = {"model": "m", "messages": MESSAGES}


async def stream_through(rig, fake) -> None:
    async with rig([fake.stream(5)]) as gateway, gateway.openai() as client:
        stream = await client.chat.completions.create(model="m", messages=MESSAGES, stream=True)
        text = "".join([chunk.choices[0].delta.content async for chunk in stream if chunk.choices])
        await gateway.settled()
    assert text == "w0 w1 w2 w3 w4"
    ((name, outcome),) = gateway.recorder.outcomes
    assert (name, outcome.status, outcome.error) == ("a", 200, "")
    assert (outcome.output_tokens, outcome.cached_tokens) == (5, 8)
    assert gateway.recorder.first_bytes == ["a"]
    assert outcome.first_byte <= outcome.finished


async def test_a_chat_streams_through(rig, fake) -> None:
    await stream_through(rig, fake)


def test_a_chat_streams_through_on_uvloop(rig, fake) -> None:
    uvloop.run(stream_through(rig, fake))


async def test_a_chat_comes_whole(rig, fake) -> None:
    async with rig([fake.answer]) as gateway, gateway.openai() as client:
        answer = await client.chat.completions.with_raw_response.create(model="m", messages=MESSAGES)
        assert answer.parse().choices[0].message.content == "hello"
        assert answer.headers["x-gateway-destination-endpoint-served"] == f"127.0.0.1:{gateway.servers[0].port}"
        await gateway.settled()
    assert gateway.recorder.outcomes[0][1].cached_tokens == 8
    assert gateway.open_load == 0


async def test_the_body_goes_on_byte_for_byte(rig, fake) -> None:
    body = b'{ "messages":[ {"role":"user","content":"\\u00e9 \xc3\xa9"}],\n"model" : "m", "seed":1e0 ,"seed":2}'
    async with (
        rig([fake.answer]) as gateway,
        aiohttp.ClientSession() as client,
        client.post(f"{gateway.url}/v1/chat/completions?x=%20y", data=body) as answer,
    ):
        assert answer.status == 200
    (received,) = gateway.servers[0].received
    assert received.body == body
    assert received.target == "/v1/chat/completions?x=%20y"


async def test_a_rewritten_model_is_all_that_changes(rig, fake) -> None:
    headers = {"x-llm-d-model-name-rewrite": "other"}
    body = {"model": "m", "messages": MESSAGES, "extra": [1.50, {"a": None}]}
    async with (
        rig([fake.answer]) as gateway,
        aiohttp.ClientSession() as client,
        client.post(f"{gateway.url}/v1/chat/completions", json=body, headers=headers) as answer,
    ):
        assert answer.status == 200
    assert gateway.servers[0].received[0].json == body | {"model": "other"}


async def test_heads_are_passed_on_without_what_is_for_one_hop(rig, fake) -> None:
    def well_behaved(received, wire):
        headers = {"x-engine": "e", "connection": "x-private, keep-alive", "x-private": "1", "x-request-id": "theirs"}
        return fake.body({}, **{name.replace("-", "_"): value for name, value in headers.items()})(received, wire)

    sent = {
        "connection": "keep-alive, X-Mine",
        "x-mine": "1",
        "te": "trailers",
        "proxy-authorization": "secret",
        "x-prefiller-host-port": "169.254.169.254:80",
        "x-request-id": "mine-1",
        "x-llm-d-inference-objective": "fast",
        "authorization": "Bearer key",
    }
    async with (
        rig([well_behaved]) as gateway,
        aiohttp.ClientSession() as client,
        client.post(f"{gateway.url}/v1/chat/completions", json=CHAT, headers=sent) as answer,
    ):
        got = answer.headers
    received = gateway.servers[0].received[0].headers
    assert received["x-request-id"] == "mine-1"
    assert received["authorization"] == "Bearer key"
    assert received["x-llm-d-inference-objective"] == "fast"
    assert received["host"] == f"127.0.0.1:{gateway.servers[0].port}"
    assert not received.keys() & {"connection", "x-mine", "te", "proxy-authorization", "x-prefiller-host-port"}
    assert got.getall("x-request-id") == ["mine-1"]
    assert got["x-engine"] == "e"
    assert len(got.getall("date")) == 1
    assert "x-private" not in got


async def test_what_is_compressed_stays_so_and_redirects_are_the_clients(rig, fake) -> None:
    packed = gzip.compress(b'{"object": "list"}')
    compressed = fake.head(200, content_encoding="gzip", content_length=str(len(packed))) + packed
    moved = fake.head(307, location="http://169.254.169.254/", content_length="0")
    async with (
        rig([fake.raw(compressed, then="next"), fake.raw(moved, then="next")]) as gateway,
        aiohttp.ClientSession(auto_decompress=False) as client,
    ):
        async with client.post(f"{gateway.url}/v1/chat/completions", json=CHAT) as answer:
            assert answer.headers["content-encoding"] == "gzip"
            assert await answer.read() == packed
        async with client.post(f"{gateway.url}/v1/chat/completions", json=CHAT, allow_redirects=False) as answer:
            assert (answer.status, answer.headers["location"]) == (307, "http://169.254.169.254/")


async def test_other_methods_and_empty_answers(rig, fake) -> None:
    nothing = fake.raw(b"HTTP/1.1 204 No Content\r\n\r\n", then="next")
    head_only = fake.raw(fake.head(200, content_length="5"), then="next")
    async with rig([nothing, head_only, fake.answer]) as gateway, aiohttp.ClientSession() as client:
        async with client.post(f"{gateway.url}/reset_prefix_cache") as answer:
            assert (answer.status, await answer.read()) == (204, b"")
        async with client.head(f"{gateway.url}/version") as answer:
            assert (answer.status, answer.headers["content-length"]) == (200, "5")
        while gateway.servers[0].open:  # whether a body would follow is not known: it is not used again
            await asyncio.sleep(0.005)
        async with client.get(f"{gateway.url}/version") as answer:
            assert (await answer.json())["object"] == "chat.completion"
    assert [received.method for received in gateway.servers[0].received] == ["POST", "HEAD", "GET"]


async def test_the_length_of_what_was_not_sent_is_said_where_it_is_known(rig, fake) -> None:
    heads = [fake.raw(fake.head(200, **said)) for said in ({"content_length": "77"}, {"transfer_encoding": "chunked"})]
    async with rig(heads) as gateway, aiohttp.ClientSession() as http:
        lengths = []
        for _ in heads:
            async with http.head(f"{gateway.url}/v1/files/x") as answer:
                lengths.append(answer.headers.get("content-length"))
    assert lengths == ["77", None]


async def test_an_interim_answer_is_not_the_answer(rig, fake) -> None:
    async def hinting(received, wire) -> None:
        await wire.write(b"HTTP/1.1 103 Early Hints\r\nlink: </x>\r\n\r\n")
        await fake.answer(received, wire)

    async with (
        rig([hinting]) as gateway,
        aiohttp.ClientSession() as client,
        client.post(f"{gateway.url}/v1/chat/completions", json=CHAT) as answer,
    ):
        assert (answer.status, "link" in answer.headers) == (200, False)


async def test_an_answer_without_a_length_ends_with_its_connection(rig, fake) -> None:
    async with (
        rig([fake.raw(fake.head(200), b'{"a":', b"1}")]) as gateway,
        aiohttp.ClientSession() as client,
        client.post(f"{gateway.url}/v1/chat/completions", json=CHAT) as answer,
    ):
        assert await answer.json() == {"a": 1}


@pytest.mark.parametrize("framing", ["length", "chunked"])
async def test_an_answer_too_large_to_be_held_is_passed_on(rig, fake, framing) -> None:
    data = json.dumps(list(range(100_000))).encode()
    if framing == "length":
        answer = fake.raw(fake.head(200, content_length=str(len(data))), data, then="next")
    else:
        pieces = [fake.chunk(data[at : at + 5000]) for at in range(0, len(data), 5000)]
        answer = fake.raw(fake.head(200, transfer_encoding="chunked"), *pieces, fake.LAST_CHUNK, then="next")
    settings = ProxySettings(max_buffered_answer=20_000)
    async with (
        rig([answer], settings=settings) as gateway,
        aiohttp.ClientSession() as client,
        client.post(f"{gateway.url}/v1/embeddings", json={"model": "m", "input": "x"}) as got,
    ):
        assert await got.read() == data


async def test_what_is_streamed_in_another_format_is_not_held(rig, fake) -> None:
    gate = asyncio.Event()

    async def speaks(_, wire) -> None:
        await wire.write(fake.head(200, "audio/mpeg", transfer_encoding="chunked") + fake.chunk(b"first"))
        await gate.wait()
        await wire.write(fake.chunk(b"second") + fake.LAST_CHUNK)

    async with (
        rig([speaks]) as gateway,
        aiohttp.ClientSession() as client,
        client.post(f"{gateway.url}/v1/audio/speech", json={"model": "m", "input": "hi"}) as answer,
    ):
        assert await answer.content.readany() == b"first"
        gate.set()
        assert await answer.read() == b"second"


async def test_streams_that_are_compressed_are_passed_on_as_they_come(rig, fake) -> None:
    gate = asyncio.Event()
    head = fake.head(200, "text/event-stream", transfer_encoding="chunked", content_encoding="gzip")

    async def packed(_, wire) -> None:
        await wire.write(head + fake.chunk(b"\x1f\x8b1"))
        await gate.wait()
        await wire.write(fake.chunk(b"2") + fake.LAST_CHUNK)

    async with (
        rig([packed]) as gateway,
        aiohttp.ClientSession(auto_decompress=False) as client,
        client.post(f"{gateway.url}/v1/chat/completions", json=CHAT | {"stream": True}) as answer,
    ):
        assert await answer.content.readany() == b"\x1f\x8b1"
        gate.set()
        assert await answer.read() == b"2"


async def test_trailers_are_no_headers(rig, fake) -> None:
    trailing = fake.chunk(b"{}") + b"0\r\nx-late: 1\r\n\r\n"
    async with (
        rig([fake.raw(fake.head(200, transfer_encoding="chunked") + trailing, then="next")]) as gateway,
        aiohttp.ClientSession() as client,
        client.post(f"{gateway.url}/v1/chat/completions", json=CHAT) as answer,
    ):
        assert await answer.json() == {}
        assert "x-late" not in answer.headers


async def test_an_answer_to_no_question_is_nobodys(rig, fake) -> None:
    answer = fake.head(200, content_length="2") + b"{}"
    smuggled = fake.head(200, content_length="5") + b'"two"'
    async with rig([fake.raw(answer + smuggled, then="next")]) as gateway, aiohttp.ClientSession() as client:
        for _ in range(3):
            async with client.post(f"{gateway.url}/v1/chat/completions", json=CHAT) as got:
                assert (got.status, await got.read()) == (200, b"{}")
            await gateway.settled()
    assert gateway.servers[0].connections == 3


async def test_what_follows_a_stream_does_not_cost_its_end(rig, fake) -> None:
    whole = fake.chunk(fake.delta("w0")) + fake.chunk(b"data: [DONE]\n\n") + fake.LAST_CHUNK
    async with (
        rig([fake.raw(fake.STREAM_HEAD + whole + b"and some more")]) as gateway,
        aiohttp.ClientSession() as client,
        client.post(f"{gateway.url}/v1/chat/completions", json=CHAT | {"stream": True}) as answer,
    ):
        assert await answer.read() == fake.delta("w0") + b"data: [DONE]\n\n"


async def test_connections_are_reused(rig, fake) -> None:
    async with rig([fake.answer]) as gateway, aiohttp.ClientSession() as client:
        for _ in range(5):
            async with client.post(f"{gateway.url}/v1/chat/completions", json=CHAT) as answer:
                await answer.read()
            await gateway.settled()
    assert gateway.servers[0].connections == 1
    assert len(gateway.servers[0].received) == 5


async def test_a_connection_that_was_closed_meanwhile_costs_nobody_an_answer(rig, fake) -> None:
    async def answers_once(received, wire) -> None:
        await fake.answer(received, wire)
        if len(gateway.servers[0].received) % 2 == 0:  # read the next request, and close without a word
            await fake.read_request(wire.reader)
            wire.reset()

    async with rig([answers_once]) as gateway, aiohttp.ClientSession() as client:
        for _ in range(6):
            async with client.post(f"{gateway.url}/v1/chat/completions", json=CHAT) as answer:
                assert answer.status == 200
            await gateway.settled()
    assert all(not outcome.error for _, outcome in gateway.recorder.outcomes)
    assert gateway.recorder.sent_to == ["a"] * 6


async def test_many_streams_at_once(rig, fake) -> None:
    width, gate = 500, asyncio.Event()
    async with rig([fake.stream(4, gate=gate)], [fake.stream(4, gate=gate)]) as gateway:
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(connector=connector) as client:

            async def one() -> bytes:
                url = f"{gateway.url}/v1/chat/completions"
                async with client.post(url, json=CHAT | {"stream": True}) as answer:
                    assert answer.status == 200
                    return await answer.read()

            asking = asyncio.gather(*(one() for _ in range(width)))
            while len(gateway.recorder.first_bytes) < width:
                await asyncio.sleep(0.01)
            assert gateway.open_load == width
            gate.set()
            answers = await asking
        await gateway.settled()
    assert len(set(answers)) == 1
    assert answers[0].endswith(b"data: [DONE]\n\n")
    assert sum(len(server.received) for server in gateway.servers) == width
    assert gateway.open_load == 0


async def test_own_routes(rig, fake) -> None:
    async with rig([fake.answer], [fake.answer]) as gateway, aiohttp.ClientSession() as client:
        first, second = gateway.pool.all
        first.models, second.models = frozenset({"m", "n"}), frozenset({"m", "o"})
        async with client.get(f"{gateway.url}/v1/models") as answer:
            assert [model["id"] for model in (await answer.json())["data"]] == ["m", "n", "o"]
        async with client.get(f"{gateway.url}/ready") as answer:
            assert (answer.status, (await answer.json())["usable_endpoints"]) == (200, 2)
        first.available = second.available = False
        async with client.get(f"{gateway.url}/ready") as answer:
            assert answer.status == 503
        async with client.get(f"{gateway.url}/health") as answer:
            assert answer.status == 200
        async with client.post(f"{gateway.url}/health") as answer:
            assert (answer.status, (await answer.json())["error"]["code"]) == (405, "method_not_allowed")
            assert "GET" in answer.headers["allow"]
    assert not gateway.servers[0].received
