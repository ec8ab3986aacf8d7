"""/tokenize and /detokenize."""

from __future__ import annotations

import asyncio
from functools import partial

from starlette.requests import Request
from starlette.responses import Response

from quire.core.errors import InvalidParameter
from quire.serve.body import decode_body
from quire.serve.chat_messages import plain_messages, template_variables, tool_list
from quire.serve.service import Service, off_loop
from quire.text.tokenizer import Tokenizer
from quire.web.answers import json_response
from quire.wire.tokenize import DetokenizeRequest, DetokenizeResponse, TokenizeRequest, TokenizeResponse


class Tokenization:
    def __init__(self, service: Service) -> None:
        self._service = service

    async def tokenize(self, request: Request) -> Response:
        service = self._service
        fields = decode_body(await request.body(), TokenizeRequest)
        service.check_model(fields.model)
        if (fields.prompt is None) == (fields.messages is None):
            raise InvalidParameter(
                "Exactly one of prompt and messages has to be given.", param="prompt", remedy="Send one of them."
            )
        token_ids = await self._encode(fields)
        model = await service.model()
        token_strs = None
        if fields.return_token_strs:
            token_strs = await off_loop(len(token_ids), lambda: list(map(service.tokenizer.token_text, token_ids)))
        return json_response(
            TokenizeResponse(
                count=len(token_ids), max_model_len=model.max_model_len, tokens=token_ids, token_strs=token_strs
            )
        )

    async def _encode(self, fields: TokenizeRequest) -> list[int]:
        """Without the limit of the model's context: a client may want to know by how much it is over."""
        text, add_special_tokens = fields.prompt, fields.add_special_tokens is not False
        if text is None:
            assert fields.messages is not None
            encoder = await self._service.encoder()
            render = partial(
                encoder.chat_text,
                plain_messages(fields.messages),
                tools=tool_list(fields.tools),
                template_kwargs=template_variables(fields.chat_template_kwargs),
                add_generation_prompt=not fields.continue_final_message
                if fields.add_generation_prompt is None
                else fields.add_generation_prompt,
                continue_final_message=bool(fields.continue_final_message),
            )
            text, add_special_tokens = await asyncio.to_thread(render), bool(fields.add_special_tokens)
        encode = partial(self._service.tokenizer.encode, text, add_special_tokens=add_special_tokens)
        return await off_loop(len(text), encode)

    async def detokenize(self, request: Request) -> Response:
        fields = decode_body(await request.body(), DetokenizeRequest)
        self._service.check_model(fields.model)
        decode = partial(_decode, self._service.tokenizer, fields.tokens)
        return json_response(DetokenizeResponse(prompt=await off_loop(len(fields.tokens), decode)))


def _decode(tokenizer: Tokenizer, token_ids: list[int]) -> str:
    size = tokenizer.vocab_size
    for token_id in token_ids:
        if not 0 <= token_id < size:
            raise InvalidParameter(
                f"tokens has the id {token_id}.", param="tokens", remedy=f"Ids are from 0 to {size - 1}."
            )
    return tokenizer.decode(token_ids, skip_special_tokens=False)
