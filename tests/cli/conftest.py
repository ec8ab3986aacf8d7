"""A small server that speaks OpenAI's protocol, for the commands that talk to one."""

from __future__ import annotations

import asyncio
import json
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route


@dataclass
class FakeServer:
    """Answers with `tok0 tok1 …`; what a prompt holds decides how it goes wrong. Remembers what it was sent."""

    url: str = ""
    requests: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    most_at_once: int = 0
    at_once: int = 0
    usage: bool = True

    def app(self) -> Starlette:
        return Starlette(
            routes=[
                Route("/v1/models", self.models),
                Route("/v1/completions", self.generate, methods=["POST"]),
                Route("/v1/chat/completions", self.generate, methods=["POST"]),
            ]
        )

    async def models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [{"id": "fake-model", "object": "model"}, {"id": "other"}]})

    async def generate(self, request: Request) -> Response:
        body = await request.json()
        self.requests.append(body)
        self.headers.append(dict(request.headers))
        prompt = json.dumps(body.get("prompt", body.get("messages")))
        if "refuse" in prompt:
            error = {"message": "I refuse this prompt.", "type": "invalid_request_error", "code": "refused"}
            return JSONResponse({"error": error}, status_code=400)
        return StreamingResponse(self.events(body, prompt, "messages" in body), media_type="text/event-stream")

    async def events(self, body: dict[str, Any], prompt: str, chat: bool):
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            if chat:
                yield event({"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]})
            count = body.get("max_tokens", 3)
            for index in range(count):
                await asyncio.sleep(0)
                if index == 1 and "break off" in prompt:
                    return
                if index == 1 and "fail midway" in prompt:
                    yield event({"error": {"message": "The engine died.", "code": "engine_dead"}})
                    return
                text = f"tok{index} "
                finish = "length" if index == count - 1 else None
                piece = {"delta": {"content": text}} if chat else {"text": text}
                yield event({"choices": [{"index": 0, "finish_reason": finish, **piece}]})
            if self.usage and (body.get("stream_options") or {}).get("include_usage"):
                asked = body.get("prompt")
                prompt_tokens = len(asked) if isinstance(asked, list) else 7
                usage = {
                    "prompt_tokens": prompt_tokens,
                    "completion_tokens": count,
                    "total_tokens": prompt_tokens + count,
                    "prompt_tokens_details": {"cached_tokens": 2},
                }
                yield event({"choices": [], "usage": usage})
            yield b": a comment\n\ndata: [DONE]\n\n"
        finally:
            self.at_once -= 1


def event(content: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps({"id": "x", "object": "chunk", **content}).encode() + b"\n\n"


@pytest.fixture
def fake_server() -> Iterator[FakeServer]:
    fake = FakeServer()
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        fake.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        server = uvicorn.Server(uvicorn.Config(fake.app(), log_level="warning", lifespan="off"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield fake
        finally:
            server.should_exit = True
            thread.join()


@pytest.fixture
def closed_url() -> str:
    """An address where nobody listens."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{listener.getsockname()[1]}"


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights of a toy's shape, made by the tool that makes benchmark checkpoints."""
    directory = tmp_path_factory.mktemp("checkpoint") / "tiny"
    tool = Path(__file__).parents[2] / "tools" / "make_checkpoint.py"
    subprocess.run([sys.executable, str(tool), str(directory), "--shape", "tiny", "--dtype", "float32"], check=True)
    return directory
