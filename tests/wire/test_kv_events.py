"""KV events against msgpack's own library and vLLM's documented layout."""

import contextlib

import msgpack
import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quire.wire.kv_events import (
    END_OF_REPLAY,
    MAX_PAYLOAD_BYTES,
    AllBlocksCleared,
    BadKVEvents,
    BlockRemoved,
    BlockStored,
    KVEventBatch,
    decode_batch,
    decode_sequence,
    encode_batch,
    encode_sequence,
    read_replay,
)

STORED = [
    "block_hashes",
    "parent_block_hash",
    "token_ids",
    "block_size",
    "lora_id",
    "medium",
    "lora_name",
    "extra_keys",
    "group_idx",
    "kv_cache_spec_kind",
    "kv_cache_spec_sliding_window",
]
REMOVED = ["block_hashes", "medium", "group_idx"]

hashes = st.integers(-(2**63), 2**64 - 1) | st.binary(min_size=1, max_size=32)
texts = st.none() | st.text(max_size=8)
counts = st.none() | st.integers(0, 2**31 - 1)
extras = st.none() | st.lists(st.none() | st.lists(st.text(max_size=4) | st.integers(0, 9), max_size=3), max_size=3)
stored = st.tuples(
    st.just("BlockStored"),
    st.lists(hashes, max_size=3),
    st.none() | hashes,
    st.lists(st.integers(0, 2**32 - 1), max_size=8),
    st.integers(0, 64),
    counts,
    texts,
    texts,
    extras,
    counts,
    texts,
    counts,
)
removed = st.tuples(st.just("BlockRemoved"), st.lists(hashes, max_size=3), texts, counts)
cleared = st.tuples(st.just("AllBlocksCleared"))
events = st.lists(stored | removed | cleared, max_size=4)


def plain(event) -> tuple:
    """An event of ours as a row of vLLM's layout."""
    if isinstance(event, BlockStored):
        extra = event.extra_keys and [msgpack.unpackb(bytes(raw)) for raw in event.extra_keys]
        values = [getattr(event, name) for name in STORED]
        values[7] = extra if extra is None or event.extra_keys else []
        return ("BlockStored", *values)
    if isinstance(event, BlockRemoved):
        return ("BlockRemoved", *(getattr(event, name) for name in REMOVED))
    assert isinstance(event, AllBlocksCleared)
    return ("AllBlocksCleared",)


def as_map(event) -> dict:
    names = {"BlockStored": STORED, "BlockRemoved": REMOVED, "AllBlocksCleared": []}[event[0]]
    return {"type": event[0]} | dict(zip(names, event[1:]))


def without_trailing_none(event, least: int) -> list:
    row = list(event)
    while len(row) > least and row[-1] is None:
        row.pop()
    return row


@given(events, st.none() | st.integers(0, 7), st.booleans(), st.booleans(), st.lists(counts, max_size=2))
@settings(max_examples=150, deadline=None)
def test_every_form_that_engines_send_is_read(rows, rank, map_batch, map_events, unknown):
    """Rows as vLLM lays them out, packed by another library: as arrays or maps, with trailing nulls or without them,
    and with fields that nobody knows yet."""
    least = {"BlockStored": 5, "BlockRemoved": 2, "AllBlocksCleared": 1}
    if map_events:
        sent = [as_map(row) | ({"newer": unknown} if unknown else {}) for row in rows]
    else:
        full = {"BlockStored": 12, "BlockRemoved": 4, "AllBlocksCleared": 1}
        sent = [
            [*row[: full[row[0]]], *unknown] if unknown else without_trailing_none(row, least[row[0]]) for row in rows
        ]
    batch = {"ts": 1.5, "events": sent, "data_parallel_rank": rank} if map_batch else [1.5, sent, rank, *unknown]
    got = decode_batch(msgpack.packb(batch))
    assert (got.ts, got.data_parallel_rank) == (1.5, rank)
    assert [plain(event) for event in got.events] == [tuple(row) for row in rows]


@given(events)
@settings(max_examples=150, deadline=None)
def test_what_we_send_has_vllms_layout(rows):
    """Read by another library: whole arrays in vLLM's order."""
    batch = decode_batch(msgpack.packb([2.5, rows, 0]))
    payload = encode_batch(batch)
    ts, sent, *rank = msgpack.unpackb(payload)
    assert (ts, rank) == (2.5, [0])
    assert sent == [list(row) for row in rows]
    assert decode_batch(payload) == batch


def test_kinds_that_are_not_known_are_passed_over():
    payload = msgpack.packb([0.0, [["BlockMoved", 1], {"type": "BlockMoved", "x": 1}, ["BlockRemoved", [7]]], 0])
    assert decode_batch(payload) == KVEventBatch(0.0, [BlockRemoved([7])], 0)


GOOD = ["BlockStored", [1], None, [1, 2], 2]


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"\xc1",
        b"\xdd\xff\xff\xff\xff",
        msgpack.packb("text"),
        msgpack.packb([1.0]),
        msgpack.packb([1.0, 7]),
        msgpack.packb(["soon", []]),
        msgpack.packb({"ts": 1.0}),
        msgpack.packb([1.0, [[]]]),
        msgpack.packb([1.0, [[7]]]),
        msgpack.packb([1.0, ["BlockRemoved"]]),
        msgpack.packb([1.0, [{"block_hashes": []}]]),
        msgpack.packb([1.0, [GOOD[:4]]]),
        msgpack.packb([1.0, [["BlockStored", ["text"], *GOOD[2:]]]]),
        msgpack.packb([1.0, [["BlockStored", [b""], *GOOD[2:]]]]),
        msgpack.packb([1.0, [["BlockStored", [b"x" * 65], *GOOD[2:]]]]),
        msgpack.packb([1.0, [["BlockStored", [1], None, [-1], 2]]]),
        msgpack.packb([1.0, [["BlockStored", [1], None, [2**32], 2]]]),
        msgpack.packb([1.0, [["BlockStored", [1], None, [1], -2]]]),
        msgpack.packb([1.0, [[*GOOD, None, "m" * 1025]]]),
        msgpack.packb([1.0, [["BlockRemoved", [1], None, -1]]]),
        msgpack.packb([1.0, [], -1]),
        b"\x92\xcb" + bytes(8) + b"\x91" * 300_000 + b"\xc0",
        b"\x92\xcb" + bytes(8) + b"\x91\x99" + msgpack.packb("BlockStored") + b"\x91\x01\xc0\x90\x02\xc0\xc0\xc0"
        b"\x91" * 100_000,
        bytes(MAX_PAYLOAD_BYTES + 1),
    ],
)
def test_what_is_no_batch_is_an_error_of_its_own(payload):
    with pytest.raises(BadKVEvents):
        decode_batch(payload)


@given(st.binary(max_size=60))
@settings(max_examples=300, deadline=None)
def test_no_bytes_do_anything_else(payload):
    with contextlib.suppress(BadKVEvents):
        assert isinstance(decode_batch(payload), KVEventBatch)


@given(st.binary(max_size=60), st.integers(0, 40), st.data())
@settings(max_examples=200, deadline=None)
def test_nor_do_damaged_batches(noise, at, data):
    whole = msgpack.packb([1.0, [[*GOOD, 1, "GPU", "lora", [["a"], None]], ["BlockRemoved", [b"x", 5]]], 0])
    with contextlib.suppress(BadKVEvents):
        decode_batch(whole[:at] + noise + whole[data.draw(st.integers(0, len(whole))) :])


def test_extra_keys_stay_as_they_were_sent():
    keys = [[["image", 3], "salt"], None]
    [event] = decode_batch(msgpack.packb([0.0, [[*GOOD, None, None, None, keys]]])).events
    assert [msgspec.msgpack.decode(raw) for raw in event.extra_keys] == keys


def test_sequences_and_replays():
    assert encode_sequence(258) == b"\0\0\0\0\0\0\1\2"
    assert decode_sequence(b"\0\0\0\0\0\0\1\2") == 258
    assert decode_sequence(b"\xff" * 8) == -1
    with pytest.raises(BadKVEvents, match="7 bytes"):
        decode_sequence(bytes(7))
    assert END_OF_REPLAY == b"\xff" * 8
    one = encode_sequence(1)
    for frames in ([one, b"p"], [b"kv@a@b", one, b"p"], [b"", b"kv@a@b", one, b"p"], [b"", one, b"p"]):
        assert read_replay(frames) == (1, b"p")
    for frames in ([END_OF_REPLAY, b""], [b"", END_OF_REPLAY, b""], [b"", b"", END_OF_REPLAY, b""]):
        assert read_replay(frames) is None
    for frames in ([], [one], [b"x"] * 5, [b"short", b"p"], [b"\xff" * 7 + b"\xfe", b"p"]):
        with pytest.raises(BadKVEvents):
            read_replay(frames)
