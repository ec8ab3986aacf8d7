"""How fast the gateway's KV index takes in events and answers: one core, no network.

    python benchmarks/kv_index.py [--json]

Indexed: payloads as an engine sends them (32 blocks of 16 tokens each, 32-byte hashes; then the removals) are decoded
and applied, for one endpoint and for many in turn. Matched: a prompt of 7,200 tokens against all of them, of which each
holds a beginning of another length; and one that nobody knows.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import time

from quire.gateway.kv.index import KVIndex
from quire.wire.kv_events import BlockRemoved, BlockStored, KVEventBatch, decode_batch, encode_batch

BLOCK_SIZE = 16
BLOCKS_PER_EVENT = 32
PROMPT_TOKENS = 7_200
VOCABULARY = 150_000


def hashes(name: str, count: int) -> list[bytes]:
    return [hashlib.sha256(f"{name} {number}".encode()).digest() for number in range(count)]


def payloads(num_events: int, chance: random.Random) -> tuple[list[bytes], list[bytes]]:
    """What stores so many events' blocks, each event a text of its own, and what removes them again."""
    stores, removals = [], []
    for number in range(num_events):
        named = hashes(str(number), BLOCKS_PER_EVENT)
        tokens = [chance.randrange(VOCABULARY) for _ in range(BLOCKS_PER_EVENT * BLOCK_SIZE)]
        stored = BlockStored(named, None, tokens, BLOCK_SIZE, medium="GPU")
        stores.append(encode_batch(KVEventBatch(float(number), [stored], 0)))
        removals.append(encode_batch(KVEventBatch(float(number), [BlockRemoved(named, "GPU")], 0)))
    return stores, removals


def indexed(num_endpoints: int, num_events: int, seconds: float) -> tuple[float, float]:
    """Blocks stored, and blocks removed, per second."""
    stores, removals = payloads(num_events, random.Random(1))
    took = {True: 0.0, False: 0.0}
    rounds = 0
    while sum(took.values()) < seconds:
        index = KVIndex(max_blocks=2 * num_events * BLOCKS_PER_EVENT)
        for storing, all_payloads in ((True, stores), (False, removals)):
            begun = time.process_time()
            for number, payload in enumerate(all_payloads):
                index.apply(f"endpoint-{number % num_endpoints}", decode_batch(payload))
            took[storing] += time.process_time() - begun
        assert index.num_blocks == 0
        rounds += 1
    blocks = rounds * num_events * BLOCKS_PER_EVENT
    return blocks / took[True], blocks / took[False]


def matched(num_endpoints: int, seconds: float) -> tuple[float, float]:
    """Microseconds to look up a prompt that all endpoints hold a beginning of, and one that is new."""
    chance = random.Random(2)
    prompt = [chance.randrange(VOCABULARY) for _ in range(PROMPT_TOKENS)]
    blocks = PROMPT_TOKENS // BLOCK_SIZE
    named = hashes("prompt", blocks)
    index = KVIndex()
    for number in range(num_endpoints):
        held = blocks - number % blocks
        stored = BlockStored(named[:held], None, prompt[: held * BLOCK_SIZE], BLOCK_SIZE)
        index.apply(f"endpoint-{number}", KVEventBatch(0.0, [stored], 0))
    costs = []
    for asked, known in ((prompt, num_endpoints), (prompt[::-1], 0)):
        begun, count = time.process_time(), 0
        while time.process_time() - begun < seconds:
            assert len(index.lookup(asked)) == known
            count += 1
        costs.append((time.process_time() - begun) / count * 1e6)
    return costs[0], costs[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=2.0, help="CPU time of each measurement")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args()
    report = {}
    for endpoints in (1, 100):
        stored, removed = indexed(endpoints, 1000, options.seconds)
        report[f"blocks stored per second, {endpoints} endpoints"] = round(stored)
        report[f"blocks removed per second, {endpoints} endpoints"] = round(removed)
    for endpoints in (1, 100, 400):
        warm, cold = matched(endpoints, options.seconds)
        report[f"microseconds to look up {PROMPT_TOKENS} known tokens, {endpoints} endpoints"] = round(warm, 1)
        report[f"microseconds to look up {PROMPT_TOKENS} new tokens, {endpoints} endpoints"] = round(cold, 1)
    if options.json:
        print(json.dumps(report))
    else:
        print("\n".join(f"{value:>12,}  {name}" for name, value in report.items()))


if __name__ == "__main__":
    main()
