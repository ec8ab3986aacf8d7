"""One call's sequences on their way from token ids to text.

A `Generation` submits the engine requests of a call, and turns their outputs into `Piece`s: text, tokens and logprobs
that are new in one choice. Whoever makes one closes it; that cancels what still runs.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Collection, Sequence
from dataclasses import dataclass

from quire.core.errors import QuireError, from_info
from quire.core.request import EngineOutput, EngineRequest, FinishReason, RequestTimes, TokenLogprobs
from quire.serve.service import Service
from quire.text.stream import TextStream
from quire.wire.openai import FinishReasonText, PromptTokensDetails, Usage

_REASONS: dict[FinishReason, FinishReasonText] = {
    FinishReason.STOP: "stop",
    FinishReason.LENGTH: "length",
    FinishReason.ABORT: "abort",
}


@dataclass(slots=True, kw_only=True)
class Piece:
    """What is new in a choice."""

    choice: Choice
    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprobs] | None
    num_logprobs: int
    """How many log-probabilities came with it, of alternatives and of the prompt as well."""


@dataclass(slots=True, kw_only=True)
class Choice:
    """One sequence as it grows. `finish_reason` and `stop_reason` are set by its last piece."""

    index: int
    prompt_index: int
    request: EngineRequest
    stream: TextStream
    num_tokens: int = 0
    num_cached_tokens: int = 0
    num_preemptions: int = 0
    finish_reason: FinishReasonText | None = None
    stop_reason: int | str | None = None
    prompt_logprobs: Sequence[TokenLogprobs | None] | None = None
    first_token_at: float | None = None
    last_token_at: float | None = None
    times: RequestTimes | None = None
    """As the engine told last: of the first token only, if a stop string ends the choice."""

    def push(self, output: EngineOutput) -> Piece:
        """Take in an output that carries no error."""
        num_logprobs = _count(output.logprobs) + _count(output.prompt_logprobs)
        if output.prompt_logprobs is not None:
            self.prompt_logprobs = output.prompt_logprobs
        self.times = output.times or self.times
        self.num_cached_tokens = max(self.num_cached_tokens, output.num_cached_tokens)
        self.num_preemptions = max(self.num_preemptions, output.num_preemptions)
        delta = self.stream.push(output.token_ids, output.logprobs)
        text, stop = delta.text, delta.stop
        if stop is None and output.finish_reason is not None:
            rest = self.stream.flush()
            text, stop = text + rest.text, rest.stop
            self.finish_reason, self.stop_reason = _REASONS[output.finish_reason], output.stop_reason
        if stop is not None:
            self.finish_reason, self.stop_reason = "stop", stop
        self.num_tokens += len(delta.token_ids)
        return Piece(
            choice=self,
            text=text,
            token_ids=delta.token_ids,
            logprobs=delta.logprobs,
            num_logprobs=num_logprobs,
        )


def _count(entries: Sequence[TokenLogprobs | None] | None) -> int:
    return sum(1 + len(entry.top_ids) for entry in entries or () if entry is not None)


class Generation:
    """All sequences of one call; `prompts` has, per prompt, one request per sample."""

    def __init__(
        self, service: Service, prompts: Sequence[Sequence[EngineRequest]], eos_token_ids: Collection[int]
    ) -> None:
        self._service = service
        self.choices: list[Choice] = []
        for prompt_index, requests in enumerate(prompts):
            for request in requests:
                stream = TextStream(
                    service.tokenizer, request.sampling, request.prompt_token_ids, eos_token_ids=eos_token_ids
                )
                choice = Choice(index=len(self.choices), prompt_index=prompt_index, request=request, stream=stream)
                self.choices.append(choice)
        self._open: dict[str, Choice] = {}
        """Submitted and not ended."""
        self._num_prompt_tokens = sum(len(requests[0].prompt_token_ids) for requests in prompts)

    async def pieces(self) -> AsyncIterator[Piece]:
        """Until all choices have ended. Raises a request's error, as the whole call's."""
        engine, metrics = self._service.engine, self._service.metrics
        try:
            inbox = engine.submit([choice.request for choice in self.choices])
        except QuireError as error:
            metrics.request_failed(error.code)
            raise
        self._open = {choice.request.request_id: choice for choice in self.choices}
        while self._open:
            for output in await inbox.get():
                choice = self._open.get(output.request_id)
                if choice is None:
                    continue  # its stop string came before
                if output.error is not None:
                    del self._open[output.request_id]
                    metrics.request_failed(output.error.code)
                    raise from_info(output.error)
                piece = choice.push(output)
                if choice.finish_reason is not None:
                    del self._open[output.request_id]
                    if output.finish_reason is None:
                        engine.finish([output.request_id])  # its stop string came
                self._observe(choice, output)
                yield piece

    def _observe(self, choice: Choice, output: EngineOutput) -> None:
        now = self._service.clock()
        metrics = self._service.metrics
        if output.token_ids:
            if choice.first_token_at is None:
                choice.first_token_at = now
                metrics.first_token(now - choice.request.arrival_time)
            else:
                assert choice.last_token_at is not None
                metrics.next_tokens(now - choice.last_token_at, len(output.token_ids))
            choice.last_token_at = now
        if choice.finish_reason is not None:
            metrics.request_finished(choice, now)
            samples = [other for other in self.choices if other.prompt_index == choice.prompt_index]
            if all(sample.finish_reason is not None for sample in samples):
                metrics.prompt_finished(len(samples), max(sample.num_tokens for sample in samples))

    def close(self) -> None:
        """Cancel what still runs. May be called more than once."""
        if self._open:
            self._service.engine.cancel(list(self._open))
            self._service.metrics.requests_aborted(len(self._open))
            self._open.clear()

    def usage(self) -> Usage:
        cached = {choice.prompt_index: choice.num_cached_tokens for choice in reversed(self.choices)}
        completion = sum(choice.num_tokens for choice in self.choices)
        return Usage(
            prompt_tokens=self._num_prompt_tokens,
            completion_tokens=completion,
            total_tokens=self._num_prompt_tokens + completion,
            prompt_tokens_details=PromptTokensDetails(cached_tokens=sum(cached.values())),
        )
