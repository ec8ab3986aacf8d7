"""Anthropic's /v1/messages: its request, its answer, and the events of a stream (its reference, Messages).

A field that is not named here is refused: left out, it could change the answer.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from quire.wire.openai import CallFields

StopReason = Literal["end_turn", "max_tokens", "stop_sequence"]


def _raw() -> msgspec.Raw:
    return msgspec.field(default_factory=msgspec.Raw)


class Block(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A part of a message's content: `text`, `tool_use` or `tool_result`."""

    type: str
    text: str | None = None
    id: str | None = None
    name: str | None = None
    input: msgspec.Raw = _raw()
    tool_use_id: str | None = None
    content: str | list[Block] | None = None
    is_error: bool | None = None
    citations: msgspec.Raw = _raw()
    cache_control: msgspec.Raw = _raw()
    """Has no effect: prefixes are cached by themselves."""
    source: msgspec.Raw = _raw()
    thinking: str | None = None
    signature: str | None = None


class InputMessage(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    role: Literal["user", "assistant"]
    content: str | list[Block]


class Tool(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    name: str
    input_schema: dict[str, msgspec.Raw] | None = None
    description: str | None = None
    type: str | None = None
    cache_control: msgspec.Raw = _raw()


class ToolChoice(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    type: str
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class Thinking(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    type: str
    budget_tokens: int | None = None


class CountTokensRequest(CallFields, kw_only=True, forbid_unknown_fields=True):
    messages: list[InputMessage]
    system: str | list[Block] | None = None
    tools: list[Tool] | None = None
    """Shown to the chat template; calls in the answer stay in its text."""
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None
    """Anything but `disabled` is refused."""


class MessagesRequest(CountTokensRequest, kw_only=True, forbid_unknown_fields=True):
    max_tokens: int
    stop_sequences: list[str] | None = None
    stream: bool | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    metadata: msgspec.Raw = _raw()
    """For the caller's own records; has no effect here."""
    service_tier: str | None = None
    """Has no effect: there is one."""


class TokenCount(msgspec.Struct, kw_only=True):
    input_tokens: int


class MessageUsage(msgspec.Struct, kw_only=True):
    input_tokens: int
    """Those that were not found in the cache."""
    output_tokens: int
    cache_read_input_tokens: int = 0
    cache_creation_input_tokens: int = 0


class TextBlock(msgspec.Struct, kw_only=True, tag_field="type", tag="text"):
    text: str


class AnthropicMessage(msgspec.Struct, kw_only=True, tag_field="type", tag="message"):
    id: str
    model: str
    content: list[TextBlock]
    usage: MessageUsage
    role: Literal["assistant"] = "assistant"
    stop_reason: StopReason | None = None
    stop_sequence: str | None = None


class MessageStart(msgspec.Struct, kw_only=True, tag_field="type", tag="message_start"):
    message: AnthropicMessage


class ContentBlockStart(msgspec.Struct, kw_only=True, tag_field="type", tag="content_block_start"):
    content_block: TextBlock
    index: int = 0


class TextDelta(msgspec.Struct, kw_only=True, tag_field="type", tag="text_delta"):
    text: str


class ContentBlockDelta(msgspec.Struct, kw_only=True, tag_field="type", tag="content_block_delta"):
    delta: TextDelta
    index: int = 0


class ContentBlockStop(msgspec.Struct, kw_only=True, tag_field="type", tag="content_block_stop"):
    index: int = 0


class StopDelta(msgspec.Struct, kw_only=True):
    stop_reason: StopReason | None
    stop_sequence: str | None


class MessageDelta(msgspec.Struct, kw_only=True, tag_field="type", tag="message_delta"):
    delta: StopDelta
    usage: MessageUsage


class MessageStop(msgspec.Struct, kw_only=True, tag_field="type", tag="message_stop"):
    pass
