"""Engines as processes: a worker that is asked through pipes, a server with OpenAI's API.

Workers are all alive at once, so that their turns can alternate though some take minutes to start. Whoever's turn it
is not is stopped (SIGSTOP): an engine whose threads poll takes nothing from another's figures. A server lives for one
turn: stopping one would look like a fault to those who supervise their processes, and starting is measured anyway.
"""

from __future__ import annotations

import json
import select
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self

import psutil

from benchmarks.peers.machine import family, resident_bytes
from benchmarks.peers.peer import Peer, Settings, clean_environment
from benchmarks.peers.worker import Job

ROOT = Path(__file__).parents[2]
POLL_SECONDS = 0.02
STOP_SECONDS = 20.0
FIRST_PROMPT = list(range(100, 116))


class Engine:
    """A process and its children, their output in a log."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], log: Path, *, piped: bool) -> None:
        self.log = log
        with log.open("wb") as file:
            self._popen = subprocess.Popen(
                command,
                cwd=ROOT,
                env=clean_environment() | environment,
                stdin=subprocess.PIPE if piped else subprocess.DEVNULL,
                stdout=subprocess.PIPE if piped else file,
                stderr=file,
                start_new_session=True,
            )
        self.process = psutil.Process(self._popen.pid)
        self.loaded_bytes = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        members = self._signal(signal.SIGCONT)
        self._popen.terminate()
        psutil.wait_procs(members, timeout=STOP_SECONDS)
        for member in members:
            with suppress(psutil.NoSuchProcess):
                member.kill()
        self._popen.wait()
        for pipe in (self._popen.stdin, self._popen.stdout):
            if pipe is not None:
                pipe.close()

    def resident_bytes(self) -> int:
        return resident_bytes(self.process)

    @contextmanager
    def _starting(self) -> Iterator[None]:
        """What fails inside, or is interrupted, leaves no process behind."""
        try:
            yield
        except BaseException:
            self.__exit__()
            raise

    def _failure(self, what: str) -> SystemExit:
        last = self.log.read_text(errors="replace")[-2000:]
        return SystemExit(f"{what}. The end of {self.log}:\n{last}")

    def _signal(self, number: signal.Signals) -> list[psutil.Process]:
        members = family(self.process) if self._popen.poll() is None else []
        for member in members:
            with suppress(psutil.NoSuchProcess):
                member.send_signal(number)
        return members


class Worker(Engine):
    """An engine in its own environment: loaded when this returns, and stopped until its first turn.

    Raises `SystemExit` with the end of its log if it does not come up, or ends.
    """

    def __init__(self, peer: Peer, model: Path, settings: Settings, log: Path, timeout: float) -> None:
        words = [peer.name, str(peer.home.parent), str(model), json.dumps(asdict(settings))]
        command = [str(peer.python), "-m", "benchmarks.peers.worker", *words]
        super().__init__(command, peer.environment(settings), log, piped=True)
        self._timeout = timeout
        with self._starting():
            self._answer()
        self.loaded_bytes = self.resident_bytes()
        self._signal(signal.SIGSTOP)

    @contextmanager
    def turn(self) -> Iterator[None]:
        """It runs inside, and is stopped again after it."""
        self._signal(signal.SIGCONT)
        yield
        self._signal(signal.SIGSTOP)

    def ask(self, job: Job) -> dict[str, Any]:
        assert self._popen.stdin is not None
        self._popen.stdin.write(json.dumps(asdict(job)).encode() + b"\n")
        self._popen.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._popen.stdout is not None
        ready, _, _ = select.select([self._popen.stdout], [], [], self._timeout)
        line = self._popen.stdout.readline() if ready else b""
        if not line:
            raise self._failure(f"No answer in {self._timeout:.0f} s" if not ready else "The worker ended")
        answer: dict[str, Any] = json.loads(line)
        return answer


class Server(Engine):
    """A server that has given its first token when this returns, `first_token_s` after its command."""

    def __init__(self, peer: Peer, model: Path, settings: Settings, log: Path, timeout: float) -> None:
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        begin = time.perf_counter()
        super().__init__(peer.server(model, settings, port), peer.environment(settings), log, piped=False)
        with self._starting():
            while not self._first_token():
                if self._popen.poll() is not None or time.perf_counter() - begin > timeout:
                    raise self._failure("The server did not come up")
                time.sleep(POLL_SECONDS)
        self.first_token_s = time.perf_counter() - begin
        self.loaded_bytes = self.resident_bytes()

    def _first_token(self) -> bool:
        try:
            model = self._get("/v1/models")["data"][0]["id"]
            body = {"model": model, "prompt": FIRST_PROMPT, "max_tokens": 1, "temperature": 0.0}
            return bool(self._get("/v1/completions", body)["choices"])
        except (OSError, urllib.error.HTTPError, json.JSONDecodeError, IndexError, KeyError):
            return False  # not listening yet, or loading

    def _get(self, path: str, body: Mapping[str, Any] | None = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as response:
            return json.load(response)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
