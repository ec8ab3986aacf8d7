"""What the gateway itself costs: CPU per request and per streamed piece, added latency, memory.

Three processes: a fake model server that answers at once, `quire gateway` with its default policy, and this client.
CPU is the gateway's own process time, so that it is per core whatever else the machine does.

    python benchmarks/gateway_cost.py                      # everything, about a minute
    python benchmarks/gateway_cost.py --only chunks memory --requests 100000
"""

from __future__ import annotations

import argparse
import asyncio
import json
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

import psutil
import uvloop

PIECE = (
    b"data: "
    + json.dumps(
        {
            "id": "chatcmpl-0123456789abcdef",
            "object": "chat.completion.chunk",
            "created": 1700000000,
            "model": "m",
            "choices": [{"index": 0, "delta": {"content": " word"}, "logprobs": None, "finish_reason": None}],
        }
    ).encode()
    + b"\n\n"
)
ANSWER = json.dumps(
    {
        "id": "chatcmpl-0123456789abcdef",
        "object": "chat.completion",
        "created": 1700000000,
        "model": "m",
        "choices": [{"index": 0, "message": {"role": "assistant", "content": "word " * 50}, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 10, "completion_tokens": 50, "total_tokens": 60},
    }
).encode()
ANSWER_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
PAGES = {
    b"/v1/models": b'{"object": "list", "data": [{"id": "m", "object": "model"}]}',
    b"/metrics": b"".join(
        b'vllm:%b{engine="0",model_name="m"} %d\n' % (name, value)
        for name, value in ((b"num_requests_waiting", 0), (b"num_requests_running", 3), (b"kv_cache_usage_perc", 0))
    ),
}
STREAM_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
PATH = "/v1/chat/completions"


# --- the model server ---------------------------------------------------------------------------------------


class ModelServer(asyncio.Protocol):
    """Streams `pieces` pieces `seconds` apart where a request says so in `user`, else answers at once."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self.transport = transport
        self.data = bytearray()
        self.timer: asyncio.TimerHandle | None = None

    def connection_lost(self, exc: Exception | None) -> None:
        if self.timer is not None:
            self.timer.cancel()

    def data_received(self, data: bytes) -> None:
        self.data += data
        end = self.data.find(b"\r\n\r\n")
        if end < 0:
            return
        at = self.data.find(b"content-length: ")
        length = int(self.data[at + 16 : self.data.find(b"\r\n", at)]) if at >= 0 else 0
        if len(self.data) < end + 4 + length:
            return
        target = bytes(self.data[:end]).split(b" ", 2)[1]
        body = bytes(self.data[end + 4 :])
        self.data.clear()
        plan = body.find(b'"user": "')
        if plan < 0:
            answer = PAGES.get(target, ANSWER)
            self.transport.write(ANSWER_HEAD % len(answer) + answer)
            return
        pieces, seconds = body[plan + 9 : body.find(b'"', plan + 9)].split(b"/")
        self.transport.write(STREAM_HEAD)
        self.send(int(pieces), float(seconds))

    def send(self, left: int, seconds: float) -> None:
        if not left:
            self.transport.write(b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n")
            return
        self.transport.write(b"%x\r\n%b\r\n" % (len(PIECE), PIECE))
        self.timer = asyncio.get_running_loop().call_later(seconds, self.send, left - 1, seconds)


async def serve_model(port: int) -> None:
    server = await asyncio.get_running_loop().create_server(ModelServer, "127.0.0.1", port, backlog=4096)
    await server.serve_forever()


# --- the client ---------------------------------------------------------------------------------------------


class Client(asyncio.Protocol):
    """One connection, one request at a time, as little work as can be."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self.transport = transport
        self.waiting: asyncio.Future[float] | None = None

    def connection_lost(self, exc: Exception | None) -> None:
        if self.waiting is not None and not self.waiting.done():
            self.waiting.set_exception(ConnectionError("the connection was closed"))

    async def ask(self, request: bytes) -> float:
        """Seconds to the first byte of the answer; returns when the answer is whole."""
        self.tail, self.first, self.began, self.wanted = b"", 0.0, time.perf_counter(), -1
        self.waiting = asyncio.get_running_loop().create_future()
        self.transport.write(request)
        return await self.waiting

    def data_received(self, data: bytes) -> None:
        assert self.waiting is not None
        if not self.first:
            self.first = time.perf_counter() - self.began
        self.tail = self.tail[-4096:] + data
        if self.wanted < 0 and b"\r\n\r\n" in self.tail:
            if b" 200 " not in self.tail[:16]:
                self.waiting.set_exception(ConnectionError(self.tail[:300].decode("latin-1")))
                return
            chunked = b"transfer-encoding: chunked" in self.tail
            self.wanted = 0 if chunked else 1
        whole = self.tail.endswith(b"0\r\n\r\n") if self.wanted == 0 else self.tail.endswith(ANSWER[-40:])
        if whole and not self.waiting.done():
            self.waiting.set_result(self.first)


async def connect(port: int) -> Client:
    _, client = await asyncio.get_running_loop().create_connection(Client, "127.0.0.1", port)
    return client


def request_bytes(prompt: str = "hello", plan: str = "") -> bytes:
    body: dict[str, object] = {"model": "m", "messages": [{"role": "user", "content": prompt}]}
    if plan:
        body |= {"stream": True, "user": plan}
    data = json.dumps(body).encode()
    return (
        f"POST {PATH} HTTP/1.1\r\nhost: gateway\r\ncontent-type: application/json\r\naccept: */*\r\n"
        f"authorization: Bearer none\r\nuser-agent: gateway_cost\r\ncontent-length: {len(data)}\r\n\r\n"
    ).encode() + data


@dataclass
class Bench:
    gateway: int
    upstream: int
    process: psutil.Process
    requests: int
    report: dict[str, object] = field(default_factory=dict)

    def cpu(self) -> float:
        times = self.process.cpu_times()
        return times.user + times.system

    def say(self, name: str, value: float, unit: str) -> None:
        self.report[name] = round(value, 3)
        print(f"{name:44} {value:12.2f} {unit}", flush=True)

    async def closed_loop(self, request: bytes, count: int, width: int) -> tuple[float, float]:
        """Seconds, and the gateway's CPU seconds, for `count` requests over `width` connections."""
        clients = [await connect(self.gateway) for _ in range(width)]

        async def run(client: Client) -> None:
            for _ in range(count // width):
                await client.ask(request)
            client.transport.close()

        cpu, began = self.cpu(), time.perf_counter()
        await asyncio.gather(*map(run, clients))
        return time.perf_counter() - began, self.cpu() - cpu

    async def requests_per_second(self) -> None:
        count = 5000
        await self.closed_loop(request_bytes(), 1000, 32)
        seconds, cpu = await self.closed_loop(request_bytes(), count, 32)
        self.say("non-streaming, with client and server", count / seconds, "requests/s")
        self.say("non-streaming, per core of the gateway", count / cpu, "requests/s")

    async def large_prompts(self) -> None:
        count = 480
        words = "The quick brown fox jumps over the lazy dog. "
        request = request_bytes(words * (220 * 1024 // len(words)))
        seconds, cpu = await self.closed_loop(request, count, 8)
        self.say("220 KB prompts, with client and server", count / seconds, "requests/s")
        self.say("220 KB prompts, per core of the gateway", count / cpu, "requests/s")

    async def chunks(self) -> None:
        for width, pieces, seconds in ((50, 200, 0.02), (100, 200, 0.01), (200, 200, 0.01)):
            request = request_bytes(plan=f"{pieces}/{seconds}")
            _, cpu = await self.closed_loop(request, width, width)
            rate = width / seconds
            self.say(f"{width} streams, {rate:.0f} pieces/s", cpu / (width * pieces) * 1e6, "us CPU per piece")

    async def streams(self) -> None:
        width = 2000
        before = self.process.memory_info().rss
        request = request_bytes(plan="20/0.5")
        clients = [await connect(self.gateway) for _ in range(width)]
        answers = asyncio.gather(*(client.ask(request) for client in clients), return_exceptions=True)
        await asyncio.sleep(5)
        held = self.process.memory_info().rss - before
        failed = [answer for answer in await answers if isinstance(answer, BaseException)]
        for client in clients:
            client.transport.close()
        for error in sorted({str(one)[-300:] for one in failed})[:3]:
            print(error)
        self.say("2000 concurrent streams: failed", len(failed), "streams")
        self.say("2000 concurrent streams: memory", held / width / 1024, "KiB per stream")

    async def latency(self) -> None:
        """Of the round that the rest of the machine disturbed least."""
        added: dict[str, list[float]] = {"p50": [], "p99": []}
        for _ in range(5):
            direct, through = [
                await self.open_loop(port, rate=200, count=600) for port in (self.upstream, self.gateway)
            ]
            for name, index in (("p50", 49), ("p99", 98)):
                values = [statistics.quantiles(took, n=100)[index] for took in (through, direct)]
                added[name].append((values[0] - values[1]) * 1e3)
        for name, values in added.items():
            self.say(f"added latency {name} at 200 requests/s", min(values), "ms")
            self.say(f"  worst of {len(values)} rounds", max(values), "ms")

    async def open_loop(self, port: int, rate: float, count: int) -> list[float]:
        request = request_bytes()
        idle: list[Client] = [await connect(port) for _ in range(16)]
        took: list[float] = []

        async def one() -> None:
            client = idle.pop() if idle else await connect(port)
            took.append(await client.ask(request))
            idle.append(client)

        began, tasks = time.perf_counter(), []
        for index in range(count):
            await asyncio.sleep(max(began + index / rate - time.perf_counter(), 0))
            tasks.append(asyncio.create_task(one()))
        await asyncio.gather(*tasks)
        for client in idle:
            client.transport.close()
        return took

    async def memory(self) -> None:
        await self.closed_loop(request_bytes(), 5000, 32)
        before = self.process.memory_info().rss
        await self.closed_loop(request_bytes(), self.requests, 32)
        grown = self.process.memory_info().rss - before
        self.say(f"memory grown over {self.requests} requests", grown / 1024, "KiB")


# --- putting it together ------------------------------------------------------------------------------------


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def wait_for(port: int) -> None:
    for _ in range(200):
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            return
        except OSError:
            time.sleep(0.05)
    raise SystemExit(f"nothing listens on port {port}")


async def measure(bench: Bench, only: Sequence[str]) -> None:
    measures: dict[str, Callable[[], Awaitable[None]]] = {
        "requests": bench.requests_per_second,
        "chunks": bench.chunks,
        "latency": bench.latency,
        "prompts": bench.large_prompts,
        "streams": bench.streams,
        "memory": bench.memory,
    }
    for name, run in measures.items():
        if not only or name in only:
            await run()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=(), help="requests chunks latency prompts streams memory")
    parser.add_argument("--requests", type=int, default=20_000, help="for memory")
    parser.add_argument("--json", help="file to write the numbers to")
    parser.add_argument("--serve-model", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve_model:
        uvloop.run(serve_model(options.serve_model))
        return
    from quire.web.server import allow_open_files

    allow_open_files(8192)
    upstream, gateway = free_port(), free_port()
    processes = [subprocess.Popen([sys.executable, __file__, "--serve-model", str(upstream)])]
    command = [sys.executable, "-m", "quire", "gateway", "--port", str(gateway), "--max-connections", "8192"]
    processes.append(subprocess.Popen([*command, "--endpoints", f"http://127.0.0.1:{upstream}"]))
    try:
        wait_for(upstream)
        wait_for(gateway)
        bench = Bench(gateway, upstream, psutil.Process(processes[1].pid), options.requests)
        uvloop.run(measure(bench, options.only))
    finally:
        for process in processes:
            process.terminate()
            process.wait()
    if options.json:
        with open(options.json, "w") as file:
            json.dump(bench.report, file, indent=1)


if __name__ == "__main__":
    main()
