"""KV events: an engine tells which blocks of tokens its prefix cache holds.

The format is vLLM's (`vllm/distributed/kv_events.py`), which routers such as llm-d's and Dynamo's read. A PUB socket
sends `[topic, sequence, payload]`; the payload is msgpack of `[ts, events, data_parallel_rank]`. Each event is
`[tag, field, …]` (from older engines without the last fields) or, from newer ones, a map with the tag under "type".
All are read; whole arrays are written, which older readers know too. A ROUTER socket replays: the request is the first
sequence wanted, each answer `[topic, sequence, payload]` (older engines leave the topic out), and the last one has the
sequence -1.

What is read comes from outside: sizes and numbers are bounded, fields that are not known are passed over, and so are
events of a kind that is not known.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import msgspec
from msgspec import Meta

MEDIUM_DEVICE = "GPU"
"""The medium of blocks in the memory that the model computes from, whatever device that is: routers credit it most."""

MAX_PAYLOAD_BYTES = 8 * 1024 * 1024
MAX_HASH_BYTES = 64
MAX_BLOCK_SIZE = 1 << 20
SEQUENCE_BYTES = 8
END_OF_REPLAY = (-1).to_bytes(SEQUENCE_BYTES, "big", signed=True)
_MAX_TOKENS = 1 << 22
_MAX_BLOCKS = 1 << 18
_ARRAY_CODES = frozenset({*range(0x90, 0xA0), 0xDC, 0xDD})

_Count = Annotated[int, Meta(ge=0, le=2**31 - 1)]
_Text = Annotated[str, Meta(max_length=1024)]
BlockHash = int | Annotated[bytes, Meta(min_length=1, max_length=MAX_HASH_BYTES)]
"""The engine's own name of a block: a number, or the bytes of a digest. Nobody else can compute it."""
_Hashes = Annotated[Sequence[BlockHash], Meta(max_length=_MAX_BLOCKS)]
_TokenIds = Annotated[Sequence[Annotated[int, Meta(ge=0, lt=2**32)]], Meta(max_length=_MAX_TOKENS)]
_ExtraKeys = Annotated[Sequence[msgspec.Raw], Meta(max_length=_MAX_BLOCKS)]


class BlockStored(msgspec.Struct, frozen=True, array_like=True, tag="BlockStored"):
    """Blocks that follow each other have come into the cache.

    * `block_hashes`: the engine's names of them; `parent_block_hash`: of the block before the first, None if that is
      where the text begins.
    * `token_ids`: of all of them, `block_size` for each; none if only the place of known blocks is told.
    * `medium`: the tier; None is `MEDIUM_DEVICE`.
    * `extra_keys`: what else decides what is in a block (the names of images, a tenant's salt, an adapter), msgpack of
      a list or of None for each block.
    * `group_idx`, `kv_cache_spec_kind`, `kv_cache_spec_sliding_window`: of which layers, where not all layers see all
      of the past.
    """

    block_hashes: _Hashes
    parent_block_hash: BlockHash | None
    token_ids: _TokenIds
    block_size: Annotated[int, Meta(ge=0, le=MAX_BLOCK_SIZE)]
    lora_id: int | None = None
    medium: _Text | None = None
    lora_name: _Text | None = None
    extra_keys: _ExtraKeys | None = None
    group_idx: _Count | None = None
    kv_cache_spec_kind: _Text | None = None
    kv_cache_spec_sliding_window: _Count | None = None


class BlockRemoved(msgspec.Struct, frozen=True, array_like=True, tag="BlockRemoved"):
    """Blocks, by the engine's names, are no longer in one tier (of one group of layers)."""

    block_hashes: _Hashes
    medium: _Text | None = None
    group_idx: _Count | None = None


class AllBlocksCleared(msgspec.Struct, frozen=True, array_like=True, tag="AllBlocksCleared"):
    """The cache is empty, in all tiers."""


KVCacheEvent = BlockStored | BlockRemoved | AllBlocksCleared


class KVEventBatch(msgspec.Struct, frozen=True, array_like=True):
    """What one step changed, in order. `ts`: seconds since the epoch."""

    ts: float
    events: Sequence[KVCacheEvent]
    data_parallel_rank: _Count | None = None


class BadKVEvents(ValueError):
    """A payload that is not a batch of events, or one that is out of bounds."""


class _StoredMap(msgspec.Struct, frozen=True, tag="BlockStored"):
    block_hashes: _Hashes
    token_ids: _TokenIds
    block_size: Annotated[int, Meta(ge=0, le=MAX_BLOCK_SIZE)]
    parent_block_hash: BlockHash | None = None
    lora_id: int | None = None
    medium: _Text | None = None
    lora_name: _Text | None = None
    extra_keys: _ExtraKeys | None = None
    group_idx: _Count | None = None
    kv_cache_spec_kind: _Text | None = None
    kv_cache_spec_sliding_window: _Count | None = None


class _RemovedMap(msgspec.Struct, frozen=True, tag="BlockRemoved"):
    block_hashes: _Hashes
    medium: _Text | None = None
    group_idx: _Count | None = None


class _ClearedMap(msgspec.Struct, frozen=True, tag="AllBlocksCleared"):
    pass


class _RawBatch(msgspec.Struct, frozen=True, array_like=True):
    ts: float
    events: Annotated[Sequence[msgspec.Raw], Meta(max_length=_MAX_BLOCKS)]
    data_parallel_rank: _Count | None = None


class _RawBatchMap(msgspec.Struct, frozen=True):
    ts: float
    events: Annotated[Sequence[msgspec.Raw], Meta(max_length=_MAX_BLOCKS)]
    data_parallel_rank: _Count | None = None


class _MapTag(msgspec.Struct, frozen=True):
    type: _Text


class _ArrayTag(msgspec.Struct, frozen=True, array_like=True):
    type: _Text


_KNOWN = frozenset({"BlockStored", "BlockRemoved", "AllBlocksCleared"})
_NOT_OURS = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
_encoder = msgspec.msgpack.Encoder()
_batches = msgspec.msgpack.Decoder(KVEventBatch)
_raw_batches = msgspec.msgpack.Decoder(_RawBatch)
_raw_batch_maps = msgspec.msgpack.Decoder(_RawBatchMap)
_arrays: msgspec.msgpack.Decoder[KVCacheEvent] = msgspec.msgpack.Decoder(KVCacheEvent)
_maps: msgspec.msgpack.Decoder[_StoredMap | _RemovedMap | _ClearedMap] = msgspec.msgpack.Decoder(
    _StoredMap | _RemovedMap | _ClearedMap
)
_array_tags = msgspec.msgpack.Decoder(_ArrayTag)
_map_tags = msgspec.msgpack.Decoder(_MapTag)


def encode_batch(batch: KVEventBatch) -> bytes:
    """The payload of a batch."""
    return _encoder.encode(batch)


def encode_extra_keys(keys: Sequence[str] | None) -> msgspec.Raw:
    """One entry of `BlockStored.extra_keys`."""
    return msgspec.Raw(_encoder.encode(keys))


def decode_batch(payload: bytes) -> KVEventBatch:
    """Read a payload in either form, without the events whose kind is not known. Raises `BadKVEvents`."""
    if len(payload) > MAX_PAYLOAD_BYTES:
        raise BadKVEvents(f"A payload of {len(payload)} bytes; at most {MAX_PAYLOAD_BYTES} are read.")
    try:
        return _batches.decode(payload)  # what most engines send, most of the time
    except _NOT_OURS:
        return _decode_carefully(payload)


def _decode_carefully(payload: bytes) -> KVEventBatch:
    try:
        decoder = _raw_batches if payload[:1] and payload[0] in _ARRAY_CODES else _raw_batch_maps
        batch = decoder.decode(payload)
        events = [event for raw in batch.events if (event := _decode_event(bytes(raw))) is not None]
    except _NOT_OURS as error:
        raise BadKVEvents(f"Not a batch of KV events: {error}") from None
    return KVEventBatch(batch.ts, events, batch.data_parallel_rank)


def _decode_event(raw: bytes) -> KVCacheEvent | None:
    """None for one of a kind that is not known."""
    is_array = raw[0] in _ARRAY_CODES
    tag = (_array_tags if is_array else _map_tags).decode(raw).type
    if tag not in _KNOWN:
        return None
    if is_array:
        return _arrays.decode(raw)
    event = _maps.decode(raw)
    if isinstance(event, _ClearedMap):
        return AllBlocksCleared()
    kind = BlockStored if isinstance(event, _StoredMap) else BlockRemoved
    return kind(**{field: getattr(event, field) for field in kind.__struct_fields__})


def encode_sequence(sequence: int) -> bytes:
    """8 bytes, big-endian, as in a message's second frame and in a replay's request."""
    return sequence.to_bytes(SEQUENCE_BYTES, "big")


def decode_sequence(frame: bytes) -> int:
    """Raises `BadKVEvents` for what is not a sequence number; -1 ends a replay."""
    if len(frame) != SEQUENCE_BYTES:
        raise BadKVEvents(f"A sequence number of {len(frame)} bytes; it has {SEQUENCE_BYTES}.")
    return int.from_bytes(frame, "big", signed=True)


def read_replay(frames: Sequence[bytes]) -> tuple[int, bytes] | None:
    """Sequence and payload of one answer of a replay, None for its end. Raises `BadKVEvents`.

    An empty first frame (which REQ sockets take off themselves) and a topic may stand before them.
    """
    if not 2 <= len(frames) <= 4:
        raise BadKVEvents(f"A replayed message of {len(frames)} frames.")
    sequence = decode_sequence(frames[-2])
    if sequence == -1:
        return None
    if sequence < 0:
        raise BadKVEvents(f"A replayed message with the sequence {sequence}.")
    return sequence, frames[-1]
