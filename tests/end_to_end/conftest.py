"""`quire serve` as a user starts it: the real command, the real engine, the built-in model."""

import signal
import subprocess
import sys
from collections.abc import Callable, Iterator

import psutil
import pytest
from openai import OpenAI


class Server:
    def __init__(self, *arguments: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "quire", "serve", "--port", "0", "--kv-cache-memory", "0.05", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        line = self.process.stdout.readline()
        assert line.startswith("quire serves "), (line, self.process.stderr.read() if not line else "")
        self.url = line.rsplit(" ", 1)[1].strip()
        self.root = self.url.removesuffix("/v1")
        self.client = OpenAI(base_url=self.url, api_key="none", max_retries=0, timeout=120)

    @property
    def engine(self) -> psutil.Process:
        [engine] = [
            child
            for child in psutil.Process(self.process.pid).children()
            if "quire.engine.process" in " ".join(child.cmdline())
        ]
        return engine

    def stop(self) -> tuple[int, str]:
        """SIGTERM; the exit code and what stood on stderr."""
        self.process.send_signal(signal.SIGTERM)
        _, errors = self.process.communicate(timeout=120)
        return self.process.returncode, errors

    def close(self) -> None:
        self.client.close()
        if self.process.poll() is None:
            self.process.kill()
            self.process.communicate()
        self.process.stdout.close()
        self.process.stderr.close()


@pytest.fixture(scope="session")
def start_server() -> Iterator[Callable[..., Server]]:
    """Starts servers, which end with the test session at the latest."""
    servers: list[Server] = []

    def start(*arguments: str) -> Server:
        servers.append(Server(*arguments))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


@pytest.fixture(scope="session")
def server(start_server) -> Server:
    return start_server()
