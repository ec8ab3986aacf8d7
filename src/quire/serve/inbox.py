"""Where the outputs of one call's requests arrive, and what a request is while it flies.

A call of the API submits one or more requests (`n`, several prompts) and reads one inbox. A `Flight` is one of these
requests: it knows what has been delivered, so that an engine's death can be hidden by running the request again.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from dataclasses import replace

import msgspec

from quire.core.errors import EngineDead, QuireError
from quire.core.request import Deadlines, EngineOutput, EngineRequest, FinishReason

MAX_PENDING = 8192
MAX_PENDING_PER_REQUEST = 1024
"""Tokens and log-probabilities that may wait for a reader that does not read; more ends the call."""


class SlowReader(QuireError):
    """The client did not read its answer."""

    code = "slow_reader"
    status = 408


class Inbox:
    """Outputs of several requests, in order of arrival; at most `max_pending` tokens and log-probabilities."""

    def __init__(self, max_pending: int) -> None:
        self._max_pending = max_pending
        self._outputs: list[EngineOutput] = []
        self._pending = 0
        self._arrived = asyncio.Event()
        self._overflow = False

    @classmethod
    def of_size(cls, num_requests: int) -> Inbox:
        return cls(MAX_PENDING + MAX_PENDING_PER_REQUEST * num_requests)

    def put(self, output: EngineOutput) -> bool:
        """False if the reader is so late that the call has to end; nothing is taken in from then on."""
        if self._pending > self._max_pending:
            self._overflow = True
            self._arrived.set()
            return False
        self._pending += len(output.token_ids) + sum(1 + len(entry.top_ids) for entry in output.logprobs or ())
        self._outputs.append(output)
        self._arrived.set()
        return True

    async def get(self) -> Sequence[EngineOutput]:
        """All outputs that have come since the last call, at least one. Raises `SlowReader` after an overflow."""
        await self._arrived.wait()
        if self._overflow:
            raise SlowReader(
                f"The answer was given up: more than {self._max_pending} tokens and logprobs waited to be read.",
                remedy="Read the stream as it comes.",
            )
        self._arrived.clear()
        outputs, self._outputs, self._pending = self._outputs, [], 0
        return outputs


def patience(deadlines: Deadlines) -> float:
    """Seconds from its arrival that a request without a token may wait; infinite without a deadline."""
    limits = (deadlines.total_ms, deadlines.queue_ms, deadlines.ttft_ms)
    return min((ms / 1000 for ms in limits if ms is not None), default=math.inf)


class Flight:
    """One request on its way. `deaths` counts the engines that died while they ran it."""

    def __init__(self, request: EngineRequest, inbox: Inbox, now: float) -> None:
        self.request = request
        self.inbox = inbox
        self.queued_at = now
        self.sent = False
        self.deaths = 0
        self._delivered: list[int] = []
        self._to_skip = 0
        self._had_prompt_logprobs = False

    def engine_died(self, now: float) -> None:
        """It was in flight when its engine died; what has been delivered will be skipped when it comes again."""
        self.sent = False
        self.queued_at = now
        self.deaths += 1
        self._to_skip = len(self._delivered)
        if self._delivered:
            # It has been scheduled and had its first token in time: a replay must not be refused for these.
            left = Deadlines(total_ms=self.request.deadlines.total_ms)
            self.request = replace(self.request, deadlines=left)

    def accept(self, output: EngineOutput) -> EngineOutput | None:
        """The part of `output` that is new to the reader, None if there is none.

        Raises `EngineDead` if a replay does not repeat what was delivered (a broken promise P1, which must not be
        hidden behind garbled text).
        """
        if self._had_prompt_logprobs and output.prompt_logprobs is not None:
            output = msgspec.structs.replace(output, prompt_logprobs=None)
        if self._to_skip:
            output = self._skip_delivered(output)
        self._delivered.extend(output.token_ids)
        self._had_prompt_logprobs |= output.prompt_logprobs is not None
        is_news = output.token_ids or output.finish_reason is not None or output.prompt_logprobs is not None
        return output if is_news or output.error is not None else None

    def _skip_delivered(self, output: EngineOutput) -> EngineOutput:
        start = len(self._delivered) - self._to_skip
        skip = min(self._to_skip, len(output.token_ids))
        repeated = list(output.token_ids[:skip]) == self._delivered[start : start + skip]
        ended_early = output.finish_reason not in (None, FinishReason.ERROR) and skip < self._to_skip
        if not repeated or ended_early:
            raise EngineDead(
                "The engine died, and running the request again gave other tokens than it had already sent.",
                remedy="Send the request again.",
            )
        self._to_skip -= skip
        logprobs = None if output.logprobs is None else output.logprobs[skip:]
        return msgspec.structs.replace(output, token_ids=output.token_ids[skip:], logprobs=logprobs)
