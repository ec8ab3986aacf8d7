"""How many tokens a prompt has: estimated, learnt, and asked for over real HTTP."""

from __future__ import annotations

import json
import random
from collections.abc import AsyncIterator

import aiohttp
import msgspec
import pytest
from aiohttp import web

from quire.gateway.endpoint import Endpoint, Pool
from quire.gateway.plugin import Plugin, Services
from quire.gateway.producers.tokens import EXACT, HTTP, RenderParameters, TokenParameters, TokenProducer, token_ids_of
from quire.gateway.request import Api, InferenceRequest, Outcome

ENDPOINT = Endpoint("a", "127.0.0.1", 1)


def producer(parameters: TokenParameters | None = None, **shared: object) -> TokenProducer:
    services = Services(Pool(), lambda: 0.0, random.Random(0), lambda name: Plugin(), dict(shared))
    return TokenProducer(parameters or TokenParameters(), services)


def request(prompt: bytes, **fields: object) -> InferenceRequest:
    values: dict[str, object] = {"id": "r", "path": "/v1/completions", "api": Api.COMPLETIONS, "model": "m"}
    body = json.dumps({"model": "alias", "prompt": prompt.decode("latin-1"), "max_tokens": 3}).encode()
    values |= {"target_model": "m", "body": body, "headers": {}, "arrived": 0.0, "prompt": prompt}
    return InferenceRequest(**(values | fields))  # type: ignore[arg-type]


def estimate(plugin: TokenProducer, one: InferenceRequest) -> int:
    assert plugin.produce(one, []) is None
    return one.prompt_tokens


def test_four_bytes_are_a_token_until_answers_say_otherwise() -> None:
    plugin = producer()
    assert estimate(plugin, request(b"x" * 4000)) == 1000
    assert estimate(plugin, request(b"")) == 0
    assert estimate(plugin, request(b"x")) == 1
    plugin.finished(request(b"hi"), ENDPOINT, Outcome(status=200, prompt_tokens=30))
    assert estimate(plugin, request(b"x" * 4000)) == pytest.approx(1000, rel=0.05)  # 30 tokens, mostly the template's
    for _ in range(200):
        plugin.finished(request(b"x" * 4000), ENDPOINT, Outcome(status=200, prompt_tokens=2000))
    assert estimate(plugin, request(b"x" * 4000)) == pytest.approx(2000, rel=0.05)
    assert estimate(plugin, request(b"x" * 4000, target_model="another")) == 1000


@pytest.mark.parametrize("lie", [2**31 - 1, 1])
def test_one_answer_that_lies_is_worth_no_more_than_its_bytes_allow(lie: int) -> None:
    plugin = producer()
    for _ in range(100):
        plugin.finished(request(b"x" * 4000), ENDPOINT, Outcome(status=200, prompt_tokens=1000))
    plugin.finished(request(b"x" * 4000), ENDPOINT, Outcome(status=200, prompt_tokens=lie))
    assert estimate(plugin, request(b"x" * 4000)) == pytest.approx(1000, rel=0.25)
    for _ in range(100):
        plugin.finished(request(b"x" * 4000), ENDPOINT, Outcome(status=200, prompt_tokens=1000))
    assert estimate(plugin, request(b"x" * 4000)) == pytest.approx(1000, rel=0.05)


def test_failures_and_answers_without_numbers_teach_nothing() -> None:
    plugin = producer()
    for outcome in (Outcome(status=500, prompt_tokens=9), Outcome(status=200), Outcome(status=200, prompt_tokens=0)):
        for _ in range(100):
            plugin.finished(request(b"x" * 4000), ENDPOINT, outcome)
    assert estimate(plugin, request(b"x" * 4000)) == 1000


def test_ids_that_the_client_sent_are_the_tokens() -> None:
    one = request(b"\1\0\0\0\2\0\0\0", prompt_token_ids=[1, 2])
    assert estimate(producer(**{EXACT: True}), one) == 2
    assert one.token_ids == [1, 2]


@pytest.fixture
async def served() -> AsyncIterator[tuple[Endpoint, aiohttp.ClientSession, list[tuple[str, dict[str, object]]]]]:
    """An endpoint that tokenises each character as its number."""
    asked: list[tuple[str, dict[str, object]]] = []

    async def tokenize(call: web.Request) -> web.Response:
        body = await call.json()
        asked.append((call.headers.get("authorization", ""), body))
        return web.json_response({"count": len(body["prompt"]), "tokens": [ord(one) for one in body["prompt"]]})

    async def render(call: web.Request) -> web.Response:
        body = await call.json()
        return web.json_response([{"prompt": body["prompt"], "prompt_token_ids": [ord(one) for one in body["prompt"]]}])

    app = web.Application(client_max_size=2**24)
    app.router.add_post("/tokenize", tokenize)
    app.router.add_post("/v1/completions/render", render)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    port = runner.addresses[0][1]
    async with aiohttp.ClientSession() as session:
        yield Endpoint("a", "127.0.0.1", port), session, asked
    await runner.cleanup()


Served = tuple[Endpoint, aiohttp.ClientSession, list[tuple[str, dict[str, object]]]]


async def test_an_endpoint_is_asked_for_the_exact_tokens(served: Served) -> None:
    endpoint, session, asked = served
    plugin = producer(**{EXACT: True, HTTP: session})
    one = request(b"abc" * 100_000, headers={"authorization": "Bearer key"})  # an answer of many pieces
    pending = plugin.produce(one, [endpoint])
    assert pending is not None
    await pending
    assert one.token_ids == [97, 98, 99] * 100_000
    assert one.prompt_tokens == 300_000
    ((key, body),) = asked
    assert key == "Bearer key"
    assert (body["model"], "max_tokens" in body) == ("m", False)


async def test_a_render_endpoint_is_asked_where_the_parameters_name_it(served: Served) -> None:
    endpoint, session, _ = served
    parameters = TokenParameters(vllm=RenderParameters(url=endpoint.url + "/"))
    plugin = producer(parameters, **{HTTP: session})
    one = request(b"abc")
    pending = plugin.produce(one, [])
    assert pending is not None
    await pending
    assert one.token_ids == [97, 98, 99]


async def test_who_does_not_know_tokenize_leaves_the_estimate(served: Served) -> None:
    endpoint, session, _ = served
    plugin = producer(TokenParameters(vllm=RenderParameters(url=endpoint.url + "/nothing")), **{HTTP: session})
    one = request(b"x" * 400)
    pending = plugin.produce(one, [])
    assert pending is not None
    with pytest.raises(aiohttp.ClientResponseError):
        await pending
    assert (one.token_ids, one.prompt_tokens) == (None, 100)


def test_only_token_ids_are_taken_for_such() -> None:
    assert token_ids_of(b'{"tokens": [1, 2], "count": 2}') == [1, 2]
    assert token_ids_of(b'[{"token_ids": [4294967295]}]') == [4294967295]
    assert token_ids_of(b'[{"token_ids": [1]}, {"token_ids": [2]}]') is None
    assert token_ids_of(b"{}") is None
    for wrong in (b'{"tokens": [-1]}', b'{"tokens": [4294967296]}', b'{"tokens": ["1"]}', b"[", b"7"):
        with pytest.raises(msgspec.DecodeError):
            token_ids_of(wrong)
