"""From the bytes of a body to a typed request, with everything that can be wrong said in one way."""

from __future__ import annotations

import re
from typing import Any, TypeVar

import msgspec

from quire.core.errors import InvalidParameter, RequestError

T = TypeVar("T", bound=msgspec.Struct)

MAX_LOOSE_BYTES = 1024 * 1024
MAX_LOOSE_DEPTH = 32
MAX_REPORTED_FIELDS = 16
MAX_MESSAGE_CHARS = 500
_PATH = re.compile(r" - at `(?:key` in `)?\$\.?([^`]*)`")
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")


def decode_body(body: bytes, cls: type[T]) -> T:
    """Raises `InvalidParameter` naming the field, or `RequestError` for what is no JSON object at all."""
    try:
        body.decode()  # also what the decoder skips has to be UTF-8
        return msgspec.json.decode(body, type=cls)
    except msgspec.ValidationError as error:
        raise _invalid(str(error)) from None
    except msgspec.DecodeError as error:
        raise RequestError(f"The body is not valid JSON: {error}.", remedy="Send one JSON object.") from None
    except UnicodeDecodeError as error:
        raise RequestError(f"The body is not valid UTF-8: {error.reason}.", remedy="Encode it in UTF-8.") from None
    except RecursionError:
        raise RequestError("The body is nested too deeply.", remedy="Send a flatter JSON object.") from None


def _invalid(message: str) -> InvalidParameter:
    found = _PATH.search(message)
    text = _PATH.sub("", message)
    if len(text) > MAX_MESSAGE_CHARS:  # it quotes the value
        text = text[: MAX_MESSAGE_CHARS - 3] + "..."
    if found is None:
        missing = re.search(r"required field `([^`]*)`", message)
        return InvalidParameter(f"{text}.", param=missing[1] if missing else None)
    path = found[1]
    param = re.split(r"[.\[]", path, maxsplit=1)[0]
    return InvalidParameter(f"{path or 'body'}: {text}.", param=param or None)


def ignored_fields(body: bytes, cls: type[msgspec.Struct]) -> list[str]:
    """Names in the body that `cls` does not know, and which therefore have no effect; at most sixteen.

    `body` has been decoded by `decode_body` before, so it is an object.
    """
    given = msgspec.json.decode(body, type=dict[str, msgspec.Raw])
    unknown = sorted(given.keys() - set(cls.__struct_encode_fields__))
    return [name for name in unknown if _PLAIN_NAME.fullmatch(name)][:MAX_REPORTED_FIELDS]


def is_given(raw: msgspec.Raw) -> bool:
    """Whether the request had the field, with something else than null."""
    return bytes(raw) not in (b"", b"null")


def loose_json(raw: msgspec.Raw, param: str) -> Any:
    """Decode a field without a fixed shape, within bounds of size and depth; None if it is absent or null."""
    data = bytes(raw)
    if not data:
        return None
    if len(data) > MAX_LOOSE_BYTES:
        raise InvalidParameter(
            f"{param} has {len(data)} bytes.", param=param, remedy=f"Send {MAX_LOOSE_BYTES} at most."
        )
    try:
        value = msgspec.json.decode(data)
    except msgspec.DecodeError as error:  # well-formed, but with a number that no type holds
        raise InvalidParameter(f"{param}: {error}.", param=param) from None
    if _depth_exceeds(value, MAX_LOOSE_DEPTH):
        raise InvalidParameter(
            f"{param} is nested too deeply.", param=param, remedy=f"Use at most {MAX_LOOSE_DEPTH} levels."
        )
    return value


def _depth_exceeds(value: Any, limit: int) -> bool:
    level = [value]
    for _ in range(limit):
        inner: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                inner.extend(item.values())
            elif isinstance(item, list):
                inner.extend(item)
        if not inner:
            return False
        level = inner
    return True
