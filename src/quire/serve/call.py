"""One call of the API; and what the generating routes do with it once its requests are made: stream or gather."""

from __future__ import annotations

import contextlib
import re
import time
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol, Self

import structlog
from starlette.requests import Request
from starlette.types import ASGIApp

from quire.core.errors import InvalidParameter, QuireError
from quire.core.request import Deadlines, EngineRequest
from quire.core.sampling import SamplingParams
from quire.serve.body import ignored_fields
from quire.serve.generation import Generation, Piece
from quire.serve.sampling import deadlines
from quire.serve.service import fresh_seed
from quire.serve.sse import EventStream, while_connected
from quire.text.prompt import PromptEncoder
from quire.wire.openai import CallFields

MAX_GATHERED_LOGPROBS = 1_000_000
"""In an answer that is not streamed, and so is in memory as a whole."""
TENANT_HEADER = "x-quire-tenant"
_WORD = re.compile(r"[\x21-\x7e]{1,128}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One request of the API: who asks, and how to answer."""

    id: str
    """What the client sees; holds its own `request_id` if it gave one."""
    engine_id: str
    """What the engine sees; never the same for two calls."""
    created: int
    model: str
    tenant: str
    priority: int
    cache_salt: str
    headers: dict[str, str]
    """Headers of the answer."""
    arrival_time: float
    deadlines: Deadlines

    @classmethod
    def of(
        cls, request: Request, body: bytes, fields: CallFields, *, prefix: str, model: str, arrival_time: float
    ) -> Self:
        """Raises `InvalidParameter` for a tenant or a request id that is no plain word, and for a deadline, priority
        or salt out of bounds."""
        engine_id = f"{prefix}-{uuid.uuid4().hex}"
        tenant = request.headers.get(TENANT_HEADER, "")
        if tenant and not _WORD.fullmatch(tenant):
            raise InvalidParameter(
                f"The header {TENANT_HEADER} is {tenant[:80]!r}.",
                param=TENANT_HEADER,
                remedy="Use up to 128 printable ASCII characters without spaces.",
            )
        if fields.request_id is not None and not _WORD.fullmatch(fields.request_id):
            raise InvalidParameter(
                f"request_id is {fields.request_id[:80]!r}.",
                param="request_id",
                remedy="Use up to 128 printable ASCII characters without spaces.",
            )
        if fields.priority is not None and abs(fields.priority) > 2**31:
            raise InvalidParameter(f"priority is {fields.priority}.", param="priority", remedy="Use a 32-bit number.")
        if fields.cache_salt is not None and len(fields.cache_salt) > 256:
            raise InvalidParameter("cache_salt is too long.", param="cache_salt", remedy="Use at most 256 characters.")
        headers = {}
        ignored = ignored_fields(body, type(fields))
        if ignored:
            headers["x-quire-ignored-fields"] = ", ".join(ignored)
            structlog.get_logger().info("fields without effect", route=request.url.path, fields=ignored)
        return cls(
            id=engine_id if fields.request_id is None else f"{prefix}-{fields.request_id}",
            engine_id=engine_id,
            created=int(time.time()),
            model=model,
            tenant=tenant,
            priority=fields.priority or 0,
            cache_salt=fields.cache_salt or "",
            headers=headers,
            arrival_time=arrival_time,
            deadlines=deadlines(fields),
        )

    def request_maker(
        self,
        encoder: PromptEncoder,
        sampling: SamplingParams,
        *,
        default_max_tokens: int | None,
    ) -> Callable[[str, Sequence[int]], list[EngineRequest]]:
        """`PromptEncoder.engine_requests`, but for the id and the prompt."""
        return partial(
            encoder.engine_requests,
            sampling=sampling,
            arrival_time=self.arrival_time,
            priority=self.priority,
            tenant=self.tenant,
            cache_salt=self.cache_salt,
            deadlines=self.deadlines,
            default_max_tokens=default_max_tokens,
            fresh_seed=fresh_seed,
        )


class Writer(Protocol):
    """Turns pieces into the objects of one route."""

    def whole(self, pieces: Sequence[Piece]) -> ASGIApp: ...

    def events(self, pieces: AsyncIterator[Piece]) -> AsyncIterator[bytes]: ...

    def broken(self, error: QuireError) -> bytes:
        """The last event of a stream that cannot go on."""


async def answer(
    request: Request,
    call: Call,
    generation: Generation,
    writer: Writer,
    held: contextlib.ExitStack,
    *,
    stream: bool,
) -> ASGIApp:
    """Run `generation`; what is `held` for it is let go when the answer has been sent or its client is gone.

    A stream's answer is begun when the first piece is there, so that a refusal still gets its HTTP status.
    """
    source = generation.pieces()
    if not stream:
        return writer.whole(await while_connected(request.receive, gather(source)))
    first = await while_connected(request.receive, _first(source))
    headers = [(name.encode(), value.encode()) for name, value in call.headers.items()]
    return EventStream(_events(writer, _chain(first, source)), held.pop_all().close, headers)


async def gather(source: AsyncIterator[Piece]) -> list[Piece]:
    """All pieces of an answer. Raises `InvalidParameter` when its log-probabilities outgrow memory's bound."""
    pieces = []
    num_logprobs = 0
    async for piece in source:
        num_logprobs += piece.num_logprobs
        if num_logprobs > MAX_GATHERED_LOGPROBS:
            raise InvalidParameter(
                f"The answer has more than {MAX_GATHERED_LOGPROBS} log-probabilities.",
                param="logprobs",
                remedy="Stream it, or ask for fewer tokens or alternatives.",
            )
        pieces.append(piece)
    return pieces


async def _first(source: AsyncIterator[Piece]) -> Piece:
    return await anext(source)


async def _chain(first: Piece, rest: AsyncIterator[Piece]) -> AsyncIterator[Piece]:
    yield first
    async for piece in rest:
        yield piece


async def _events(writer: Writer, pieces: AsyncIterator[Piece]) -> AsyncIterator[bytes]:
    try:
        async for data in writer.events(pieces):
            yield data
    except QuireError as error:
        yield writer.broken(error)
    except Exception:
        structlog.get_logger().exception("a stream broke")
        yield writer.broken(QuireError("Something went wrong in the server."))
