"""Answers of servers that send them in pieces, and where they are asked for."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator

import aiohttp
import msgspec
import pytest
from aiohttp import web

from quire.cli import client, explain, gateway_checks
from quire.cli.up import free_port
from quire.core.errors import ConfigError
from quire.fleet import probe as probes
from quire.fleet.address import url, within_reach
from quire.fleet.probe import Probe
from quire.web.bodies import read_body

FILLING = "x" * 3000
PAGES = {
    "/metrics": f"# HELP a {FILLING}\n# TYPE vllm:num_requests_running gauge\nvllm:num_requests_running 3\n",
    "/explain/one": msgspec.json.encode({"filling": FILLING, "request_id": "one"}).decode(),
    "/v1/models": msgspec.json.encode({"filling": FILLING, "data": [{"id": "m"}]}).decode(),
    "/endpoints": msgspec.json.encode({"filling": FILLING, "endpoints": []}).decode(),
}


async def in_pieces(request: web.Request) -> web.StreamResponse:
    answer = web.StreamResponse()
    answer.enable_chunked_encoding()
    await answer.prepare(request)
    page = PAGES[request.path].encode()
    for start in range(0, len(page), 30):
        await answer.write(page[start : start + 30])
        await asyncio.sleep(0)  # the reader's turn
    await answer.write_eof()
    return answer


async def served(host: str, ask):
    """What `ask(url)` comes to, of a server that answers in pieces."""
    app = web.Application()
    app.router.add_get("/{path:.*}", in_pieces)
    runner = web.AppRunner(app)
    await runner.setup()
    try:
        site = web.TCPSite(runner, host, 0)
        await site.start()
        port = runner.addresses[0][1]
        return await ask(url(within_reach(host), port))
    finally:
        await runner.cleanup()


async def in_flight(url: str) -> int | None:
    probe = Probe()
    try:
        return await probe.in_flight(url)
    finally:
        await probe.close()


async def models(url: str) -> list[str]:
    async with client.open_session(api_key=None) as session:
        return await client.list_models(session, url)


@pytest.mark.parametrize(
    ("ask", "expected"),
    [
        (in_flight, 3),
        (models, ["m"]),
        (lambda url: explain._ask(f"{url}/explain/one", None), {"filling": FILLING, "request_id": "one"}),
        (lambda url: gateway_checks._get(f"{url}/endpoints", None), PAGES["/endpoints"].encode()),
    ],
    ids=["probe", "client", "explain", "doctor"],
)
def test_an_answer_is_read_to_its_end(ask, expected):
    assert asyncio.run(served("127.0.0.1", ask)) == expected


def test_an_answer_that_is_too_long_is_no_answer(monkeypatch):
    monkeypatch.setattr(probes, "MAX_METRICS_BYTES", 100)
    assert asyncio.run(served("127.0.0.1", in_flight)) is None

    page = PAGES["/endpoints"].encode()

    async def read(url: str, limit: int) -> bytes:
        async with aiohttp.ClientSession() as session, session.get(f"{url}/endpoints") as response:
            return await read_body(response.content, limit)

    assert asyncio.run(served("127.0.0.1", lambda url: read(url, len(page)))) == page
    with pytest.raises(ValueError, match=f"more than {len(page) - 1} bytes"):
        asyncio.run(served("127.0.0.1", lambda url: read(url, len(page) - 1)))


def addresses() -> Iterator[str]:
    """What a gateway may listen on, here."""
    for host in ("127.0.0.1", "127.0.0.2", "0.0.0.0", "::1", "::", "localhost"):
        try:
            family, *_, address = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
            with socket.socket(family) as probe:
                probe.bind(address)
        except OSError:  # a machine without IPv6
            continue
        yield host


@pytest.mark.parametrize("host", list(addresses()))
def test_processes_are_probed_where_they_listen(host):
    assert asyncio.run(served(host, in_flight)) == 3
    assert free_port(host, 0) > 0


@pytest.mark.parametrize("host", ["no.such.host.invalid", "192.0.2.1", "a" * 70 + ".x", "a\0b", "999.1.1.1"])
def test_a_host_that_is_none_is_refused_in_words(host):
    with pytest.raises(ConfigError) as refused:
        free_port(host, 0)
    assert refused.value.param == "host"
