"""Messages of the chat API, made into what chat templates expect."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from quire.core.errors import InvalidParameter

# What reasoning is called, in messages of different APIs; templates read the first.
_REASONING = ("reasoning_content", "thinking", "reasoning")
_TEXT_PARTS = ("text", "refusal")


def template_messages(messages: Sequence[Mapping[str, object]]) -> list[dict[str, object]]:
    """The messages with text parts joined to one string and tool calls' arguments as objects.

    Raises `InvalidParameter`, naming the message, for content that is not text and for arguments that are not JSON.
    """
    return [_template_message(message, f"messages[{index}]") for index, message in enumerate(messages)]


def _template_message(message: Mapping[str, object], where: str) -> dict[str, object]:
    if not isinstance(message, Mapping):
        raise InvalidParameter(f"{where} is not an object.", param="messages")
    converted = {key: value for key, value in message.items() if value is not None}
    if not isinstance(converted.get("role"), str):
        raise InvalidParameter(f"{where} has no role.", param="messages", remedy="Set role to user, for example.")
    if "content" in converted:
        converted["content"] = _flat_content(converted["content"], f"{where}.content")
    calls = converted.get("tool_calls")
    if calls is not None:
        if not isinstance(calls, Sequence) or isinstance(calls, str):
            raise InvalidParameter(f"{where}.tool_calls is not a list.", param="messages")
        converted["tool_calls"] = [
            _template_tool_call(call, f"{where}.tool_calls[{index}]") for index, call in enumerate(calls)
        ]
    reasoning = next((converted[name] for name in _REASONING if name in converted), None)
    if reasoning is not None:
        converted = {"thinking": reasoning, **converted, "reasoning_content": reasoning}
    return converted


def _flat_content(content: object, where: str) -> str:
    """A string stays as it is; text parts are joined by line breaks."""
    if isinstance(content, str):
        return content
    if not isinstance(content, Sequence):
        raise InvalidParameter(f"{where} is neither a string nor a list of parts.", param="messages")
    return "\n".join(_part_text(part, f"{where}[{index}]") for index, part in enumerate(content))


def _part_text(part: object, where: str) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type") if isinstance(part, Mapping) else None
    text = part.get(kind) if isinstance(part, Mapping) and kind in _TEXT_PARTS else None
    if not isinstance(text, str):
        raise InvalidParameter(
            f"{where} is a part of type {kind!r} without text.",
            param="messages",
            remedy="This model takes text only: send parts of type text.",
        )
    return text


def _template_tool_call(call: object, where: str) -> dict[str, object]:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(call, Mapping) or not isinstance(function, Mapping):
        raise InvalidParameter(f"{where} has no function.", param="messages")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        arguments = _parse_arguments(arguments, where) if arguments.strip() else {}
    return {**call, "function": {**function, "arguments": {} if arguments is None else arguments}}


def _parse_arguments(arguments: str, where: str) -> object:
    try:
        return json.loads(arguments)
    except (ValueError, RecursionError) as error:
        raise InvalidParameter(
            f"{where}.function.arguments is not JSON: {error}.", param="messages", remedy="Send a JSON object."
        ) from None
