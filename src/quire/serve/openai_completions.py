"""/v1/completions."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field

from starlette.requests import Request
from starlette.types import ASGIApp

from quire.core.errors import InvalidParameter, QuireError
from quire.core.request import EngineRequest, TokenLogprobs
from quire.core.sampling import SamplingParams
from quire.serve.body import decode_body
from quire.serve.call import Call, answer
from quire.serve.generation import Choice, Generation, Piece
from quire.serve.inbox import patience
from quire.serve.logprobs import completion_logprobs, prompt_logprobs
from quire.serve.sampling import check_listed, num_listed, refuse_unsupported, sampling_params, unsupported
from quire.serve.service import Service, off_loop
from quire.serve.sse import DONE, event
from quire.web.answers import error_body, json_response
from quire.wire.openai import StreamOptions, Usage
from quire.wire.openai_completions import Completion, CompletionChoice, CompletionRequest

DEFAULT_MAX_TOKENS = 16
MAX_SEQUENCES = 1024

Prompt = str | list[int]


class Completions:
    def __init__(self, service: Service) -> None:
        self._service = service

    async def create(self, request: Request) -> ASGIApp:
        service = self._service
        arrival = service.clock()
        body = await request.body()
        fields = decode_body(body, CompletionRequest)
        call = Call.of(
            request, body, fields, prefix="cmpl", model=service.check_model(fields.model), arrival_time=arrival
        )
        sampling = _sampling(fields, service)
        prompts = _prompts(fields.prompt)
        num_sequences = len(prompts) * sampling.n
        if num_sequences > MAX_SEQUENCES:
            raise InvalidParameter(
                f"{len(prompts)} prompts with n={sampling.n} are too many.",
                param="prompt",
                remedy=f"Ask for at most {MAX_SEQUENCES} sequences.",
            )
        check_listed(sampling, num_sequences)
        with contextlib.ExitStack() as held:
            held.enter_context(service.running_call())
            encoder = await service.generator(patience(call.deadlines))
            add_special = fields.add_special_tokens is not False
            default = DEFAULT_MAX_TOKENS if service.default_max_tokens is None else service.default_max_tokens
            make = call.request_maker(encoder, sampling, default_max_tokens=default)

            def encode() -> list[Sequence[EngineRequest]]:
                ids = [encoder.encode_text(prompt, sampling, add_special_tokens=add_special) for prompt in prompts]
                return [make(f"{call.engine_id}-{index}", token_ids) for index, token_ids in enumerate(ids)]

            size = sum(map(len, prompts)) + num_sequences * num_listed(sampling)
            requests = await off_loop(size, encode)
            generation = Generation(service, requests, service.eos_token_ids)
            held.callback(generation.close)
            writer = _Writer(service, call, fields, prompts, generation)
            return await answer(request, call, generation, writer, held, stream=bool(fields.stream))


def _sampling(fields: CompletionRequest, service: Service) -> SamplingParams:
    refuse_unsupported(fields)
    if fields.suffix:
        raise unsupported("suffix")
    if fields.best_of is not None and fields.best_of != (fields.n or 1):
        raise InvalidParameter(f"best_of is {fields.best_of}.", param="best_of", remedy="Leave it out; n is served.")
    max_tokens = fields.max_tokens
    if max_tokens == 0 and fields.echo:
        max_tokens = 1  # only the prompt is wanted: the one token that the engine makes is dropped
    wants_prompt = fields.echo and fields.prompt_logprobs is None
    return sampling_params(
        fields,
        service.sampling_defaults,
        max_tokens=max_tokens,
        logprobs=fields.logprobs,
        prompt_logprobs=fields.logprobs if wants_prompt else None,
    )


def _prompts(prompt: str | list[str | int | list[int]]) -> list[Prompt]:
    if isinstance(prompt, str):
        return [prompt]
    if not prompt:
        raise InvalidParameter("prompt is an empty list.", param="prompt", remedy="Send a text or token ids.")
    if all(isinstance(item, int) for item in prompt):
        return [[item for item in prompt if isinstance(item, int)]]
    texts: list[Prompt] = [item for item in prompt if isinstance(item, str)]
    lists: list[Prompt] = [item for item in prompt if isinstance(item, list)]
    if len(texts) == len(prompt):
        return texts
    if len(lists) == len(prompt):
        return lists
    raise InvalidParameter(
        "prompt mixes texts and token ids.", param="prompt", remedy="Send either texts or token ids."
    )


@dataclass(slots=True)
class _Collected:
    """What a choice has gathered for an answer that is not streamed, or sent so far for one that is."""

    text: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[tuple[int, TokenLogprobs | None]] = field(default_factory=list)
    offset: int = 0
    echoed: bool = False


class _Writer:
    """Turns pieces into OpenAI's objects."""

    def __init__(
        self, service: Service, call: Call, fields: CompletionRequest, prompts: list[Prompt], generation: Generation
    ) -> None:
        self._tokenizer = service.tokenizer
        self._call = call
        self._fields = fields
        self._options = fields.stream_options or StreamOptions()
        self._prompts = prompts
        self._generation = generation
        self._only_prompt = bool(fields.echo and fields.max_tokens == 0)

    def whole(self, pieces: Sequence[Piece]) -> ASGIApp:
        collected = [_Collected() for _ in self._generation.choices]
        for piece in pieces:
            own = collected[piece.choice.index]
            text, token_ids, logprobs = self._with_echo(piece, own)
            own.text.append(text)
            own.token_ids.extend(token_ids)
            own.logprobs.extend(logprobs)
        choices = []
        for choice, own in zip(self._generation.choices, collected, strict=True):
            item = self._choice(choice, "".join(own.text), own.logprobs, 0)
            if self._fields.prompt_logprobs is not None:
                item.prompt_logprobs = prompt_logprobs(self._tokenizer, choice.prompt_logprobs)
            if self._fields.return_token_ids:
                item.token_ids = own.token_ids
                item.prompt_token_ids = list(choice.request.prompt_token_ids)
            choices.append(item)
        body = self._object(choices)
        body.usage = self._usage()
        return json_response(body, headers=self._call.headers)

    async def events(self, pieces: AsyncIterator[Piece]) -> AsyncIterator[bytes]:
        sent = [_Collected() for _ in self._generation.choices]
        async for piece in pieces:
            own = sent[piece.choice.index]
            is_first = not own.echoed
            text, token_ids, logprobs = self._with_echo(piece, own)
            if not (text or logprobs or piece.choice.finish_reason or (self._fields.return_token_ids and token_ids)):
                continue
            item = self._choice(piece.choice, text, logprobs, own.offset)
            own.offset += sum(len(self._tokenizer.token_text(token_id)) for token_id, _ in logprobs)
            if self._fields.return_token_ids:
                item.token_ids = token_ids
                if is_first:
                    item.prompt_token_ids = list(piece.choice.request.prompt_token_ids)
            chunk = self._object([item])
            if self._options.continuous_usage_stats:
                chunk.usage = self._usage()
            yield event(chunk)
        if self._options.include_usage:
            last = self._object([])
            last.usage = self._usage()
            yield event(last)
        yield DONE

    def _with_echo(
        self, piece: Piece, own: _Collected
    ) -> tuple[str, list[int], list[tuple[int, TokenLogprobs | None]]]:
        """The piece's text, tokens and logprobs, with the prompt's before the first if it is to be echoed."""
        text, token_ids = piece.text, piece.token_ids
        entries: list[tuple[int, TokenLogprobs | None]] = [(entry.token_id, entry) for entry in piece.logprobs or ()]
        if self._only_prompt:
            text, token_ids, entries = "", [], []
        if self._fields.echo and not own.echoed:
            prompt = self._prompts[piece.choice.prompt_index]
            text = (prompt if isinstance(prompt, str) else self._tokenizer.decode(prompt)) + text
            if self._fields.logprobs is not None and piece.choice.prompt_logprobs is not None:
                prompt_ids = piece.choice.request.prompt_token_ids
                entries = [*zip(prompt_ids, piece.choice.prompt_logprobs, strict=True), *entries]
        own.echoed = True
        return text, token_ids, entries

    def _choice(
        self, choice: Choice, text: str, entries: Sequence[tuple[int, TokenLogprobs | None]], offset: int
    ) -> CompletionChoice:
        logprobs = None
        if self._fields.logprobs is not None:
            logprobs = completion_logprobs(self._tokenizer, entries, offset)
        return CompletionChoice(
            index=choice.index,
            text=text,
            logprobs=logprobs,
            finish_reason="length" if self._only_prompt else choice.finish_reason,
            stop_reason=None if self._only_prompt else choice.stop_reason,
        )

    def broken(self, error: QuireError) -> bytes:
        return event(error_body(error))

    def _usage(self) -> Usage:
        usage = self._generation.usage()
        if self._only_prompt:
            usage.completion_tokens, usage.total_tokens = 0, usage.prompt_tokens
        return usage

    def _object(self, choices: list[CompletionChoice]) -> Completion:
        return Completion(id=self._call.id, created=self._call.created, model=self._call.model, choices=choices)
