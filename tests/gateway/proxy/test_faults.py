"""Endpoints that break, lie, stall and flood: the client always gets a whole answer or a typed end."""

from __future__ import annotations

import asyncio
import itertools
import json

import aiohttp
import openai
import pytest
import uvloop

from quire.gateway.proxy.settings import ProxySettings
from quire.gateway.resilience.settings import ResilienceSettings

CHAT = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
QUICK = ProxySettings(connect_timeout=0.5, first_byte_timeout=0.2, idle_timeout=0.2)


async def ask(gateway, path: str = "/v1/chat/completions", **more: object) -> tuple[int, bytes, dict]:
    async with (
        aiohttp.ClientSession() as client,
        client.post(gateway.url + path, json=CHAT | more) as answer,
    ):
        return answer.status, await answer.read(), {name.lower(): value for name, value in answer.headers.items()}


def endless(*first: bytes, piece: bytes):
    async def behave(_, wire) -> None:
        for one in first:
            await wire.write(one)
        while not wire.closing:
            await wire.write(piece)

    return behave


HOSTILE = {
    "no HTTP": lambda fake: fake.raw(b"\x00\x01\x02 hello\r\n\r\n"),
    "HTTP of another kind": lambda fake: fake.raw(b"SSH-2.0-OpenSSH_9.6\r\n"),
    "closed without a word": lambda fake: fake.raw(),
    "reset": lambda fake: fake.raw(b"HTTP/1.1 200", then="reset"),
    "closed within the head": lambda fake: fake.raw(b"HTTP/1.1 200 OK\r\ncontent-type: app"),
    "closed behind the head": lambda fake: fake.raw(fake.head(200, content_length="10")),
    "a header without end": lambda fake: endless(b"HTTP/1.1 200 OK\r\nx: ", piece=b"y" * 4096),
    "headers without end": lambda fake: endless(b"HTTP/1.1 200 OK\r\n", piece=b"x: y\r\n" * 100),
    "interim answers without end": lambda fake: endless(piece=b"HTTP/1.1 100 Continue\r\n\r\n"),
    "a chunk size without end": lambda fake: endless(fake.head(200, transfer_encoding="chunked"), piece=b"0" * 4096),
    "two lengths": lambda fake: fake.raw(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\ncontent-length: 3\r\n\r\n{}"),
    "length and chunks": lambda fake: fake.raw(
        fake.head(200, content_length="5", transfer_encoding="chunked") + b"0\r\n\r\n"
    ),
    "a length that is none": lambda fake: fake.raw(b"HTTP/1.1 200 OK\r\ncontent-length: many\r\n\r\n{}"),
    "a status that is none": lambda fake: fake.raw(b"HTTP/1.1 999 OK\r\ncontent-length: 2\r\n\r\n{}"),
    "another protocol": lambda fake: fake.raw(
        b"HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: h2c\r\n\r\n"
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
async def test_an_endpoint_that_speaks_no_http_is_a_bad_gateway(rig, fake, name) -> None:
    async with rig([HOSTILE[name](fake)], settings=QUICK) as gateway:
        status, body, headers = await ask(gateway)
        await gateway.settled()
    error = json.loads(body)["error"]
    assert (status, error["code"]) == (502, "upstream_error")
    assert headers["content-type"] == "application/json"
    ((_, outcome),) = gateway.recorder.outcomes
    assert outcome.error in ("garbage", "reset")
    assert gateway.open_load == 0


@pytest.mark.parametrize("name", HOSTILE)
async def test_another_endpoint_takes_over(rig, fake, name) -> None:
    async with rig([HOSTILE[name](fake)], [fake.answer], settings=QUICK) as gateway:
        status, body, _ = await ask(gateway)
        await gateway.settled()
    assert (status, json.loads(body)["object"]) == (200, "chat.completion")
    assert gateway.recorder.sent_to == ["a", "b"]
    assert gateway.open_load == 0


async def test_truncated_answers_are_never_passed_on_as_whole(rig, fake) -> None:
    half = fake.raw(fake.head(200, content_length="1000") + b'{"object": "chat.com')
    async with rig([half], [fake.answer]) as gateway:
        status, body, _ = await ask(gateway)
        await gateway.settled()
    assert (status, json.loads(body)["error"]["code"]) == (502, "upstream_error")
    assert gateway.recorder.sent_to == ["a"]  # its first byte was there: no second try


async def test_an_endpoint_that_never_answers_is_a_timeout(rig, fake) -> None:
    async with rig([fake.never], [fake.answer], settings=QUICK) as gateway:
        status, body, headers = await ask(gateway)
        await gateway.settled()
    assert (status, json.loads(body)["error"]["code"]) == (504, "upstream_timeout")
    assert "retry-after" in headers
    assert gateway.recorder.outcomes[0][1].error == "timeout"


async def test_an_endpoint_that_drips_is_cut_off_by_the_total(rig, fake) -> None:
    async def drips(_, wire) -> None:
        await wire.write(fake.head(200, content_length="100000"))
        while not wire.closing:
            await wire.write(b"x")
            await asyncio.sleep(0.05)

    async with rig([drips], settings=ProxySettings(total_timeout=0.3)) as gateway:
        status, body, _ = await ask(gateway)
    assert (status, json.loads(body)["error"]["code"]) == (504, "upstream_timeout")


async def test_nobody_listens(rig, fake) -> None:
    async with rig([fake.answer]) as gateway:
        await gateway.servers[0].stop()
        status, body, _ = await ask(gateway)
    assert (status, json.loads(body)["error"]["code"]) == (502, "upstream_error")
    assert "cannot be reached" in json.loads(body)["error"]["message"]


async def test_without_endpoints_the_reason_is_in_a_header(rig, fake) -> None:
    async with rig() as gateway:
        status, body, headers = await ask(gateway)
        assert (status, json.loads(body)["error"]["code"]) == (503, "no_endpoint")
        assert headers["x-llm-d-request-dropped-reason"] == "rejected-no-endpoints"
        assert headers["retry-after"] == "1"
        _, body, _ = await ask(gateway, "/v1/messages")
        assert json.loads(body)["error"]["type"] == "overloaded_error"


# --- streams that break off ---------------------------------------------------------------------------------


def breaks_off(fake, how: str, *pieces: bytes):
    return fake.raw(fake.STREAM_HEAD, *map(fake.chunk, pieces), then=how)


async def read_words(stream, words: list[str]) -> None:
    async for chunk in stream:
        words.append(chunk.choices[0].delta.content)


async def broken_stream(rig, fake, how: str) -> None:
    half_an_event = fake.delta(" never")[:-20]
    behave = breaks_off(fake, how, fake.delta("w0"), fake.delta(" w1"), half_an_event)
    async with rig([behave], [fake.answer], settings=QUICK) as gateway, gateway.openai() as client:
        stream = await client.chat.completions.create(model="m", messages=CHAT["messages"], stream=True)
        words: list[str] = []
        with pytest.raises(openai.APIError) as caught:
            await read_words(stream, words)
        await gateway.settled()
        assert words == ["w0", " w1"]
        assert caught.value.code in ("upstream_error", "upstream_timeout")
        _, body, _ = await ask(gateway, stream=True)  # `a` again, for the load is the same
    assert body.count(b"data: ") == 3
    assert b"[DONE]" not in body
    assert b"never" not in body
    assert gateway.recorder.sent_to == ["a", "a"]
    assert {outcome.error for _, outcome in gateway.recorder.outcomes} <= {"reset", "timeout"}


@pytest.mark.parametrize("how", ["reset", "close", "hold"])
async def test_a_stream_that_breaks_off_ends_with_an_error(rig, fake, how) -> None:
    await broken_stream(rig, fake, how)


@pytest.mark.parametrize("how", ["reset", "close", "hold"])
def test_a_stream_that_breaks_off_ends_with_an_error_on_uvloop(rig, fake, how) -> None:
    uvloop.run(broken_stream(rig, fake, how))


async def test_a_stream_that_breaks_off_within_a_long_event_ends_with_an_error_too(rig, fake) -> None:
    part = b"data: " + b"x" * 100_000
    async with rig([breaks_off(fake, "close", part)]) as gateway:
        _, told, _ = await ask(gateway, stream=True)
    *_, last = told.strip().split(b"\n\n")
    assert json.loads(last.removeprefix(b"data: "))["error"]["code"] == "upstream_error"


async def test_anthropics_streams_end_with_their_error_event(rig, fake) -> None:
    begun = b'event: message_start\ndata: {"type":"message_start"}\n\n'
    async with rig([breaks_off(fake, "reset", begun)]) as gateway:
        _, body, _ = await ask(gateway, "/v1/messages", stream=True)
    rest = body.removeprefix(begun)
    name, data = rest.decode().strip().split("\n")
    assert name == "event: error"
    assert json.loads(data.removeprefix("data: "))["error"]["type"] == "api_error"


async def test_a_stream_that_dies_before_its_first_byte_is_replayed(rig, fake) -> None:
    async with rig([fake.raw(fake.STREAM_HEAD, then="reset")], [fake.stream(3)]) as gateway:
        status, body, _ = await ask(gateway, stream=True)
    assert status == 200
    assert body.endswith(b"data: [DONE]\n\n")
    assert [len(server.received) for server in gateway.servers] == [1, 1]


# --- when it is tried again ---------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [429, 502, 503, 504])
async def test_a_busy_endpoint_is_left_for_another(rig, fake, status) -> None:
    async with rig([fake.body({"busy": 1}, status)], [fake.answer]) as gateway:
        got, _, _ = await ask(gateway)
        await gateway.settled()
    assert got == 200
    assert [len(server.received) for server in gateway.servers] == [1, 1]
    assert gateway.recorder.first_bytes == ["b"]


@pytest.mark.parametrize("status", [400, 404, 422, 500])
async def test_other_errors_are_the_answer(rig, fake, status) -> None:
    async with rig([fake.body({"no": 1}, status)], [fake.answer]) as gateway:
        got, body, _ = await ask(gateway)
    assert (got, json.loads(body)) == (status, {"no": 1})
    assert not gateway.servers[1].received


async def test_when_all_are_busy_the_last_ones_word_counts(rig, fake) -> None:
    busy = [[fake.body({"from": name}, 503, retry_after="7")] for name in "abcd"]
    async with rig(*busy, settings=ProxySettings(max_retries=2)) as gateway:
        status, body, headers = await ask(gateway)
    assert (status, json.loads(body)["from"], headers["retry-after"]) == (503, "c", "7")
    assert gateway.recorder.sent_to == ["a", "b", "c"]


async def test_what_is_not_known_to_be_harmless_is_not_done_twice(rig, fake) -> None:
    async with rig([fake.raw()], [fake.answer]) as gateway:
        status, _, _ = await ask(gateway, "/v1/load_lora_adapter")
        assert status == 502
    assert not gateway.servers[1].received


async def test_what_is_not_known_to_be_harmless_goes_out_on_a_fresh_connection(rig, fake) -> None:
    async def answers_first(received, wire) -> None:
        if len(gateway.servers[0].received) == 1:
            await fake.answer(received, wire)
        else:
            wire.reset()

    async with rig([answers_first]) as gateway:
        assert (await ask(gateway))[0] == 200
        await gateway.settled()
        assert (await ask(gateway, "/v1/load_lora_adapter"))[0] == 502
    assert [len(gateway.servers[0].received), gateway.servers[0].connections] == [2, 2]


async def test_retries_stay_within_their_budget(rig, fake) -> None:
    settings = ProxySettings(
        resilience=ResilienceSettings(retry_share=0.1, retry_burst=5, consecutive_failures=10**6, min_attempts=10**6)
    )
    async with rig([fake.body({}, 503)], [fake.body({}, 503)], settings=settings) as gateway:
        for _ in range(40):
            await ask(gateway)
        await gateway.settled()
    assert 45 <= len(gateway.recorder.sent_to) <= 40 + 5 + 4


async def test_a_failing_endpoint_is_ejected_and_comes_back(rig, fake) -> None:
    well = asyncio.Event()

    async def sick_at_first(received, wire) -> None:
        await (fake.answer if well.is_set() else fake.raw())(received, wire)

    settings = ProxySettings(resilience=ResilienceSettings(ejection=0.2))
    async with rig([sick_at_first], [fake.answer], settings=settings) as gateway, aiohttp.ClientSession() as http:
        for _ in range(12):
            status, _, _ = await ask(gateway)
            assert status == 200
        first = gateway.pool.all[0]
        assert not first.available
        assert gateway.recorder.sent_to.count("a") == 5
        well.set()
        gateway.app.start(http)
        while not first.available:
            await asyncio.sleep(0.01)
        await ask(gateway)
        await gateway.settled()
    assert gateway.recorder.outcomes[-1][0] == "a"
    assert not gateway.recorder.outcomes[-1][1].error


async def test_nothing_is_answered_twice_or_lost_when_endpoints_flap(rig, fake) -> None:
    """Each answer carries the body's number back; each endpoint fails every third request in some way."""
    count = 150
    ways = itertools.cycle([fake.raw(), fake.raw(b"garbage\r\n\r\n"), fake.body({}, 503), fake.raw(then="reset")])

    def flapping():
        turn = itertools.count()

        async def behave(received, wire) -> None:
            if next(turn) % 3 == 0:
                await next(ways)(received, wire)
            else:
                answered.append(received.json["seed"])
                await fake.body({"seed": received.json["seed"]})(received, wire)

        return behave

    answered: list[int] = []
    resilience = ResilienceSettings(retry_share=2.0, retry_burst=1000, consecutive_failures=1000, min_attempts=1000)
    settings = ProxySettings(max_retries=3, resilience=resilience)
    async with rig(*([flapping()] for _ in range(4)), settings=settings) as gateway:
        semaphore = asyncio.Semaphore(16)
        async with aiohttp.ClientSession() as client:

            async def one(seed: int) -> int | None:
                async with semaphore:
                    url = f"{gateway.url}/v1/chat/completions"
                    async with client.post(url, json=CHAT | {"seed": seed}) as answer:
                        return (await answer.json())["seed"] if answer.status == 200 else None

            got = await asyncio.gather(*map(one, range(count)))
        await gateway.settled()
    served = [seed for seed in got if seed is not None]
    assert sorted(answered) == sorted(served)
    assert len(served) >= count * 0.95
    assert all(seed == index for index, seed in enumerate(got) if seed is not None)
    assert gateway.open_load == 0
    assert sum(not outcome.error and outcome.status == 200 for _, outcome in gateway.recorder.outcomes) == len(served)
