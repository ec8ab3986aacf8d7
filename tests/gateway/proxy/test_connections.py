"""Connections that are kept, over real sockets."""

from __future__ import annotations

import asyncio

import pytest

from quire.gateway.endpoint import Endpoint
from quire.gateway.errors import UpstreamError
from quire.gateway.proxy.connections import Connections
from quire.gateway.proxy.settings import ProxySettings
from quire.gateway.proxy.upstream import Waits

WAITS = Waits(first_byte=5.0, idle=5.0, total=5.0)
ASK = b"GET / HTTP/1.1\r\n\r\n"


async def serve(fake, *behaviours):
    server = fake.FakeServer(list(behaviours))
    await server.start()
    return server, Endpoint("e", "127.0.0.1", server.port)


async def test_an_answer_that_ended_while_its_reader_lagged_leaves_the_connection_usable(fake) -> None:
    go = asyncio.Event()

    async def in_two(_, wire) -> None:
        await wire.write(fake.STREAM_HEAD + fake.chunk(b"first"))
        await go.wait()
        await wire.write(fake.chunk(b"second") + fake.LAST_CHUNK)

    def write(piece: bytes) -> bool:
        go.set()
        return piece == b"first"  # behind the second the reader lags

    server, endpoint = await serve(fake, in_two)
    connections = Connections(ProxySettings())
    for _ in range(3):
        go.clear()
        connection = await connections.acquire(endpoint)
        connection.send(ASK, WAITS)
        await connection.begin()
        while not await connection.relay(write):
            pass
        connections.release(endpoint, connection)
    assert server.connections == 1
    connections.close()
    await server.stop()


async def test_a_connection_with_an_unsent_request_is_not_kept(fake) -> None:
    """The endpoint answered early, and may never read the rest."""

    async def early(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 413 No\r\ncontent-length: 2\r\n\r\nno")
        reader._transport.pause_reading()
        await asyncio.Event().wait()

    tasks = set()

    async def hold(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        tasks.add(asyncio.current_task())
        try:
            await early(reader, writer)
        except asyncio.CancelledError:
            writer.transport.abort()

    server = await asyncio.start_server(hold, "127.0.0.1", 0)
    endpoint = Endpoint("e", "127.0.0.1", server.sockets[0].getsockname()[1])
    connections = Connections(ProxySettings())
    connection = await connections.acquire(endpoint)
    connection.send(b"POST / HTTP/1.1\r\ncontent-length: 33554432\r\n\r\n" + bytes(32 * 1024 * 1024), WAITS)
    await connection.begin()
    assert connection.status == 413
    connections.release(endpoint, connection)
    assert await connections.acquire(endpoint) is not connection
    connections.close()
    server.close()
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks)


async def test_a_name_that_cannot_be_is_an_endpoint_that_cannot_be_reached() -> None:
    with pytest.raises(UpstreamError, match="cannot be reached") as raised:
        await Connections(ProxySettings()).acquire(Endpoint("e", "x" * 70 + ".example", 80))
    assert raised.value.kind == "connect"
