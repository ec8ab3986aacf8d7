"""`quire bench startup`: from the command `quire serve` to its first token, phase by phase."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import IO, Annotated, Any

import aiohttp
from cyclopts import Parameter

from quire.cli.bench.report import note, print_json, print_table
from quire.cli.bench.statistics import Summary, summarise
from quire.cli.bench.workload import require
from quire.cli.client import ServerFault, list_models, open_session, stream
from quire.cli.flags import ConfigFile, EngineFlags, as_arguments
from quire.core.errors import EngineStartFailed

POLL_SECONDS = 0.01
MAX_LOG_BYTES = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class StartupOptions:
    """The flags of `quire bench startup`."""

    repeat: int = 3
    """Times to start it; the first may read from disk what the others find in memory."""
    start_timeout: float = 300.0
    """Seconds after which a start has failed."""
    json: bool = False
    """Print JSON."""


DEFAULTS = StartupOptions()
PHASES = ("listening", "ready", "first_token", "stopped")


def startup(
    model: str | None = None,
    *,
    options: Annotated[StartupOptions, Parameter(name="*")] = DEFAULTS,
    config: ConfigFile = None,
    engine: EngineFlags = None,
) -> None:
    """From the command `quire serve` to its first token.

    Seconds from the command until the port accepts connections, until /ready is green, and until the first token of a
    first request; and seconds from SIGTERM to the end of the process.

    Parameters
    ----------
    model
        A local directory, a Hugging Face id, an s3:// URL, or quire-tiny, the built-in model, if none is named.
    """
    require("repeat", options.repeat, options.repeat >= 1, "at least 1")
    arguments = [model] if model is not None else []
    arguments += ["--config", str(config)] if config is not None else []
    arguments += as_arguments(engine)
    runs = []
    for index in range(options.repeat):
        runs.append(measure_start(arguments, options.start_timeout))
        note(f"{index + 1}/{options.repeat}: first token after {runs[-1]['first_token']:.2f} s")
    summaries = {phase: summarise([run[phase] * 1e3 for run in runs]) for phase in PHASES}
    if options.json:
        print_json({"benchmark": "startup", "model": model, "runs_s": runs, "median_s": _medians(summaries)})
    else:
        print_table("quire serve " + " ".join(arguments), [("starts", str(options.repeat))], summaries)


def measure_start(arguments: list[str], timeout: float) -> dict[str, float]:
    """Start one server, ask it for a token, stop it. Seconds by phase. Raises `EngineStartFailed`."""
    port = free_port()
    with tempfile.TemporaryFile() as log:
        begin = time.perf_counter()
        command = [sys.executable, "-m", "quire", "serve", *arguments, "--host", "127.0.0.1", "--port", str(port)]
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)  # noqa: S603 - our own command
        try:
            server = _Server(process, log, f"http://127.0.0.1:{port}", begin, begin + timeout)
            times = asyncio.run(server.watch())
        finally:
            stop_begin = time.perf_counter()
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        times["stopped"] = time.perf_counter() - stop_begin
    return times


@dataclass(frozen=True, slots=True)
class _Server:
    """A server that is coming up."""

    process: subprocess.Popen[bytes]
    log: IO[bytes]
    url: str
    begin: float
    deadline: float

    async def watch(self) -> dict[str, float]:
        times: dict[str, float] = {}
        async with open_session(api_key=os.environ.get("QUIRE_API_KEY"), read_timeout=60.0) as session:

            async def listening() -> bool:
                async with session.get(f"{self.url}/health"):
                    return True

            async def ready() -> bool:
                async with session.get(f"{self.url}/ready") as response:
                    return response.status == 200

            times["listening"] = await self._until(listening)
            times["ready"] = await self._until(ready)
            name = (await list_models(session, self.url))[0]
            body: dict[str, Any] = {"model": name, "prompt": "Hello", "max_tokens": 1, "stream": True}
            async for _ in stream(session, f"{self.url}/v1/completions", {**body, "ignore_eos": True}):
                times.setdefault("first_token", time.perf_counter() - self.begin)
        if "first_token" not in times:
            raise ServerFault("The server answered its first request without a token.")
        return times

    async def _until(self, holds: Callable[[], Awaitable[bool]]) -> float:
        """Seconds from the start until `holds` is true, which is tried every few milliseconds."""
        while True:
            try:
                if await holds():
                    return time.perf_counter() - self.begin
            except (aiohttp.ClientError, OSError):
                pass  # not up yet
            if self.process.poll() is not None or time.perf_counter() > self.deadline:
                raise self._failure()
            await asyncio.sleep(POLL_SECONDS)

    def _failure(self) -> EngineStartFailed:
        self.log.seek(0, os.SEEK_END)
        self.log.seek(max(0, self.log.tell() - MAX_LOG_BYTES))
        last = self.log.read().decode(errors="replace").strip()
        code = self.process.poll()
        what = "did not come up in time" if code is None else f"ended with exit code {code}"
        return EngineStartFailed(f"quire serve {what}. Its last words:\n{last}")


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _medians(summaries: dict[str, Summary]) -> dict[str, float | None]:
    return {phase: None if summary.p50 is None else summary.p50 / 1e3 for phase, summary in summaries.items()}
