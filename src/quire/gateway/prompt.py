"""A prompt laid out flat, so that equal beginnings mean equal prefixes for the model.

What the chat template puts first comes first: its own arguments, tools, system text, then the messages in their order.
The marks between are bytes that UTF-8 never has, so that no text can look like another layout. Pictures and sounds
stand by their digest.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence
from typing import Final

import msgspec

_FIELD: Final = b"\xff"
_MESSAGE: Final = b"\xfe"
_PART: Final = b"\xfd"
_TEXT: Final = b"\xfc"
_TEXT_PARTS: Final = frozenset({"text", "input_text", "output_text"})
MAX_INLINE: Final = 64
"""Bytes of a part that is no text, above which it stands by its digest."""

_messages = msgspec.json.Decoder(list[dict[str, msgspec.Raw]])
_parts = msgspec.json.Decoder(list[dict[str, msgspec.Raw]])
_text = msgspec.json.Decoder(str)
_prompts = msgspec.json.Decoder(str | list[int | str | list[int]])


def field(name: str, raw: bytes) -> bytes:
    """One field of the body that the prompt begins with, as it was sent."""
    return b"%b%b%b%b" % (_FIELD, name.encode(), _FIELD, raw) if raw and raw != b"null" else b""


def text_or_messages(raw: bytes) -> bytes:
    """`system`, `instructions`, `messages`, or the `input` of Responses. What has another shape stands as sent: the
    endpoint will say what is wrong with it."""
    if not raw or raw == b"null":
        return b""
    try:
        if raw[:1] == b'"':
            return _TEXT + _text.decode(raw).encode()
        return b"".join([_message(message) for message in _messages.decode(raw)])
    except (msgspec.DecodeError, RecursionError, UnicodeError):
        return raw


def _message(message: dict[str, msgspec.Raw]) -> bytes:
    message.pop("cache_control", None)  # says how long to keep it, not what it is
    content = bytes(message.pop("content", b"null"))
    laid_out = [_MESSAGE, bytes(message.pop("role", b""))]
    # tool calls, names, reasoning, and the parts of Responses and Anthropic's `system`
    for name, raw in sorted(message.items()):
        if name == "text":
            laid_out += (_TEXT, _text.decode(raw).encode())
        else:
            laid_out.append(field(name, _short(bytes(raw))))
    if content[:1] == b'"':
        laid_out += (_TEXT, _text.decode(content).encode())
    elif content[:1] == b"[":
        laid_out += [_part(part) for part in _parts.decode(content)]
    return b"".join(laid_out)


def _part(part: dict[str, msgspec.Raw]) -> bytes:
    part.pop("cache_control", None)
    kind = part.get("type")
    if kind is not None and "text" in part and _text.decode(kind) in _TEXT_PARTS:
        return _PART + _TEXT + _text.decode(part["text"]).encode()
    return _PART + b"".join([field(name, _short(bytes(raw))) for name, raw in sorted(part.items())])


def _short(raw: bytes) -> bytes:
    return raw if len(raw) <= MAX_INLINE else hashlib.blake2b(raw, digest_size=16).digest()


def completion_prompt(raw: bytes) -> tuple[bytes, Sequence[int] | None]:
    """`prompt` or `input`: text, token ids, or several of either; and the ids, of a single prompt of ids."""
    if not raw or raw == b"null":
        return b"", None
    try:
        prompts = _prompts.decode(raw)
        if isinstance(prompts, str):
            return prompts.encode(), None
        if len(prompts) == 1 and isinstance(prompts[0], list):
            prompts = prompts[0]
        if prompts and isinstance(prompts[0], int):
            return array("I", prompts).tobytes(), prompts  # TypeError unless all are
        return _PART.join([_one_of_several(prompt) for prompt in prompts]), None
    except (msgspec.DecodeError, OverflowError, TypeError, UnicodeError, RecursionError):
        return raw, None


def _one_of_several(prompt: int | str | list[int]) -> bytes:
    if isinstance(prompt, str):
        return prompt.encode()
    return array("I", [prompt] if isinstance(prompt, int) else prompt).tobytes()
