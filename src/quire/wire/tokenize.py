"""/tokenize and /detokenize, in vLLM's shapes."""

from __future__ import annotations

import msgspec

from quire.wire.openai_chat import Message


class TokenizeRequest(msgspec.Struct, kw_only=True):
    """Either `prompt` or `messages`."""

    model: str | None = None
    prompt: str | None = None
    messages: list[Message] | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    tools: msgspec.Raw = msgspec.field(default_factory=msgspec.Raw)
    chat_template_kwargs: msgspec.Raw = msgspec.field(default_factory=msgspec.Raw)


class TokenizeResponse(msgspec.Struct, kw_only=True):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizeRequest(msgspec.Struct, kw_only=True):
    tokens: list[int]
    model: str | None = None


class DetokenizeResponse(msgspec.Struct, kw_only=True):
    prompt: str


class VersionResponse(msgspec.Struct, kw_only=True):
    version: str


class HealthResponse(msgspec.Struct, kw_only=True):
    """`status` is ok, starting, stale, draining or failed."""

    status: str
    heartbeat_age_seconds: float | None = None
    engine_restarts: int = 0
    detail: str | None = None
