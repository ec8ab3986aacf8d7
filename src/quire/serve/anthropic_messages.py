"""/v1/messages and /v1/messages/count_tokens: Anthropic's API, as another form of the chat route."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from functools import partial

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp

from quire.core.errors import QuireError
from quire.serve.anthropic_request import chat_request
from quire.serve.body import decode_body
from quire.serve.call import Call, answer
from quire.serve.chat_messages import plain_messages, tool_list
from quire.serve.generation import Choice, Generation, Piece
from quire.serve.openai_chat import begin_chat, may_call_tools
from quire.serve.service import Service, off_loop
from quire.web.answers import ANTHROPIC_PATH, error_json, json_response
from quire.wire.anthropic import (
    AnthropicMessage,
    ContentBlockDelta,
    ContentBlockStart,
    ContentBlockStop,
    CountTokensRequest,
    MessageDelta,
    MessagesRequest,
    MessageStart,
    MessageStop,
    MessageUsage,
    StopDelta,
    StopReason,
    TextBlock,
    TextDelta,
    TokenCount,
)


class Messages:
    def __init__(self, service: Service) -> None:
        self._service = service

    async def create(self, request: Request) -> ASGIApp:
        service = self._service
        arrival = service.clock()
        body = await request.body()
        fields = decode_body(body, MessagesRequest)
        model = service.check_model(fields.model)
        call = Call.of(request, body, fields, prefix="msg", model=model, arrival_time=arrival)
        chat = chat_request(fields)
        with contextlib.ExitStack() as held:
            generation = await begin_chat(service, call, chat, held)
            return await answer(request, call, generation, _Writer(call, generation), held, stream=bool(fields.stream))

    async def count_tokens(self, request: Request) -> Response:
        fields = decode_body(await request.body(), CountTokensRequest)
        self._service.check_model(fields.model)
        chat = chat_request(fields)
        encoder = await self._service.encoder()
        render = partial(
            encoder.chat_text,
            plain_messages(chat.messages),
            tools=tool_list(chat.tools) if may_call_tools(chat) else None,
            template_kwargs=None,
            add_generation_prompt=not chat.continue_final_message,
            continue_final_message=bool(chat.continue_final_message),
        )
        text = await asyncio.to_thread(render)
        encode = partial(self._service.tokenizer.encode, text, add_special_tokens=False)
        token_ids = await off_loop(len(text), encode)
        return json_response(TokenCount(input_tokens=len(token_ids)))


class _Writer:
    """Turns pieces into Anthropic's objects."""

    def __init__(self, call: Call, generation: Generation) -> None:
        self._call = call
        self._generation = generation
        self._choice = generation.choices[0]

    def whole(self, pieces: Sequence[Piece]) -> ASGIApp:
        message = self._message([TextBlock(text="".join(piece.text for piece in pieces))])
        message.stop_reason, message.stop_sequence = _stop(self._choice)
        return json_response(message, headers=self._call.headers)

    async def events(self, pieces: AsyncIterator[Piece]) -> AsyncIterator[bytes]:
        begun = False
        async for piece in pieces:
            if not begun:  # now it is known how much of the prompt was cached
                begun = True
                opening = self._message([])
                opening.usage.output_tokens = 0
                yield _event("message_start", MessageStart(message=opening))
                yield _event("content_block_start", ContentBlockStart(content_block=TextBlock(text="")))
            if piece.text:
                yield _event("content_block_delta", ContentBlockDelta(delta=TextDelta(text=piece.text)))
        reason, sequence = _stop(self._choice)
        yield _event("content_block_stop", ContentBlockStop())
        delta = StopDelta(stop_reason=reason, stop_sequence=sequence)
        yield _event("message_delta", MessageDelta(delta=delta, usage=self._usage()))
        yield _event("message_stop", MessageStop())

    def broken(self, error: QuireError) -> bytes:
        return b"event: error\ndata: " + error_json(error, ANTHROPIC_PATH) + b"\n\n"

    def _message(self, content: list[TextBlock]) -> AnthropicMessage:
        return AnthropicMessage(id=self._call.id, model=self._call.model, content=content, usage=self._usage())

    def _usage(self) -> MessageUsage:
        usage = self._generation.usage()
        cached = 0 if usage.prompt_tokens_details is None else usage.prompt_tokens_details.cached_tokens
        return MessageUsage(
            input_tokens=usage.prompt_tokens - cached,
            output_tokens=usage.completion_tokens,
            cache_read_input_tokens=cached,
        )


def _stop(choice: Choice) -> tuple[StopReason | None, str | None]:
    if choice.finish_reason == "length":
        return "max_tokens", None
    if choice.finish_reason != "stop":
        return None, None  # aborted
    if isinstance(choice.stop_reason, str):
        return "stop_sequence", choice.stop_reason
    return "end_turn", None


def _event(name: str, value: msgspec.Struct) -> bytes:
    return b"event: %b\ndata: %b\n\n" % (name.encode(), msgspec.json.encode(value))
