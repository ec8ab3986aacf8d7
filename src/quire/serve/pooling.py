"""What all pooling routes do with a call: bound it, make its requests, run them, and count them."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import math
import sys
import threading
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from starlette.requests import Request

from quire.core.errors import (
    Cancelled,
    DeadlineExceeded,
    EngineError,
    InvalidParameter,
    QueueFull,
    QuireError,
    from_info,
)
from quire.core.pooling import Pooled, PoolingInfo, PoolingParams, PoolingTask
from quire.core.request import EngineOutput, EngineRequest
from quire.core.sampling import SamplingParams
from quire.serve.call import Call
from quire.serve.inbox import patience
from quire.serve.service import INLINE_CHARS, Service, off_loop
from quire.serve.sse import while_connected
from quire.text.pooling_prompt import Encoded
from quire.wire.pooling import PoolingUsage

MAX_PROMPTS = 2048
AT_ONCE = 512
"""How many of them the engine is given at a time: a large call must not fill its queue. Fewer where that is short."""
MAX_CHARACTERS = 16 * 1024 * 1024
"""Of all prompts of a call; a query counts once for each of its documents."""
MAX_TOKENS = 1_000_000
MAX_NUMBERS = {"float": 2**22, "base64": 2**24}
"""In an answer, which is in memory as a whole; as decimals they take more of it."""
CHARACTERS_PER_PROMPT = 64
"""How many take about the time that a prompt takes however short it is."""

_NO_SAMPLING = SamplingParams(max_tokens=1, seed=0)
"""Every request has some; it says nothing here."""

Encoding = Literal["float", "base64"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """Of what is to be encoded. `renders`: through a template, whose process has to be waited for."""

    num_prompts: int
    num_characters: int
    renders: bool = False

    def check(self, param: str) -> None:
        """Raises `InvalidParameter` for more than a call may have."""
        for count, what, most in (
            (self.num_prompts, "prompts", MAX_PROMPTS),
            (self.num_characters, "characters in all prompts", MAX_CHARACTERS),
        ):
            if count > most:
                raise InvalidParameter(
                    f"The call has {count} {what}.", param=param, remedy=f"Send at most {most} in a call."
                )

    @property
    def work(self) -> int:
        """In characters, as `off_loop` counts."""
        return INLINE_CHARS + 1 if self.renders else self.num_characters + CHARACTERS_PER_PROMPT * self.num_prompts


@dataclass(frozen=True, slots=True, kw_only=True)
class Results:
    """One `Pooled` for each prompt of a call, in the order of the prompts."""

    pooled: Sequence[Pooled]
    usage: PoolingUsage


async def run_pooling(
    request: Request,
    service: Service,
    call: Call,
    params: PoolingParams,
    encode: Callable[[], Iterable[Encoded]],
    *,
    info: PoolingInfo,
    encoding: Encoding = "float",
    size: Size,
    param: str,
) -> Results:
    """Encode (on a thread if that may take long), submit, and wait for all, while the client is there and the deadline
    has not passed. No more than `AT_ONCE` are submitted before the first of them have ended.

    The first error is the call's, and cancels the rest; so does a client that leaves. `param` is the parameter that
    holds the inputs. Raises `InvalidParameter` for more of them than a call may have.
    """
    size.check(param)

    def make(stop: threading.Event) -> list[EngineRequest]:
        prompts = list(_bounded(_until(stop, encode()), param))
        _check_answer(params, info, prompts, encoding, param)
        return [_engine_request(call, params, prompt, index) for index, prompt in enumerate(prompts)]

    async def run() -> Results:
        requests = await _encoded(service, call, size, make)
        with contextlib.closing(Pooling(service, requests)) as pooling:
            pooled = await pooling.results()
        num_tokens = sum(len(each.prompt_token_ids) for each in requests)
        return Results(pooled=pooled, usage=PoolingUsage(prompt_tokens=num_tokens, total_tokens=num_tokens))

    return await while_connected(request.receive, run())


async def _encoded(
    service: Service, call: Call, size: Size, make: Callable[[threading.Event], list[EngineRequest]]
) -> list[EngineRequest]:
    """What `make` gives; the event that it is passed is set once nobody waits for that any more. Raises
    `DeadlineExceeded`."""
    stop = threading.Event()
    left = call.arrival_time + patience(call.deadlines) - service.clock()
    try:
        async with asyncio.timeout(None if left == math.inf else left):
            return await off_loop(size.work, lambda: make(stop))
    except TimeoutError:
        service.metrics.request_failed(DeadlineExceeded.code)
        raise DeadlineExceeded(
            "The request's deadline passed while its inputs were made into tokens.",
            remedy="Send fewer of them in a call, or allow more time.",
        ) from None
    finally:
        stop.set()


def _until(stop: threading.Event, prompts: Iterable[Encoded]) -> Iterator[Encoded]:
    """Begins no further prompt once `stop` is set. Raises `Cancelled` then."""
    rest = iter(prompts)
    while not stop.is_set():
        try:
            prompt = next(rest)
        except StopIteration:
            return
        yield prompt
    raise Cancelled("Nobody waits for these prompts any more.")


def check_not_empty(param: str, given: Sequence[object]) -> None:
    """Raises `InvalidParameter`."""
    if not given:
        raise InvalidParameter(f"{param} is an empty list.", param=param, remedy="Send at least one.")


def _bounded(prompts: Iterable[Encoded], param: str) -> Iterator[Encoded]:
    num_tokens = 0
    for prompt in prompts:
        num_tokens += len(prompt.token_ids)
        if num_tokens > MAX_TOKENS:
            raise InvalidParameter(
                f"The call's prompts have more than {MAX_TOKENS} tokens in all.",
                param=param,
                remedy="Send them in several calls.",
            )
        yield prompt


def _check_answer(
    params: PoolingParams, info: PoolingInfo, prompts: Sequence[Encoded], encoding: Encoding, param: str
) -> None:
    per_token = params.task in (PoolingTask.TOKEN_EMBED, PoolingTask.TOKEN_CLASSIFY)
    embeds = params.task in (PoolingTask.EMBED, PoolingTask.TOKEN_EMBED)
    num_rows = sum(len(prompt.token_ids) for prompt in prompts) if per_token else len(prompts)
    num_columns = (params.dimensions or info.embedding_size) if embeds else max(1, len(info.labels))
    if num_rows * num_columns > MAX_NUMBERS[encoding]:
        limits = " and ".join(f"{limit} as {name}" for name, limit in MAX_NUMBERS.items())
        raise InvalidParameter(
            f"The answer would have {num_rows * num_columns} numbers.",
            param=param,
            remedy=f"Send less in a call; at most {limits} are given.",
        )


def _engine_request(call: Call, params: PoolingParams, prompt: Encoded, index: int) -> EngineRequest:
    return EngineRequest(
        request_id=f"{call.engine_id}-{index}",
        prompt_token_ids=prompt.token_ids,
        sampling=_NO_SAMPLING,
        arrival_time=call.arrival_time,
        priority=call.priority,
        tenant=call.tenant,
        cache_salt=call.cache_salt,
        deadlines=call.deadlines,
        pooling=params,
        token_type_ids=prompt.token_type_ids,
    )


class Pooling:
    """All requests of one call. Whoever makes one closes it; that cancels what still runs."""

    def __init__(self, service: Service, requests: Sequence[EngineRequest]) -> None:
        self._service = service
        self._requests = requests
        self._open: dict[str, EngineRequest] = {}
        """Submitted and not ended."""

    async def results(self) -> list[Pooled]:
        """Raises a request's error, as the whole call's.

        What finds the queue full although others of the call were taken in is submitted again when these have ended,
        with no more beside it than fitted before.
        """
        found: dict[str, Pooled] = {}
        model, engine = self._service.engine.model, self._service.engine
        assert model is not None, "its encoder was made from it"
        most = min(AT_ONCE, model.max_num_queued_reqs, engine.max_in_flight)
        at_once, left = most, deque(self._requests)
        while left:
            batch = _first(left, at_once, model.max_num_queued_tokens)
            refused = await self._run(batch, found)
            left.extendleft(reversed(refused))
            at_once = len(batch) - len(refused) if refused else min(most, 2 * at_once)
        return [found[request.request_id] for request in self._requests]

    async def _run(self, requests: Sequence[EngineRequest], found: dict[str, Pooled]) -> list[EngineRequest]:
        """Those that found the queue full, which are not all: then it raises `QueueFull`."""
        try:
            inbox = self._service.engine.submit(requests)
        except QuireError as error:
            self._service.metrics.request_failed(error.code)
            raise
        self._open = {request.request_id: request for request in requests}
        refused: list[EngineRequest] = []
        while self._open:
            for output in await inbox.get():
                request = self._open.pop(output.request_id)
                is_full = output.error is not None and output.error.code == QueueFull.code
                if is_full and len(refused) + 1 < len(requests):
                    refused.append(request)
                else:
                    found[output.request_id] = self._take(request, output)
        return refused

    def _take(self, request: EngineRequest, output: EngineOutput) -> Pooled:
        metrics = self._service.metrics
        error = None if output.error is None else from_info(output.error)
        if error is None and output.pooled is None:
            error = EngineError("The engine ended the request without a result.")
        if error is not None:
            metrics.request_failed(error.code)
            raise error
        assert output.pooled is not None
        metrics.pooling_finished(request, output, self._service.clock())
        return output.pooled

    def close(self) -> None:
        """May be called more than once."""
        if self._open:
            self._service.engine.cancel(list(self._open))
            self._service.metrics.requests_aborted(len(self._open))
            self._open.clear()


def _first(left: deque[EngineRequest], most: int, max_tokens: int) -> list[EngineRequest]:
    """Takes at least one from `left`, and no more than `most` requests or `max_tokens` tokens."""
    batch = [left.popleft()]
    num_tokens = len(batch[0].prompt_token_ids)
    while left and len(batch) < most and num_tokens + len(left[0].prompt_token_ids) <= max_tokens:
        batch.append(left.popleft())
        num_tokens += len(batch[-1].prompt_token_ids)
    return batch


def rows(pooled: Pooled) -> list[list[float]]:
    """The numbers, row by row. Raises `EngineError` for what is not a number."""
    numbers = array("f")
    numbers.frombytes(pooled.data)
    if sys.byteorder == "big":
        numbers.byteswap()
    values = numbers.tolist()
    if not math.isfinite(math.fsum(values)):
        raise EngineError("The model gave numbers that are not finite.", remedy="Try --dtype float32.")
    columns = pooled.num_columns
    return [values[start : start + columns] for start in range(0, len(values), columns)]


def row(pooled: Pooled) -> list[float]:
    """The numbers of a result that has one row. Errors as of `rows`."""
    (only,) = rows(pooled)
    return only


def as_base64(pooled: Pooled) -> str:
    return base64.b64encode(pooled.data).decode("ascii")
