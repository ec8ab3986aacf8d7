"""From Anthropic's request to the chat request that asks for the same."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec

from quire.core.errors import InvalidParameter
from quire.serve.body import loose_json
from quire.serve.sampling import unsupported
from quire.wire.anthropic import Block, CountTokensRequest, InputMessage, MessagesRequest, Tool
from quire.wire.openai_chat import ChatCompletionRequest, FunctionCall, Message, ToolCall


def chat_request(fields: CountTokensRequest) -> ChatCompletionRequest:
    """A last message of the assistant's is gone on with. Raises `InvalidParameter` for what is not served."""
    if fields.thinking is not None and fields.thinking.type != "disabled":
        raise unsupported("thinking", fields.thinking.type[:40])
    choice = fields.tool_choice
    if choice is not None and choice.type not in ("auto", "none"):
        raise unsupported("tool_choice", choice.type[:40])
    if choice is not None and choice.disable_parallel_tool_use:
        raise unsupported("tool_choice.disable_parallel_tool_use")
    messages: list[Message] = []
    if fields.system:
        messages.append(Message(role="system", content=_text(fields.system, "system")))
    for index, message in enumerate(fields.messages):
        messages.extend(_messages(message, f"messages[{index}]"))
    goes_on = bool(fields.messages) and fields.messages[-1].role == "assistant"
    made = ChatCompletionRequest(model=fields.model, messages=messages, continue_final_message=goes_on)
    if fields.tools:
        made.tools = msgspec.Raw(msgspec.json.encode([_tool(tool) for tool in fields.tools]))
    if choice is not None:
        made.tool_choice = msgspec.Raw(msgspec.json.encode(choice.type))
    if isinstance(fields, MessagesRequest):
        made.max_completion_tokens = fields.max_tokens
        made.stop, made.stream = fields.stop_sequences, fields.stream
        made.temperature, made.top_p, made.top_k = fields.temperature, fields.top_p, fields.top_k
    return made


def _tool(tool: Tool) -> dict[str, Any]:
    if tool.type not in (None, "custom"):
        raise unsupported("tools", tool.type)
    if tool.input_schema is None:
        raise InvalidParameter(f"The tool {tool.name[:80]!r} has no input_schema.", param="tools")
    function = {"name": tool.name, "description": tool.description or "", "parameters": tool.input_schema}
    return {"type": "function", "function": function}


def _messages(message: InputMessage, where: str) -> Iterator[Message]:
    """One message, but that each result of a tool is one of its own."""
    if isinstance(message.content, str):
        yield Message(role=message.role, content=message.content)
        return
    texts: list[Block] = []
    calls: list[ToolCall] = []
    for block in message.content:
        if block.type == "tool_result" and message.role == "user":
            if texts:
                yield Message(role="user", content=_text(texts, where))
                texts = []
            yield Message(role="tool", tool_call_id=block.tool_use_id, content=_text(block.content or "", where))
        elif block.type == "tool_use" and message.role == "assistant":
            calls.append(_call(block, where))
        else:
            texts.append(block)
    if texts or calls:
        yield Message(role=message.role, content=_text(texts, where), tool_calls=calls or None)


def _call(block: Block, where: str) -> ToolCall:
    if not block.name:
        raise InvalidParameter(f"{where}: a tool_use block has no name.", param="messages")
    arguments = msgspec.json.encode(loose_json(block.input, "messages") or {}).decode()
    return ToolCall(id=block.id, function=FunctionCall(name=block.name, arguments=arguments))


def _text(content: str | list[Block], where: str) -> str:
    if isinstance(content, str):
        return content
    for block in content:
        if block.type != "text":
            raise InvalidParameter(
                f"{where}: content of type {block.type[:40]!r} is not supported.",
                param=where.partition("[")[0],
                remedy="Send blocks of text; tool_use comes from the assistant, tool_result from the user.",
            )
        if block.text is None:
            raise InvalidParameter(f"{where}: a text block has no text.", param=where.partition("[")[0])
    return "".join(block.text or "" for block in content)
