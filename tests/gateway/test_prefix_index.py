"""The approximate prefix index against plain lists of what was sent, and the producer that feeds it."""

from __future__ import annotations

import random
from collections.abc import Sequence

from hypothesis import given, settings
from hypothesis import strategies as st

from quire.gateway.endpoint import Endpoint, EndpointMetrics, Pool
from quire.gateway.plugin import Conclusion, Plugin, Services
from quire.gateway.producers.prefix import ApproxPrefix, PrefixParameters, block_keys
from quire.gateway.producers.prefix_index import PrefixIndex
from quire.gateway.request import Api, InferenceRequest, Outcome

PROMPTS = st.lists(st.integers(0, 1), max_size=6)
"""Few blocks of few kinds, so that prompts share beginnings."""
SENT = st.lists(st.tuples(st.sampled_from("abc"), PROMPTS, st.integers(1, 8)), max_size=30)


def chain(blocks: Sequence[int]) -> list[int]:
    return [hash(tuple(blocks[: end + 1])) for end in range(len(blocks))]


class Brute:
    """Per endpoint the blocks' keys, the one used longest ago first."""

    def __init__(self) -> None:
        self.kept: dict[str, list[int]] = {}

    def add(self, endpoint: str, keys: Sequence[int], capacity: int) -> None:
        kept = [key for key in self.kept.get(endpoint, []) if key not in keys] + list(reversed(keys))
        self.kept[endpoint] = kept[-capacity:]

    def match(self, keys: Sequence[int]) -> dict[str, int]:
        found = {}
        for endpoint, kept in self.kept.items():
            count = 0
            while count < len(keys) and keys[count] in kept:
                count += 1
            if count:
                found[endpoint] = count
        return found


@given(SENT, PROMPTS, st.sampled_from(["", "a", "b"]))
def test_matches_are_those_of_plain_lists(sent: list[tuple[str, list[int], int]], asked: list[int], left: str) -> None:
    index, brute = PrefixIndex(), Brute()
    for endpoint, blocks, capacity in sent:
        index.add(endpoint, chain(blocks), capacity)
        brute.add(endpoint, chain(blocks), capacity)
        assert index.match(chain(asked)) == brute.match(chain(asked))
    index.remove(left)
    brute.kept.pop(left, None)
    assert index.match(chain(asked)) == brute.match(chain(asked))
    assert len(index) == sum(map(len, brute.kept.values()))


@settings(max_examples=50)
@given(SENT, st.integers(3, 12))
def test_the_index_never_outgrows_its_bound(sent: list[tuple[str, list[int], int]], most: int) -> None:
    index = PrefixIndex(most)
    for endpoint, blocks, _ in sent:
        index.add(endpoint, chain(blocks), 1000)
        assert len(index) <= most
        assert sum(index.size(name) for name in "abc") == len(index)
    for name in "abc":
        index.remove(name)
    assert (len(index), index._holders, index._names) == (0, {}, {})


def test_an_endpoint_that_comes_after_another_left_inherits_nothing() -> None:
    index = PrefixIndex()
    index.add("a", chain([1, 2]), 10)
    index.remove("a")
    index.add("b", chain([3]), 10)
    assert index.match(chain([1, 2])) == {}
    assert index.match(chain([3])) == {"b": 1}


# --- the producer -------------------------------------------------------------------------------------------------


def request(prompt: bytes = b"", **fields: object) -> InferenceRequest:
    values: dict[str, object] = {"id": "r", "path": "/", "api": Api.COMPLETIONS, "model": "m", "target_model": "m"}
    values |= {"body": b"", "headers": {}, "arrived": 0.0, "prompt": prompt, "prompt_tokens": len(prompt) // 4}
    return InferenceRequest(**(values | fields))  # type: ignore[arg-type]


def pool_of(*names: str) -> Pool:
    pool = Pool()
    for number, name in enumerate(names):
        pool.put(Endpoint(name, "127.0.0.1", 8000 + number))
    return pool


def producer(pool: Pool, **parameters: object) -> ApproxPrefix:
    services = Services(pool, lambda: 0.0, random.Random(0), lambda name: Plugin())
    return ApproxPrefix(PrefixParameters(**parameters), services)  # type: ignore[arg-type]


def send(plugin: ApproxPrefix, pool: Pool, one: InferenceRequest, to: str) -> None:
    plugin.produce(one, pool.all)
    endpoint = next(endpoint for endpoint in pool if endpoint.name == to)
    plugin.sent(one, endpoint, Conclusion([endpoint]))


def tokens(plugin: ApproxPrefix, pool: Pool, one: InferenceRequest) -> dict[str, int]:
    plugin.produce(one, pool.all)
    return {key.removeprefix("default/"): match.tokens for key, match in one.prefix[plugin.name].items()}


def test_what_was_sent_is_thought_to_be_there() -> None:
    pool = pool_of("a", "b")
    plugin = producer(pool)
    shared = random.Random(1).randbytes(1024)
    send(plugin, pool, request(shared + b"x" * 512), "a")
    send(plugin, pool, request(shared[:512]), "b")
    assert tokens(plugin, pool, request(shared + b"y" * 512)) == {"a": 256, "b": 128}
    assert tokens(plugin, pool, request(b"z" + shared)) == {}
    assert tokens(plugin, pool, request(b"")) == {}


def test_as_many_blocks_are_matched_as_may_be() -> None:
    """Tokens where they are given, else blocks, else 131,072 tokens."""
    pool = pool_of("a")
    prompt = random.Random(1).randbytes(200_000 * 4)
    for parameters, expected in (
        ({}, 131_072),
        ({"max_prefix_blocks_to_match": 3}, 192),
        ({"max_prefix_tokens_to_match": 640}, 640),
        ({"max_prefix_tokens_to_match": 640, "max_prefix_blocks_to_match": 3}, 640),
        ({"max_prefix_tokens_to_match": 0, "max_prefix_blocks_to_match": 3}, 192),
        ({"max_prefix_tokens_to_match": 0}, 200_000),
    ):
        plugin = producer(pool, lru_capacity_per_server=10_000, **parameters)
        send(plugin, pool, request(prompt), "a")
        assert tokens(plugin, pool, request(prompt)) == {"a": expected}


def test_another_model_or_salt_shares_nothing() -> None:
    pool = pool_of("a")
    plugin = producer(pool)
    prompt = bytes(1024)
    send(plugin, pool, request(prompt, cache_salt="one"), "a")
    assert tokens(plugin, pool, request(prompt, cache_salt="one")) == {"a": 256}
    assert tokens(plugin, pool, request(prompt, cache_salt="two")) == {}
    assert tokens(plugin, pool, request(prompt, cache_salt="one", target_model="n")) == {}


def test_token_ids_count_before_text() -> None:
    ids = list(range(1000, 1130))
    exact = request(b"any text of the prompt", token_ids=ids, prompt_tokens=130)
    keys = block_keys(exact, 64, 10)
    assert len(keys) == 2
    assert keys == block_keys(request(b"another text", token_ids=ids, prompt_tokens=130), 64, 10)
    assert keys[:1] == block_keys(request(token_ids=[*ids[:64], *ids[:64]], prompt_tokens=128), 64, 10)[:1]
    assert block_keys(request(bytes(512), token_ids=[0] * 128), 64, 1) != block_keys(request(bytes(512)), 64, 1)


def test_blocks_and_room_come_from_what_endpoints_report() -> None:
    pool = pool_of("a", "b")
    plugin = producer(pool)
    assert plugin.block_tokens() == 64
    pool.all[0].metrics = EndpointMetrics(time=0.0, block_size=128, num_blocks=3)
    assert plugin.block_tokens() == 128
    for number in range(4):
        send(plugin, pool, request(bytes([number]) * 512), "a")
    held = [bool(tokens(plugin, pool, request(bytes([number]) * 512))) for number in range(4)]
    assert held == [False, True, True, True]
    fixed = producer(pool, auto_tune=False, block_size_tokens=16, lru_capacity_per_server=2)
    assert fixed.block_tokens() == 16
    send(fixed, pool, request(bytes(512)), "a")
    assert tokens(fixed, pool, request(bytes(512))) == {"a": 32}


def test_one_endpoint_of_huge_blocks_does_not_blind_all() -> None:
    pool = pool_of("a", "b")
    pool.all[1].metrics = EndpointMetrics(time=0.0, block_size=2**53 - 1, num_blocks=2**53 - 1)
    plugin = producer(pool)
    send(plugin, pool, request(bytes(4096)), "a")
    assert tokens(plugin, pool, request(bytes(4096))) == {"a": 1024}
    assert producer(pool, block_size_tokens=512).block_tokens() == 512  # as the operator says


def test_what_ends_at_an_endpoint_that_left_leaves_nothing_behind() -> None:
    pool = pool_of("a")
    plugin, one, left = producer(pool), request(bytes(4096)), pool.all[0]
    send(plugin, pool, one, "a")
    again = request(bytes(4096))
    send(plugin, pool, again, "a")
    pool.remove(left.key)
    plugin.finished(again, left, Outcome(status=200, cached_tokens=0))
    assert (plugin._room, len(plugin._index)) == ({}, 0)


def test_no_more_is_matched_than_asked_for() -> None:
    pool = pool_of("a")
    plugin = producer(pool, max_prefix_tokens_to_match=128)
    send(plugin, pool, request(bytes(4096)), "a")
    assert tokens(plugin, pool, request(bytes(4096))) == {"a": 128}


def test_the_room_of_who_reports_none_is_learnt_from_answers() -> None:
    pool = pool_of("a")
    plugin, rng = producer(pool), random.Random(3)
    prompts = [rng.randbytes(4096) for _ in range(40)]  # 16 blocks each; it holds five of them
    cache: list[int] = []
    wrong = []
    for _ in range(1500):
        number = rng.randrange(len(prompts))
        one = request(prompts[number])
        thought = bool(tokens(plugin, pool, one))
        plugin.sent(one, pool.all[0], Conclusion([pool.all[0]]))
        there = number in cache
        cache = [*(other for other in cache if other != number), number][-5:]
        wrong.append(there != thought)
        plugin.finished(one, pool.all[0], Outcome(status=200, cached_tokens=1024 if there else 0))
    # with room for all of them, seven of eight would be thought to be there and are not
    assert sum(wrong) < 150
