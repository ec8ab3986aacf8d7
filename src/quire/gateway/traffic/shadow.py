"""Mirrored requests: a second version answers too, nobody waits for it, and the two answers are compared.

The first answer's bytes are copied as they pass, up to a bound; the copy of the request goes out on a task of its own.
At most `max_running` mirrors run at once; a request that comes while they do has none, which is counted.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

import msgspec
import structlog

from quire.gateway.endpoint import Clock
from quire.gateway.request import InferenceRequest
from quire.gateway.traffic.policy import Target

MAX_ANSWER_BYTES = 1024 * 1024
_decoder = msgspec.json.Decoder()

Send = Callable[[], AsyncIterator[bytes]]
"""Sends the copy, and gives the body of its answer as it comes. Raises what went wrong."""


@dataclass(slots=True)
class ShadowCounts:
    """By model: what came of the mirrors."""

    same: int = 0
    different: int = 0
    failed: int = 0
    skipped: int = 0
    uncompared: int = 0


@dataclass(slots=True)
class Mirror:
    """One mirrored request, seen from the answer that the client gets."""

    request: InferenceRequest
    target: Target
    compare: bool
    send: Send
    first: asyncio.Future[bytes | None]
    """The answer that the client gets, when that is whole; None: there is nothing to compare with."""
    _answer: bytearray = field(default_factory=bytearray)
    _whole: bool = True

    def feed(self, chunk: bytes) -> None:
        """Bytes of the answer's body, as the client gets them."""
        if not self.compare or not self._whole:
            return
        if len(self._answer) + len(chunk) > MAX_ANSWER_BYTES:
            self._whole = False
            self._answer.clear()
        else:
            self._answer += chunk

    def end(self, ok: bool) -> None:
        """The client's answer is whole (or not)."""
        if not self.first.done():
            self.first.set_result(bytes(self._answer) if ok and self._whole and self.compare else None)


class Shadow:
    def __init__(self, clock: Clock, max_running: int = 32) -> None:
        self._clock = clock
        self._max_running = max_running
        self._tasks: set[asyncio.Task[None]] = set()
        self.counts: dict[str, ShadowCounts] = {}

    def begin(self, request: InferenceRequest, target: Target, send: Send, *, compare: bool) -> Mirror | None:
        """Starts the mirror; None when there are too many."""
        counts = self.counts.setdefault(target.model, ShadowCounts())
        if len(self._tasks) >= self._max_running:
            counts.skipped += 1
            return None
        mirror = Mirror(request, target, compare, send, asyncio.get_running_loop().create_future())
        task = asyncio.create_task(self._run(mirror, counts))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return mirror

    async def stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _run(self, mirror: Mirror, counts: ShadowCounts) -> None:
        started = self._clock()
        try:
            theirs = await self._collect(mirror)
            seconds = self._clock() - started
            ours = await mirror.first
            if not mirror.compare or ours is None or theirs is None:
                counts.uncompared += 1
                return
            first, second = answer_text(ours), answer_text(theirs)
            same = first is not None and first == second
            counts.same += same
            counts.different += not same
            if not same:
                _tell(mirror, first or "", second or "", seconds)
        except asyncio.CancelledError:
            raise
        except Exception as error:  # a mirror's fault is counted, and nobody's trouble
            counts.failed += 1
            structlog.get_logger().info("shadow_failed", model=mirror.target.model, error=str(error))

    async def _collect(self, mirror: Mirror) -> bytes | None:
        body = bytearray()
        whole = True
        async for chunk in mirror.send():
            whole = whole and len(body) + len(chunk) <= MAX_ANSWER_BYTES
            if whole:
                body += chunk
        return bytes(body) if whole else None


def _tell(mirror: Mirror, first: str, second: str, seconds: float) -> None:
    at = next((i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second)))
    structlog.get_logger().info(
        "shadow_differs",
        request_id=mirror.request.id,
        model=mirror.target.model,
        first_difference=at,
        lengths=(len(first), len(second)),
        seconds=round(seconds, 3),
    )


def answer_text(body: bytes) -> str | None:
    """What a model said, of a JSON answer or of a stream of events, in OpenAI's or Anthropic's form; None for neither.

    Token counts, ids and times differ between any two answers; only the words (and tool calls) are compared.
    """
    parts: list[str] = []
    try:
        if body.lstrip()[:1] == b"{":
            _gather(_decoder.decode(body), parts)
        else:
            for line in body.split(b"\n"):
                data = line.removeprefix(b"data:").strip() if line.startswith(b"data:") else b""
                if data and data != b"[DONE]":
                    _gather(_decoder.decode(data), parts)
    except (msgspec.DecodeError, RecursionError):
        return None
    return "".join(parts) if parts else None


def _gather(answer: Any, parts: list[str]) -> None:
    if not isinstance(answer, dict):
        return
    said: list[Any] = [choice.get(key) for choice in _dicts(answer.get("choices")) for key in ("message", "delta")]
    said += [choice.get("text") for choice in _dicts(answer.get("choices"))]
    said += [answer.get("delta"), *_dicts(answer.get("content"))]
    for one in said:
        if isinstance(one, str):
            parts.append(one)
        elif isinstance(one, dict):
            parts.extend(one[key] for key in ("content", "text", "partial_json") if isinstance(one.get(key), str))
            for call in _dicts(one.get("tool_calls")):
                function = call.get("function")
                if isinstance(function, dict):
                    parts.extend(str(function[key]) for key in ("name", "arguments") if function.get(key))


def _dicts(value: object) -> list[dict[str, Any]]:
    return [one for one in value if isinstance(one, dict)] if isinstance(value, list) else []
