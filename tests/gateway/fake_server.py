"""A small model server over real sockets that behaves as it is told, well or badly.

Behaviours are coroutines that get the request and the wire, and write whatever bytes they like. Run as a script it
serves well-behaved answers, for measurements: `fake_server.py PORT CHUNKS SECONDS_BETWEEN_CHUNKS`.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field


@dataclass
class Received:
    method: str
    target: str
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> dict:
        return json.loads(self.body)


class Wire:
    """The server's end of one connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self._writer = writer

    async def write(self, data: bytes) -> None:
        self._writer.write(data)
        await self._writer.drain()

    def reset(self) -> None:
        self._writer.transport.abort()

    def close(self) -> None:
        self._writer.close()

    @property
    def closing(self) -> bool:
        return self._writer.is_closing()

    async def gone(self) -> None:
        """Wait until the other side has closed."""
        with contextlib.suppress(ConnectionError):
            while await self.reader.read(65536):
                pass


Behaviour = Callable[[Received, Wire], Awaitable[None]]


def head(status: int = 200, content_type: str = "application/json", **headers: str) -> bytes:
    lines = [f"HTTP/1.1 {status} Whatever", f"content-type: {content_type}"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return ("\r\n".join(lines) + "\r\n\r\n").encode()


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


LAST_CHUNK = b"0\r\n\r\n"
STREAM_HEAD = head(200, "text/event-stream", transfer_encoding="chunked")


def event(value: object) -> bytes:
    return b"data: " + json.dumps(value).encode() + b"\n\n"


def delta(text: str) -> bytes:
    choice = {"index": 0, "delta": {"role": "assistant", "content": text}, "finish_reason": None}
    return event({"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": [choice]})


USAGE = {
    "prompt_tokens": 12,
    "completion_tokens": 5,
    "total_tokens": 17,
    "prompt_tokens_details": {"cached_tokens": 8},
}
COMPLETION = {
    "id": "c",
    "object": "chat.completion",
    "created": 1,
    "model": "m",
    "choices": [{"index": 0, "message": {"role": "assistant", "content": "hello"}, "finish_reason": "stop"}],
    "usage": USAGE,
}


async def answer(request: Received, wire: Wire) -> None:
    """A chat completion, streamed where that was asked for."""
    if request.method == "POST" and request.json.get("stream"):
        await stream(5)(request, wire)
    else:
        await body(COMPLETION)(request, wire)


def body(value: object, status: int = 200, **headers: str) -> Behaviour:
    async def behave(_: Received, wire: Wire) -> None:
        data = json.dumps(value).encode()
        await wire.write(head(status, content_length=str(len(data)), **headers) + data)

    return behave


def raw(*pieces: bytes, then: str = "close") -> Behaviour:
    """Bytes as they are, and then `close`, `reset`, `hold` the connection without reading, or take the `next`."""

    async def behave(_: Received, wire: Wire) -> None:
        for piece in pieces:
            await wire.write(piece)
        if then == "reset":
            wire.reset()
        elif then == "close":
            wire.close()
        elif then == "hold":
            await wire.gone()

    return behave


def stream(count: int, seconds: float = 0.0, *, gate: asyncio.Event | None = None) -> Behaviour:
    """`count` deltas; all but the first wait for `gate`."""

    async def behave(_: Received, wire: Wire) -> None:
        await wire.write(STREAM_HEAD + chunk(delta("w0")))
        if gate is not None:
            await gate.wait()
        for index in range(1, count):
            if seconds:
                await asyncio.sleep(seconds)
            await wire.write(chunk(delta(f" w{index}")))
        closing = {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": []}
        await wire.write(chunk(event(closing | {"usage": USAGE})) + chunk(b"data: [DONE]\n\n") + LAST_CHUNK)

    return behave


async def never(_: Received, wire: Wire) -> None:
    await wire.gone()


@dataclass
class FakeServer:
    """`behaviours` are used up one a request; the last one stays."""

    behaviours: list[Behaviour]
    received: list[Received] = field(default_factory=list)
    connections: int = 0
    """Opened so far."""
    open: int = 0
    port: int = 0
    _server: asyncio.Server | None = None
    _tasks: set[asyncio.Task] = field(default_factory=set)

    async def start(self, port: int = 0) -> None:
        self._server = await asyncio.start_server(self._connected, "127.0.0.1", port, backlog=1024)
        self.port = self._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        if self._server is not None:
            self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self.connections += 1
        self.open += 1
        wire = Wire(reader, writer)
        try:
            while not wire.closing:
                request = await read_request(reader)
                if request is None:
                    break
                self.received.append(request)
                behaviour = self.behaviours.pop(0) if len(self.behaviours) > 1 else self.behaviours[0]
                await behaviour(request, wire)
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass  # streams complain of a handler that ends in any other way than returning
        finally:
            self.open -= 1
            self._tasks.discard(task)
            writer.close()


async def read_request(reader: asyncio.StreamReader) -> Received | None:
    try:
        text = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
    except asyncio.IncompleteReadError:
        return None
    line, *rest = text.split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (entry.partition(":") for entry in rest if entry)}
    method, target, _ = line.split(" ")
    data = await reader.readexactly(int(headers.get("content-length", "0")))
    return Received(method, target, headers, data)


async def _main(port: int, count: int, seconds: float) -> None:
    async def well(request: Received, wire: Wire) -> None:
        if b'"stream":true' in request.body.replace(b" ", b""):
            await stream(count, seconds)(request, wire)
        else:
            await body(COMPLETION)(request, wire)

    server = FakeServer([well])
    await server.start(port)
    print(server.port, flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(_main(int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])))
