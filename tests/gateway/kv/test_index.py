"""The KV index against a model that keeps plain sets and compares prompts token by token."""

import hashlib
from collections import Counter

import msgspec
import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from quire.gateway.kv import index as index_of_blocks
from quire.gateway.kv.index import MAX_GONE, MAX_TIERS, KVIndex
from quire.gateway.request import PrefixMatch
from quire.wire.kv_events import AllBlocksCleared, BlockRemoved, BlockStored, KVEventBatch, encode_extra_keys

TEXTS = [
    (1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1),
    (1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 2, 2),
    (1, 1, 1, 1, 1, 1, 1, 2, 2, 2, 2, 2),
    (2, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1),
    (2, 1, 1, 1, 2, 2),
]
SIZES = {"a": 2, "b": 2, "c": 3, "d": 2}


def batch(*events) -> KVEventBatch:
    return KVEventBatch(1.0, events, 0)


class Engine:
    """What one engine holds: by tier, how often each block; a block is all the tokens up to its end."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.size = SIZES[name]
        self.tiers: dict[str, Counter] = {}
        self.known: set = set()

    def named(self, block):
        """The engine's name of a block, which nobody else can make: bytes of one, numbers of another."""
        digest = hashlib.sha256(repr((self.name, block)).encode()).digest()
        return digest if self.name in "ab" else int.from_bytes(digest[:8], "big")

    def store(self, text, salt, adapter, start, stop, tier) -> BlockStored | None:
        count = len(text) // self.size
        start, stop = min(start, count), min(stop, count)
        if start >= stop:
            return None
        blocks = [(salt, adapter, text[: (index + 1) * self.size]) for index in range(start, stop)]
        parent = (salt, adapter, text[: start * self.size])
        if start == 0 or parent in self.known:
            held = self.tiers.setdefault(tier.lower(), Counter())
            held.update(blocks)
            self.known.update(blocks)
        keys = [[adapter] if adapter else None for _ in blocks]
        if salt and start == 0:
            keys[0] = [*(keys[0] or []), salt]
        return BlockStored(
            block_hashes=[self.named(block) for block in blocks],
            parent_block_hash=self.named(parent) if start else None,
            token_ids=text[start * self.size : stop * self.size],
            block_size=self.size,
            medium=tier,
            lora_name=adapter or None,
            extra_keys=[encode_extra_keys(key) for key in keys] if any(keys) else None,
        )

    def move(self, number, tier) -> BlockStored | None:
        """Some blocks come to another tier; such an event has no tokens."""
        blocks = sorted(self.known)[number : number + 2]
        if not blocks:
            return None
        self.tiers.setdefault(tier.lower(), Counter()).update(blocks)
        return BlockStored([self.named(block) for block in blocks], None, [], self.size, medium=tier)

    def drop(self, number, tier) -> BlockRemoved | None:
        held = self.tiers.get(tier.lower(), Counter())
        blocks = sorted(held.elements())[number : number + 3]
        held.subtract(blocks)
        self.tiers[tier.lower()] = +held
        return BlockRemoved([self.named(block) for block in blocks], tier) if blocks else None

    def clear(self) -> AllBlocksCleared:
        self.tiers, self.known = {}, set()
        return AllBlocksCleared()

    def runs(self, text, salt, adapter) -> dict[str, int]:
        """By tier, and for all tiers, blocks from the first one on."""
        wanted = [(salt, adapter, text[:end]) for end in range(self.size, len(text) + 1, self.size)]
        found = {}
        for tier, held in {**self.tiers, "": sum(self.tiers.values(), Counter())}.items():
            found[tier] = next((i for i, block in enumerate(wanted) if held[block] <= 0), len(wanted))
        return {tier: run for tier, run in found.items() if run}


kinds = st.sampled_from(["store"] * 6 + ["drop"] * 4 + ["move"] * 2 + ["clear"])
steps = st.lists(
    st.tuples(
        kinds,
        st.sampled_from(sorted(SIZES)),
        st.sampled_from(TEXTS),
        st.sampled_from(["", "", "salt"]),
        st.sampled_from(["", "", "lora"]),
        st.integers(0, 3),
        st.integers(1, 6),
        st.sampled_from(["GPU", "GPU", "CPU", "disk"]),
    ),
    max_size=40,
)


def play(engines, index, plan):
    """Each step, told to the index as the engine would."""
    for kind, name, text, salt, adapter, start, length, tier in plan:
        engine = engines[name]
        if kind == "store":
            told = engine.store(text, salt, adapter, start, start + length, tier)
        elif kind == "drop":
            told = engine.drop(start, tier)
        elif kind == "move":
            told = engine.move(start, tier)
        else:
            told = engine.clear()
        if told is not None:
            index.apply(name, batch(told))
            yield kind


@given(steps)
@settings(max_examples=250, deadline=None)
def test_matches_are_those_of_plain_sets(plan):
    engines, index = {name: Engine(name) for name in SIZES}, KVIndex()
    for _kind in play(engines, index, plan):
        for text in TEXTS:
            for salt, adapter in (("", ""), ("salt", ""), ("", "lora"), ("salt", "lora")):
                adapters = adapter if adapter in index._adapters else ""
                if adapter and not adapters:
                    continue  # nobody has spoken of it, and it would be looked up as the base model
                for size in set(SIZES.values()):
                    keys = index.keys(text, size, model=adapter, cache_salt=salt)
                    got = index.match(keys)
                    for name, engine in engines.items():
                        expected = engine.runs(text, salt, adapter) if engine.size == size else {}
                        mine = got.get(name, {})
                        whole = expected.pop("", 0)
                        assert {tier: run for tier, run in mine.items() if tier} == expected, name
                        assert mine.get("", max(expected.values(), default=0)) == whole
    blocks = sum(len(+held) for engine in engines.values() for held in engine.tiers.values())
    assert index.num_blocks == blocks
    assert {name: health.blocks for name, health in index.health().items() if health.blocks} == {
        name: count for name, engine in engines.items() if (count := sum(len(+held) for held in engine.tiers.values()))
    }
    event(f"{blocks // 5 * 5}+ blocks")
    for name in SIZES:
        index.remove(name)
    assert (index.num_blocks, index.num_keys, index.block_sizes, index._slots.used) == (0, 0, (), 0)


@given(steps, st.integers(1, 8), st.lists(st.sampled_from(TEXTS), max_size=4))
@settings(max_examples=200, deadline=None)
def test_the_bound_holds_and_what_is_claimed_is_true(plan, bound, asked):
    engines, index = {name: Engine(name) for name in SIZES}, KVIndex(max_blocks=bound)
    for _kind in play(engines, index, plan):
        assert index.num_blocks <= bound
        assert len(index._matched) <= index.num_keys <= index.num_blocks
        for text in asked:
            for name, found in index.lookup(text).items():
                assert found.tokens <= max(engines[name].runs(text, "", "").values(), default=0) * SIZES[name]


def stored(hashes, parent, tokens, size=2, **fields) -> BlockStored:
    return BlockStored(hashes, parent, tokens, size, **fields)


def test_what_was_matched_is_kept_when_something_must_go():
    index = KVIndex(max_blocks=32)
    index.apply("a", batch(stored([b"hot"], None, [7, 7])))
    for number in range(31):
        index.apply("a", batch(stored([number], None, [number, 1])))
    assert index.lookup([7, 7])
    for number in range(31, 200):
        index.lookup([7, 7])
        index.apply("a", batch(stored([number], None, [number, 1])))
    assert index.lookup([7, 7])["a"].tokens == 2
    assert not index.lookup([0, 1])
    assert index.health()["a"].evicted == 200 + 1 - index.num_blocks


def test_the_largest_endpoint_gives_way():
    index = KVIndex(max_blocks=100)
    index.apply("small", batch(stored([1], None, [5, 5])))
    for number in range(300):
        index.apply("large", batch(stored([number], None, [number, 0])))
    assert index.lookup([5, 5])["small"].tokens == 2


def test_tokens_and_credits_of_tiers():
    index = KVIndex()
    text = list(range(8))
    index.apply("a", batch(stored([1, 2, 3, 4], None, text)))
    assert index.lookup(text) == {"a": PrefixMatch(8, 8.0, {"gpu": 8})}
    index.apply("a", batch(stored([3, 4], None, [], medium="CPU"), BlockRemoved([3, 4], "GPU")))
    assert index.lookup(text) == {"a": PrefixMatch(8, 4 + 0.8 * 4, {"gpu": 4})}
    index.apply("a", batch(stored([1, 2], None, [], medium="CPU")))
    assert index.lookup(text) == {"a": PrefixMatch(8, 4 + 0.8 * 4, {"gpu": 4, "cpu": 8})}
    index.apply("a", batch(BlockRemoved([1], None)))
    assert index.lookup(text) == {"a": PrefixMatch(8, 0.8 * 8, {"cpu": 8})}
    index.apply("b", batch(stored([b"x"], None, text, 8)))  # blocks of another size, beside
    assert index.lookup([*text, 9])["b"] == PrefixMatch(8, 8.0, {"gpu": 8})
    assert set(index.lookup(text[:7])) == {"a"}
    assert sorted(index.block_sizes) == [2, 8]


def test_only_one_group_of_layers_is_followed():
    index = KVIndex()
    window = {"group_idx": 1, "kv_cache_spec_kind": "sliding_window", "kv_cache_spec_sliding_window": 4}
    full = {"group_idx": 0, "kv_cache_spec_kind": "full_attention"}
    other = {"group_idx": 2, "kv_cache_spec_kind": "full_attention"}
    event = [b"h"], None, [1, 2]
    index.apply("a", batch(stored(*event, **window)))
    assert index.num_blocks == 0
    index.apply("a", batch(stored(*event, **full), stored(*event, **other), stored(*event, **window)))
    index.apply("a", batch(BlockRemoved([b"h"], "GPU", 1), BlockRemoved([b"h"], "GPU", 2)))
    assert index.lookup([1, 2])
    assert index.health()["a"].skipped == 3
    index.apply("a", batch(BlockRemoved([b"h"], "GPU", 0)))
    assert not index.lookup([1, 2])


def test_a_block_that_is_gone_can_still_be_a_parent():
    index = KVIndex()
    index.apply("a", batch(stored([1], None, [1, 2]), BlockRemoved([1]), stored([2], 1, [3, 4])))
    assert not index.lookup([1, 2, 3, 4])
    index.apply("a", batch(stored([1], None, [1, 2])))
    assert index.lookup([1, 2, 3, 4])["a"].tokens == 4
    for number in range(10, 10 + 2 * MAX_GONE):
        index.apply("a", batch(stored([number], None, [number, 0]), BlockRemoved([number])))
    assert len(index._endpoints["a"].gone) <= MAX_GONE


def test_another_block_size_is_another_engine():
    index = KVIndex()
    index.apply("a", batch(stored([1, 2], None, [1, 2, 3, 4])))
    index.apply("a", batch(stored([9], None, [5, 6, 7, 8], 4)))
    assert index.block_sizes == (4,)
    assert not index.lookup([1, 2, 3, 4])
    assert index.lookup([5, 6, 7, 8])["a"].tokens == 4
    assert (index.health()["a"].resyncs, index.health()["a"].block_size) == (1, 4)


def raw(value) -> msgspec.Raw:
    return msgspec.Raw(msgspec.msgpack.encode(value))


@pytest.mark.parametrize(
    "bad",
    [
        stored([1, 2], None, [1, 2]),
        stored([], None, [1, 2]),
        stored([1], None, [1, 2], 0),
        stored([1], None, [1, 2], extra_keys=[raw("text")]),
        stored([1], None, [1, 2], extra_keys=[raw({"a": 1})]),
        stored([1], None, [1, 2], extra_keys=[msgspec.Raw(b"\xc1")]),
        stored([1], None, [1, 2], extra_keys=[msgspec.Raw(b"\x91" * 100_000 + b"\xc0")]),
        stored([1], None, [1, 2], extra_keys=[msgspec.Raw(b"\x91\xa1\xff")]),
        stored([1], None, [1, 2**32]),
    ],
)
def test_events_that_make_no_sense_are_counted_and_nothing_else(bad):
    index = KVIndex()
    index.apply("a", batch(bad, stored([7], None, [8, 8])))
    assert (index.num_blocks, index.health()["a"].bad_events) == (1, 1)
    assert index.lookup([8, 8])


@pytest.mark.parametrize("size", [0, 2])
@pytest.mark.parametrize("group", [None, 0, 3])
def test_an_event_of_no_blocks_is_nothing(size, group):
    index = KVIndex()
    index.apply("a", batch(stored([], None, [], size, group_idx=group)))
    assert (index.block_sizes, index.lookup([1, 2])) == ((), {})
    index.apply("a", batch(stored([7], None, [8, 8], group_idx=1, kv_cache_spec_kind="full_attention")))
    assert index.lookup([8, 8])["a"].tokens == 2


hashes = st.lists(st.integers(0, 3), max_size=3)
odd_events = st.builds(
    BlockStored,
    hashes,
    st.none() | st.integers(0, 3),
    st.lists(st.integers(0, 1), max_size=6),
    st.integers(0, 3),
    medium=st.sampled_from([None, "GPU", "cpu"]),
    group_idx=st.sampled_from([None, 0, 1]),
) | st.builds(BlockRemoved, hashes, st.sampled_from([None, "cpu"]))


@given(st.lists(st.tuples(st.sampled_from("ab"), odd_events), max_size=12))
def test_whatever_is_told_prompts_can_be_looked_up(told):
    index = KVIndex()
    for endpoint, one in told:
        index.apply(endpoint, batch(one))
        assert 0 not in index.block_sizes
        for match in index.lookup([0, 1, 0, 1, 0, 0]).values():
            assert 0 < match.tokens <= 6


def test_adapters_that_nobody_names_any_more_give_way(monkeypatch):
    monkeypatch.setattr(index_of_blocks, "MAX_ADAPTERS", 3)
    index = KVIndex()
    for number in range(10):
        index.apply("a", batch(stored([number], None, [number, 0], lora_name=f"adapter-{number}")))
        assert len(index._adapters) <= 3
        if number >= 1:
            assert index.lookup([1, 0], model="adapter-1")  # asked for all the time
    assert index.lookup([9, 0], model="adapter-9")
    assert not index.lookup([5, 0], model="adapter-5")


def test_there_are_not_more_tiers_than_can_be():
    index = KVIndex()
    for number in range(MAX_TIERS + 5):
        index.apply("a", batch(stored([number], None, [number, 0], medium=f"tier{number}")))
    assert (index.num_blocks, index.health()["a"].bad_events) == (MAX_TIERS, 5)


def test_images_tell_prompts_apart():
    index = KVIndex()
    index.apply("a", batch(stored([1, 2], None, [1, 2, 3, 4], extra_keys=[raw(None), raw([["image", 0]])])))
    assert index.match(index.keys([1, 2, 3, 4], 2, extras={1: [["image", 0]]})) == {"a": {"gpu": 2}}
    assert index.match(index.keys([1, 2, 3, 4], 2, extras={1: [["other", 0]]})) == {"a": {"gpu": 1}}
    assert index.match(index.keys([1, 2, 3, 4], 2, extras={0: [["image", 0]]})) == {}


def test_no_more_keys_are_made_than_are_needed():
    index, made = KVIndex(), []
    keys = (made.append(key) or key for key in index.keys(range(1000), 2))
    assert index.match(keys) == {}
    assert made == []
    index.apply("a", batch(stored([1], None, [0, 1])))
    assert index.match(key for key in index.keys(range(1000), 2) if made.append(key) is None) == {"a": {"gpu": 1}}
    assert len(made) == 2


def test_bits_are_used_again():
    index = KVIndex()
    for number in range(100):
        index.apply(f"e{number}", batch(stored([1], None, [1, 2])))
        index.remove(f"e{number - 3}")
    assert set(index.lookup([1, 2])) == {"e97", "e98", "e99"}
    assert index._slots.used.bit_length() <= 4


def test_two_names_of_one_block_are_two_blocks():
    """Engines draw the seed of their hashes: each of several data-parallel ranks has its own name for one content."""
    index = KVIndex()
    index.apply("a", batch(stored([1], None, [1, 2]), stored([b"other"], None, [1, 2]), BlockRemoved([1])))
    assert index.lookup([1, 2])
    index.apply("a", batch(BlockRemoved([b"other"])))
    assert not index.lookup([1, 2])
    assert index.num_keys == 0
