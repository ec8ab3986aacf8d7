"""/v1/chat/completions."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence

from starlette.requests import Request
from starlette.types import ASGIApp

from quire.core.errors import InvalidParameter, QuireError
from quire.core.request import EngineRequest, TokenLogprobs
from quire.core.sampling import SamplingParams
from quire.serve.body import decode_body, is_given, loose_json
from quire.serve.call import Call, answer
from quire.serve.chat_messages import plain_messages, template_variables, tool_list
from quire.serve.generation import Generation, Piece
from quire.serve.inbox import patience
from quire.serve.logprobs import chat_logprobs, prompt_logprobs
from quire.serve.sampling import check_listed, refuse_unsupported, sampling_params, unsupported
from quire.serve.service import Service
from quire.serve.sse import DONE, event
from quire.web.answers import error_body, json_response
from quire.wire.openai import StreamOptions
from quire.wire.openai_chat import (
    AssistantMessage,
    ChatChoice,
    ChatChunkChoice,
    ChatCompletion,
    ChatCompletionChunk,
    ChatCompletionRequest,
    Delta,
)


class ChatCompletions:
    def __init__(self, service: Service) -> None:
        self._service = service

    async def create(self, request: Request) -> ASGIApp:
        service = self._service
        arrival = service.clock()
        body = await request.body()
        fields = decode_body(body, ChatCompletionRequest)
        call = Call.of(
            request,
            body,
            fields,
            prefix="chatcmpl",
            model=service.check_model(fields.model),
            arrival_time=arrival,
        )
        with contextlib.ExitStack() as held:
            generation = await begin_chat(service, call, fields, held)
            writer = _Writer(service, call, fields, generation)
            return await answer(request, call, generation, writer, held, stream=bool(fields.stream))


async def begin_chat(
    service: Service, call: Call, fields: ChatCompletionRequest, held: contextlib.ExitStack
) -> Generation:
    """The call's sequences, before they are submitted; what they hold is let go with `held`."""
    sampling = _sampling(fields, service)
    check_listed(sampling, sampling.n)
    messages = plain_messages(fields.messages)
    tools = tool_list(fields.tools) if may_call_tools(fields) else None
    variables = template_variables(fields.chat_template_kwargs)
    held.enter_context(service.running_call())
    encoder = await service.generator(patience(call.deadlines))
    make = call.request_maker(encoder, sampling, default_max_tokens=service.default_max_tokens)

    def encode() -> list[EngineRequest]:
        token_ids = encoder.encode_chat(
            messages,
            sampling,
            tools=tools,
            template_kwargs=variables,
            add_generation_prompt=_adds_generation_prompt(fields),
            continue_final_message=bool(fields.continue_final_message),
            add_special_tokens=bool(fields.add_special_tokens),
        )
        return make(call.engine_id, token_ids)

    requests = await asyncio.to_thread(encode)  # the template runs in a process that has to be waited for
    generation = Generation(service, [requests], service.eos_token_ids)
    held.callback(generation.close)
    return generation


def _sampling(fields: ChatCompletionRequest, service: Service) -> SamplingParams:
    refuse_unsupported(fields)
    for name in ("functions", "function_call", "audio", "prediction", "web_search_options", "documents"):
        if is_given(getattr(fields, name)):
            raise unsupported(name)
    if fields.modalities is not None and fields.modalities != ["text"]:
        raise unsupported("modalities")
    if fields.chat_template is not None:
        raise InvalidParameter(
            "A request may not bring its own chat template.",
            param="chat_template",
            remedy="Start the server with --chat-template.",
        )
    if fields.top_logprobs is not None:
        _check_top_logprobs(fields.top_logprobs, bool(fields.logprobs), service.max_logprobs)
    max_tokens = fields.max_tokens if fields.max_completion_tokens is None else fields.max_completion_tokens
    logprobs = (fields.top_logprobs or 0) if fields.logprobs else None
    return sampling_params(fields, service.sampling_defaults, max_tokens=max_tokens, logprobs=logprobs)


def _check_top_logprobs(top_logprobs: int, with_logprobs: bool, most: int) -> None:
    if not with_logprobs:
        raise InvalidParameter(
            "top_logprobs is set without logprobs.", param="top_logprobs", remedy="Set logprobs to true."
        )
    if not 0 <= top_logprobs <= most:
        raise InvalidParameter(
            f"top_logprobs is {top_logprobs}.", param="top_logprobs", remedy=f"It must be between 0 and {most}."
        )


def may_call_tools(fields: ChatCompletionRequest) -> bool:
    choice = loose_json(fields.tool_choice, "tool_choice")
    if choice not in (None, "none", "auto"):
        raise unsupported("tool_choice", str(choice)[:40])
    return bool(choice != "none")


def _adds_generation_prompt(fields: ChatCompletionRequest) -> bool:
    if fields.add_generation_prompt is None:
        return not fields.continue_final_message
    return fields.add_generation_prompt


class _Writer:
    """Turns pieces into OpenAI's objects."""

    def __init__(self, service: Service, call: Call, fields: ChatCompletionRequest, generation: Generation) -> None:
        self._tokenizer = service.tokenizer
        self._call = call
        self._fields = fields
        self._options = fields.stream_options or StreamOptions()
        self._generation = generation

    def whole(self, pieces: Sequence[Piece]) -> ASGIApp:
        choices = []
        for choice in self._generation.choices:
            own = [piece for piece in pieces if piece.choice is choice]
            item = ChatChoice(
                index=choice.index,
                message=AssistantMessage(content="".join(piece.text for piece in own)),
                finish_reason=choice.finish_reason,
                stop_reason=choice.stop_reason,
            )
            if self._fields.logprobs:
                entries: list[TokenLogprobs] = [entry for piece in own for entry in piece.logprobs or ()]
                item.logprobs = chat_logprobs(self._tokenizer, entries)
            if self._fields.return_token_ids:
                item.token_ids = [token_id for piece in own for token_id in piece.token_ids]
            choices.append(item)
        body = ChatCompletion(
            id=self._call.id,
            created=self._call.created,
            model=self._call.model,
            choices=choices,
            usage=self._generation.usage(),
        )
        first = self._generation.choices[0]
        if self._fields.prompt_logprobs is not None:
            body.prompt_logprobs = prompt_logprobs(self._tokenizer, first.prompt_logprobs)
        if self._fields.return_token_ids:
            body.prompt_token_ids = list(first.request.prompt_token_ids)
        return json_response(body, headers=self._call.headers)

    async def events(self, pieces: AsyncIterator[Piece]) -> AsyncIterator[bytes]:
        for choice in self._generation.choices:
            opening = self._chunk(ChatChunkChoice(index=choice.index, delta=Delta(role="assistant", content="")))
            if self._fields.return_token_ids and choice.index == 0:
                opening.prompt_token_ids = list(choice.request.prompt_token_ids)
            yield event(opening)
        async for piece in pieces:
            choice = piece.choice
            if piece.text or piece.logprobs or (piece.token_ids and self._fields.return_token_ids):
                item = ChatChunkChoice(index=choice.index, delta=Delta(content=piece.text))
                if self._fields.logprobs:
                    item.logprobs = chat_logprobs(self._tokenizer, piece.logprobs or ())
                if self._fields.return_token_ids:
                    item.token_ids = piece.token_ids
                yield event(self._chunk(item))
            if choice.finish_reason is not None:
                last = ChatChunkChoice(index=choice.index, delta=Delta(), finish_reason=choice.finish_reason)
                last.stop_reason = choice.stop_reason
                yield event(self._chunk(last))
        if self._options.include_usage:
            closing = self._chunk()
            closing.usage = self._generation.usage()
            yield event(closing)
        yield DONE

    def broken(self, error: QuireError) -> bytes:
        return event(error_body(error))

    def _chunk(self, *choices: ChatChunkChoice) -> ChatCompletionChunk:
        chunk = ChatCompletionChunk(
            id=self._call.id, created=self._call.created, model=self._call.model, choices=list(choices)
        )
        if self._options.continuous_usage_stats:
            chunk.usage = self._generation.usage()
        return chunk
