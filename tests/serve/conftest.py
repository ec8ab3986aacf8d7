"""A server over a fake engine process, on a real socket.

Token ids of the model served here are the bytes of the text, so that tests can say what an answer has to be.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import queue
import signal
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import openai
import pytest
import tokenizers

from quire.config.server import ServerConfig
from quire.serve.engine_process import EngineCommand
from quire.serve.run import Launch, run
from quire.serve.supervision import Supervision
from quire.web.server import StopOrders

FAKE_ENGINE = Path(__file__).parent / "fake_engine.py"
MODEL = "tiny"
SPECIAL = ["<bos>", "<eos>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if tools %}tools: {{ tools | length }}\n{% endif %}{% if mood %}mood: {{ mood }}\n{% endif %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def byte_characters() -> dict[int, str]:
    """GPT-2's printable character for each byte."""
    kept = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    moved = [byte for byte in range(256) if byte not in kept]
    return {byte: chr(byte) for byte in kept} | {byte: chr(256 + i) for i, byte in enumerate(moved)}


def expected_text(prompt: str | bytes, count: int, *, seed: int = 0) -> str:
    """What the fake engine says, computed here again."""
    data = prompt.encode() if isinstance(prompt, str) else prompt
    digests = (hashlib.sha256(data + b"|%d|%d" % (seed, index)).digest() for index in range(count))
    return "".join(chr(ord("a") + digest[0] % 26) for digest in digests)


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    vocab = {character: byte for byte, character in byte_characters().items()}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens([tokenizers.AddedToken(text, special=True) for text in SPECIAL])
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE, "eos_token": "<eos>"}))
    (directory / "config.json").write_text("{}")
    return directory


@dataclass
class Served:
    """A running server. `url` ends without a slash and without /v1."""

    url: str
    state: Path
    loop: asyncio.AbstractEventLoop
    orders: StopOrders
    thread: threading.Thread
    log: list[str]
    exit: list[object] = field(default_factory=list)
    clients: list[openai.OpenAI] = field(default_factory=list)

    @property
    def address(self) -> tuple[str, int]:
        parts = urlsplit(self.url)
        assert parts.hostname is not None
        assert parts.port is not None
        return parts.hostname, parts.port

    def client(self, **settings: object) -> openai.OpenAI:
        settings = {"api_key": "none", "max_retries": 0, "timeout": 30.0} | settings
        client = openai.OpenAI(base_url=f"{self.url}/v1", **settings)
        self.clients.append(client)
        return client

    def get(self, path: str, **headers: str) -> tuple[int, bytes]:
        request = urllib.request.Request(self.url + path, headers=headers)
        try:
            with urllib.request.urlopen(request, timeout=20) as answer:
                return answer.status, answer.read()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read()

    def post(self, path: str, body: object, **headers: str) -> tuple[int, dict]:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        sent = {"content-type": "application/json"} | {name.replace("_", "-"): value for name, value in headers.items()}
        request = urllib.request.Request(self.url + path, data=data, headers=sent)
        try:
            with urllib.request.urlopen(request, timeout=20) as answer:
                return answer.status, json.loads(answer.read())
        except urllib.error.HTTPError as error:
            with error:
                return error.code, json.loads(error.read())

    def events(self) -> list[list[str]]:
        path = self.state / "events"
        return [line.split() for line in path.read_text().splitlines()] if path.exists() else []

    def until(self, condition: Callable[[], bool], what: str, seconds: float = 20) -> None:
        """Poll for something that another process does."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, f"{what} did not happen; log: {self.log[-20:]}"
            time.sleep(0.01)

    def engine_pid(self) -> int:
        return int([event for event in self.events() if event[0] == "start"][-1][1])

    def kill_engine(self, number: int = signal.SIGKILL) -> None:
        os.kill(self.engine_pid(), number)

    def stop(self) -> None:
        if self.thread.is_alive():
            self.loop.call_soon_threadsafe(self.orders.give)
        self.thread.join(30)
        assert not self.thread.is_alive()


def engine_command(state: Path, log: Callable[[str], None], **environment: str) -> EngineCommand:
    settings = [f"FAKE_ENGINE_STATE={state}", *(f"{name}={value}" for name, value in environment.items())]
    return EngineCommand(argv=("env", *settings, sys.executable, str(FAKE_ENGINE)), config={"model": MODEL}, log=log)


class Serving:
    """Starts servers in threads of this process."""

    def __init__(self, model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
        self._model_dir = model_dir
        self._tmp = tmp_path_factory

    @contextlib.contextmanager
    def __call__(
        self,
        *,
        start: str = "",
        supervision: Supervision | None = None,
        wait: bool = True,
        engine_environment: dict[str, str] | None = None,
        model_dir: Path | None = None,
        chat_template: Path | None = None,
        **settings: object,
    ) -> Iterator[Served]:
        state = self._tmp.mktemp("engine")
        (state / "start").write_text(start)
        log: list[str] = []
        command = engine_command(state, log.append, **(engine_environment or {}))
        config = ServerConfig(**({"port": 0, "log_level": "error", "shutdown_timeout": 10.0} | settings))
        announced: queue.Queue[object] = queue.Queue()
        exits: list[object] = []
        made: list[object] = []

        async def main() -> int:
            orders = StopOrders()
            made.extend((asyncio.get_running_loop(), orders))
            launch = Launch(
                command=command,
                process=command.start(),
                model_dir=model_dir or self._model_dir,
                chat_template=chat_template,
                model_names=(MODEL, "tiny-alias"),
                announce=announced.put,
                on_listening=announced.put,
            )
            return await run(config, launch, orders=orders, supervision=supervision)

        def body() -> None:
            try:
                exits.append(asyncio.run(main()))
            except BaseException as error:
                exits.append(error)
                announced.put(error)

        thread = threading.Thread(target=body)
        thread.start()
        url = announced.get(timeout=30)
        if isinstance(url, BaseException):
            thread.join()
            raise url
        served = Served(str(url).removesuffix("/v1"), state, made[0], made[1], thread, log, exits)
        try:
            if wait:
                line = announced.get(timeout=30)
                if isinstance(line, BaseException):
                    raise line
            yield served
        finally:
            served.stop()
            for client in served.clients:
                client.close()


@pytest.fixture(scope="session")
def serving(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Serving:
    return Serving(model_dir, tmp_path_factory)


@pytest.fixture(scope="session")
def served(serving: Serving) -> Iterator[Served]:
    """One server for all tests that do not harm it."""
    with serving(request_read_timeout=1.0, max_body_bytes=1024 * 1024) as running:
        yield running


def pooling_model(**info: object) -> dict[str, str]:
    """The environment of a fake engine that pools."""
    return {"FAKE_ENGINE_POOLING": json.dumps({"tasks": ["embed"], "embedding_size": 8} | info)}


@pytest.fixture(scope="session")
def embedder(serving: Serving) -> Iterator[Served]:
    """A server whose model does all that an embedding model may: a vector per text, and one per token."""
    info = pooling_model(tasks=["embed", "token_embed"], matryoshka=[2, 4])
    with serving(engine_environment=info) as running:
        yield running


@pytest.fixture(scope="session")
def classifier(serving: Serving) -> Iterator[Served]:
    info = pooling_model(tasks=["classify", "token_classify"], embedding_size=0, labels=["no", "yes", "perhaps"])
    with serving(engine_environment=info) as running:
        yield running


@pytest.fixture(scope="session")
def reranker(serving: Serving) -> Iterator[Served]:
    """A cross-encoder whose chat template joins the pair."""
    with serving(engine_environment=pooling_model(tasks=["score"], embedding_size=0, pair="template")) as running:
        yield running


def expected_numbers(
    token_ids: list[int],
    count: int,
    *,
    task: str = "embed",
    dimensions: int | None = None,
    normalize: bool | None = None,
    activation: bool | None = None,
    token_type_ids: list[int] | None = None,
) -> list[float]:
    """What the fake engine gives for a prompt, computed here again."""
    seed = json.dumps([token_ids, [task, dimensions, normalize, activation, token_type_ids]]).encode()
    digests = (hashlib.sha256(seed + b"|%d" % index).digest() for index in range(count))
    return [digest[0] / 128 - 1 for digest in digests]


@pytest.fixture(scope="session")
def numbers() -> Callable[..., list[float]]:
    return expected_numbers


@pytest.fixture(scope="session")
def expected() -> Callable[..., str]:
    return expected_text
