"""What becomes of the encoding of a call when nobody waits for it any more."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator

import pytest
import tokenizers
import zmq.asyncio
from starlette.requests import Request

from quire.config.server import ServerConfig
from quire.core.errors import Cancelled, DeadlineExceeded
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


class Client:
    """Of one call; it is there until it `leaves`."""

    def __init__(self) -> None:
        self.leaves = asyncio.Event()

    async def receive(self) -> dict[str, object]:
        await self.leaves.wait()
        return {"type": "http.disconnect"}

    @property
    def request(self) -> Request:
        return Request({"type": "http", "method": "POST", "path": "/", "headers": []}, self.receive)


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


async def begun_before_the_end(service: Service, deadlines: Deadlines, error: type[Exception], *, leaves: bool) -> int:
    """How many pieces of the work are begun, in all, though the first ends only after the call has."""
    prompts, client = Prompts(), Client()
    running = asyncio.ensure_future(
        run_pooling(client.request, service, call(deadlines), PARAMS, prompts, info=INFO, size=LARGE, param="input")
    )
    assert await asyncio.to_thread(prompts.in_first.wait, 20)
    if leaves:
        client.leaves.set()
    with pytest.raises(error):
        await running
    prompts.first_ends.set()
    await asyncio.get_running_loop().shutdown_default_executor()
    assert service.engine.num_in_flight == 0
    return prompts.begun


def test_a_client_that_leaves_ends_it(service):
    assert asyncio.run(begun_before_the_end(service, Deadlines(), Cancelled, leaves=True)) == 1


def test_a_deadline_ends_it(service):
    deadlines = Deadlines(total_ms=300)
    assert asyncio.run(begun_before_the_end(service, deadlines, DeadlineExceeded, leaves=False)) == 1
