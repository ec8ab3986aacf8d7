"""The name of a block, made from its tokens alone: the same for every engine that holds it, and for a prompt.

`key_i = hash(key_{i-1}, tokens_i, extra_i)` with Python's keyed hash (SipHash, the key drawn at the start of the
process): 64 bits, a fraction of a microsecond per block, and nobody outside can find two texts with one key. So keys
mean something in one process only.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Mapping, Sequence

import msgspec

from quire.wire.kv_events import BadKVEvents

_NONE = b"\xc0"  # msgpack's null
_encoder = msgspec.msgpack.Encoder()


def root_key(adapter: str) -> int:
    """What the first block is chained from; `adapter` is empty for the base model."""
    return hash(("root", adapter))


def extra_bytes(extra: Sequence[object]) -> bytes:
    """What else decides a block's content (a salt, images), in the form that keys are made with."""
    return _encoder.encode(list(extra)) if extra else b""


def extras_of_event(extra_keys: Sequence[msgspec.Raw] | None, adapter: str | None) -> Mapping[int, bytes]:
    """By the block's number within the event, where there is something; the adapter's name is in the root already.
    Raises `BadKVEvents`."""
    found: dict[int, bytes] = {}
    for number, raw in enumerate(extra_keys or ()):
        data = bytes(raw)
        if data == _NONE:
            continue
        try:
            values = msgspec.msgpack.decode(data)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise BadKVEvents(f"extra_keys of a block: {error}") from None
        if not isinstance(values, list):
            raise BadKVEvents(f"extra_keys of a block are {type(values).__name__}, not a list")
        packed = extra_bytes([value for value in values if adapter is None or value != adapter])
        if packed:
            found[number] = packed
    return found


def chain(
    parent: int, token_ids: Sequence[int], block_size: int, extras: Mapping[int, bytes] | None = None
) -> Iterator[int]:
    """Keys of the full blocks of `token_ids`, made one by one as they are asked for.

    `extras`: by the block's number, `extra_bytes`. Raises `OverflowError` for what is no token id (32 bits).
    """
    data = array("I", token_ids).tobytes()
    width = 4 * block_size
    key = parent
    if extras:
        for number, end in enumerate(range(width, len(data) + 1, width)):
            key = hash((key, data[end - width : end], extras.get(number, b"")))
            yield key
    else:
        for end in range(width, len(data) + 1, width):
            key = hash((key, data[end - width : end], b""))
            yield key
