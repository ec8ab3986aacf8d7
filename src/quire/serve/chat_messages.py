"""The parts of a chat request that go to the template, as plain data and within bounds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from quire.core.errors import InvalidParameter
from quire.serve.body import loose_json
from quire.wire.openai_chat import Message

MAX_MESSAGES = 4096
MAX_TOOLS = 256


def plain_messages(messages: list[Message]) -> list[dict[str, object]]:
    """Dictionaries, as `PromptEncoder.encode_chat` takes them. Raises `InvalidParameter`."""
    if not messages:
        raise InvalidParameter("messages is empty.", param="messages", remedy="Send at least one message.")
    if len(messages) > MAX_MESSAGES:
        raise InvalidParameter(
            f"There are {len(messages)} messages.", param="messages", remedy=f"Send at most {MAX_MESSAGES}."
        )
    for index, message in enumerate(messages):
        if message.content is None and message.role != "assistant":
            raise InvalidParameter(
                f"messages[{index}], from {message.role}, has no content.", param="messages", remedy="Send a text."
            )
    plain: list[dict[str, object]] = msgspec.to_builtins(messages)
    for message_dict in plain:
        if message_dict["content"] is None:
            message_dict["content"] = ""  # many templates print what is missing
    return plain


def tool_list(raw: msgspec.Raw) -> list[dict[str, Any]] | None:
    """OpenAI's list of tools. Raises `InvalidParameter`."""
    tools = loose_json(raw, "tools")
    if tools is None or tools == []:
        return None
    is_list = isinstance(tools, list) and len(tools) <= MAX_TOOLS
    if not is_list or not all(isinstance(tool, dict) and isinstance(tool.get("function"), dict) for tool in tools):
        raise InvalidParameter(
            "tools is not a list of function tools.",
            param="tools",
            remedy=f'Send at most {MAX_TOOLS} of {{"type": "function", "function": {{...}}}}.',
        )
    return list(tools)


def template_variables(raw: msgspec.Raw) -> Mapping[str, object] | None:
    variables = loose_json(raw, "chat_template_kwargs")
    if variables is not None and not isinstance(variables, dict):
        raise InvalidParameter(
            "chat_template_kwargs is not an object.", param="chat_template_kwargs", remedy="Send a JSON object."
        )
    return variables
