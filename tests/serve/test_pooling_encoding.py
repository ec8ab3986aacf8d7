"""What becomes of the encoding of a call when nobody waits for it any more."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import AsyncIterator, Iterator

import pytest
import tokenizers
import zmq.asyncio
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from quire.config.server import ServerConfig
from quire.core.errors import Cancelled, DeadlineExceeded, QuireError
from quire.core.pooling import PoolingInfo, PoolingParams, PoolingTask
from quire.core.request import Deadlines
from quire.serve.call import Call
from quire.serve.engine_client import EngineClient
from quire.serve.metrics import Metrics
from quire.serve.pooling import Size, run_pooling
from quire.serve.service import Service
from quire.serve.supervision import Supervision
from quire.text.pooling_prompt import Encoded
from quire.text.tokenizer import Tokenizer
from quire.web.server import Server, bind, uvicorn_config

PARAMS = PoolingParams(task=PoolingTask.EMBED)
INFO = PoolingInfo(tasks=(PoolingTask.EMBED,), embedding_size=8)
LARGE = Size(num_prompts=3, num_characters=1_000_000)
"""Encoded on a thread."""


class Prompts:
    """Three pieces of work, the first of which takes until it is let end."""

    def __init__(self) -> None:
        self.begun = 0
        self.in_first = threading.Event()
        self.first_ends = threading.Event()

    def __call__(self) -> Iterator[Encoded]:
        for index in range(3):
            self.begun += 1
            if index == 0:
                self.in_first.set()
                assert self.first_ends.wait(20)
            yield Encoded([1])


@pytest.fixture
def service() -> Iterator[Service]:
    """With an engine that never starts, and gets nothing."""
    metrics = Metrics("tiny")
    with zmq.asyncio.Context() as context:
        yield Service(
            config=ServerConfig(),
            engine=EngineClient(None, None, context=context, listener=metrics, supervision=Supervision()),
            tokenizer=Tokenizer(tokenizers.Tokenizer(tokenizers.models.BPE()), {}),
            template=None,
            model_names=("tiny",),
            sampling_defaults={},
            metrics=metrics,
        )


def call(deadlines: Deadlines) -> Call:
    return Call(
        id="pool-1",
        engine_id="pool-1",
        created=0,
        model="tiny",
        tenant="",
        priority=0,
        cache_salt="",
        headers={},
        arrival_time=time.monotonic(),
        deadlines=deadlines,
    )


@contextlib.asynccontextmanager
async def listening(app: Starlette) -> AsyncIterator[int]:
    """The port of a server of ours that runs `app`."""
    config = ServerConfig(port=0)
    listener, server = bind(config), Server(uvicorn_config(app, config))
    running = asyncio.ensure_future(server.serve(sockets=[listener]))
    try:
        await server.listening.wait()
        yield listener.getsockname()[1]
    finally:
        server.should_exit = True
        await running


async def begun_before_the_end(service: Service, deadlines: Deadlines, *, leaves: bool) -> tuple[int, QuireError]:
    """How many pieces of the work are begun, in all, though the first ends only after the call has; and how that
    ended."""
    prompts = Prompts()
    ended: asyncio.Future[QuireError] = asyncio.get_running_loop().create_future()

    async def create(request: Request) -> Response:
        await request.body()
        try:
            await run_pooling(request, service, call(deadlines), PARAMS, prompts, info=INFO, size=LARGE, param="input")
        except QuireError as error:
            ended.set_result(error)
        return Response()

    async with listening(Starlette(routes=[Route("/", create, methods=["POST"])])) as port:
        _, client = await asyncio.open_connection("127.0.0.1", port)
        client.write(b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 2\r\n\r\n{}")
        assert await asyncio.to_thread(prompts.in_first.wait, 20)
        if leaves:
            client.close()
        try:
            async with asyncio.timeout(20):
                error = await ended
        finally:
            prompts.first_ends.set()
            client.close()
    await asyncio.get_running_loop().shutdown_default_executor()
    assert service.engine.num_in_flight == 0
    return prompts.begun, error


def test_a_client_that_leaves_ends_it(service):
    begun, error = asyncio.run(begun_before_the_end(service, Deadlines(), leaves=True))
    assert (begun, type(error)) == (1, Cancelled)


def test_a_deadline_ends_it(service):
    begun, error = asyncio.run(begun_before_the_end(service, Deadlines(total_ms=300), leaves=False))
    assert (begun, type(error)) == (1, DeadlineExceeded)
