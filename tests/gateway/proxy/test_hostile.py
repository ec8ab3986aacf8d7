"""Clients on bare sockets that speak HTTP as nobody should, or as few do."""

from __future__ import annotations

import asyncio
import contextlib
import json

import pytest

BODY = json.dumps({"model": "m", "messages": []}).encode()


def post(*headers: bytes, body: bytes = BODY) -> bytes:
    lines = [b"POST /v1/chat/completions HTTP/1.1", b"host: x", b"content-length: %d" % len(body), *headers]
    return b"\r\n".join(lines) + b"\r\n\r\n" + body


def streamed() -> bytes:
    return post(body=json.dumps({"model": "m", "messages": [], "stream": True}).encode())


HEALTH = b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n"


def begun_and_held(fake):
    """A stream that begins, and goes on until the gateway ends it."""
    return fake.raw(fake.STREAM_HEAD + fake.chunk(fake.delta("w0")), then="hold")


async def until(condition) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.005)


async def read_answer(reader: asyncio.StreamReader) -> tuple[bytes, bytes]:
    """Head and body of an answer that says its length."""
    async with asyncio.timeout(10):
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
        return head, await reader.readexactly(length)


async def test_whoever_leaves_with_requests_in_line_ends_the_one_that_runs(rig, fake) -> None:
    async with rig([begun_and_held(fake)]) as gateway:
        reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
        writer.write(streamed() + post())
        await reader.readuntil(b"w0")
        writer.close()
        await until(lambda: gateway.servers[0].open == 0)
        await gateway.settled()
        assert [outcome.error for _, outcome in gateway.recorder.outcomes] == ["cancelled"]
        assert len(gateway.servers[0].received) == 1


async def test_requests_in_line_are_answered_in_order(rig, fake) -> None:
    async with rig([fake.body({"answer": 1}), fake.body({"answer": 2})]) as gateway:
        reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
        writer.write(post() + HEALTH * 20 + post())
        answers = [(await read_answer(reader))[1] for _ in range(22)]
        assert answers[0] == b'{"answer": 1}'
        assert answers[-1] == b'{"answer": 2}'
        assert set(answers[1:-1]) == {b'{"status":"ok"}'}
        writer.close()


async def test_the_line_is_bounded(rig, fake) -> None:
    async with rig([begun_and_held(fake)]) as gateway:
        reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
        writer.write(streamed() + HEALTH * 1000)
        with contextlib.suppress(ConnectionError):
            async with asyncio.timeout(10):
                await reader.read()
        writer.close()
        await until(lambda: gateway.servers[0].open == 0)


async def test_nothing_is_said_into_the_answer_of_another_request(rig, fake) -> None:
    """A wrong request in line behind a stream ends the connection; an answer to it would stand within the stream."""
    async with rig([begun_and_held(fake)]) as gateway:
        reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
        writer.write(streamed() + post())
        await reader.readuntil(b"w0")
        writer.write(b"garbage\r\n\r\n")
        said = b""
        with contextlib.suppress(ConnectionError):
            async with asyncio.timeout(10):
                said = await reader.read()
        assert b"HTTP/1.1" not in said
        writer.close()


@pytest.mark.parametrize("offer", [b"h2c", b"websocket"])
@pytest.mark.parametrize("apart", [False, True])
async def test_an_upgrade_that_is_offered_is_not_taken(rig, fake, offer, apart) -> None:
    """Java's HttpClient offers h2c with each first request."""
    async with rig([fake.body({"answer": 1})]) as gateway:
        reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
        message = post(b"connection: Upgrade, HTTP2-Settings", b"upgrade: " + offer, b"http2-settings: AAMAAABk")
        head, _, body = message.partition(b"\r\n\r\n")
        writer.write(head + b"\r\n\r\n")
        if apart:
            await asyncio.sleep(0.05)
        writer.write(body)
        assert (await read_answer(reader))[1] == b'{"answer": 1}'
        writer.write(message + post())
        for _ in range(2):
            assert (await read_answer(reader))[1] == b'{"answer": 1}'
        received = gateway.servers[0].received
        assert [request.body for request in received] == [BODY] * 3
        assert not any({"upgrade", "http2-settings", "connection"} & set(request.headers) for request in received)
        writer.close()


async def test_a_tunnel_is_refused(rig, fake) -> None:
    async with rig([fake.answer]) as gateway:
        reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
        writer.write(b"CONNECT elsewhere:443 HTTP/1.1\r\nhost: elsewhere:443\r\n\r\n")
        assert (await read_answer(reader))[0].startswith(b"HTTP/1.1 400 ")
        assert not gateway.servers[0].received
        writer.close()


async def test_trailers_of_a_request_are_no_headers(rig, fake) -> None:
    """A proxy in front that sets or removes a header would be got around."""
    async with rig([fake.body({"answer": 1})]) as gateway:
        reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
        head = (
            b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nx-session-id: mine\r\ntransfer-encoding: chunked\r\n\r\n"
        )
        writer.write(head + b"%x\r\n%b\r\n0\r\nx-session-id: another\r\nx-late: yes\r\n\r\n" % (len(BODY), BODY))
        await read_answer(reader)
        headers = gateway.servers[0].received[0].headers
        assert headers["x-session-id"] == "mine"
        assert "x-late" not in headers
        writer.close()


async def test_too_many_trailers(rig, fake) -> None:
    async with rig([fake.answer]) as gateway:
        reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
        head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n"
        writer.write(head + b"0\r\n" + b"a: b\r\n" * 200)
        assert (await read_answer(reader))[0].startswith(b"HTTP/1.1 431 ")
        writer.close()


async def test_a_client_of_http_1_0_gets_no_chunks(rig, fake) -> None:
    async with rig([fake.raw(fake.STREAM_HEAD + fake.chunk(fake.delta("w0")) + fake.chunk(b""))]) as gateway:
        reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
        writer.write(streamed().replace(b"HTTP/1.1", b"HTTP/1.0", 1))
        async with asyncio.timeout(10):
            received = await reader.read()
        writer.close()
        head, _, body = received.partition(b"\r\n\r\n")
        assert b"transfer-encoding" not in head.lower()
        assert body == fake.delta("w0")


async def test_errors_on_anthropic_paths_have_its_shape(rig, fake) -> None:
    async with rig([]) as gateway:
        for path in (b"/v1/messages", b"/v1/messages/count_tokens?beta=true"):
            reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
            writer.write(b"POST " + path + b" HTTP/1.1\r\nhost: x\r\ncontent-length: 1000000000000\r\n\r\n")
            head, body = await read_answer(reader)
            assert b" 413 " in head
            told = json.loads(body)
            assert (told["type"], told["error"]["type"]) == ("error", "request_too_large")
            writer.close()
