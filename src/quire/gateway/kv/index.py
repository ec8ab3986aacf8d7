"""The KV index: for each block key, which endpoints hold the block, and on which tier.

A holder (one tier of one endpoint, and for an endpoint with several tiers, all of them together) is a bit; what is
kept per key is the sum of its holders' bits. So a prompt is matched against hundreds of endpoints at once: the
holders of its first blocks are those whose bit is in all of these blocks' sums.
"""

from __future__ import annotations

import itertools
from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence

from quire.gateway.kv.health import KVHealth
from quire.gateway.kv.holdings import DEVICE, Holdings, Shelf, Slots, tier_of
from quire.gateway.kv.keys import chain, extra_bytes, extras_of_event, root_key
from quire.gateway.request import PrefixMatch
from quire.wire.kv_events import BadKVEvents, BlockHash, BlockRemoved, BlockStored, KVEventBatch

TIER_CREDITS: Mapping[str, float] = {DEVICE: 1.0, "cpu": 0.8}
"""What a token on a tier is worth, against one that is computed for nothing."""
OTHER_TIERS_CREDIT = 0.5
MAX_BLOCKS = 1_000_000
MAX_TIERS = 8
MAX_ADAPTERS = 4096
MAX_GONE = 1024


class KVIndex:
    """Holds at most `max_blocks` blocks of all endpoints. When there are more, those of the endpoint with the most go
    that were stored longest ago and not matched since. Not for use by several threads."""

    def __init__(self, *, max_blocks: int = MAX_BLOCKS) -> None:
        self._max_blocks = max_blocks
        self._credits = TIER_CREDITS
        self._endpoints: dict[str, Holdings] = {}
        self._holders: dict[int, int] = {}
        self._slots = Slots()
        self._sizes: Counter[int] = Counter()
        self._adapters: OrderedDict[str, None] = OrderedDict()
        """Those that engines named, and requests asked for, last at the back."""
        self._matched: set[int] = set()
        self._num_blocks = 0
        self.queries = 0

    # --- reading ------------------------------------------------------------------------------------------------

    @property
    def num_blocks(self) -> int:
        """On all tiers of all endpoints."""
        return self._num_blocks

    @property
    def num_keys(self) -> int:
        """Different blocks."""
        return len(self._holders)

    @property
    def block_sizes(self) -> Sequence[int]:
        """Tokens per block, of the endpoints that hold any."""
        return tuple(self._sizes)

    def health(self) -> dict[str, KVHealth]:
        """By endpoint."""
        for holdings in self._endpoints.values():
            holdings.health.blocks = sum(len(shelf.blocks) for shelf in holdings.shelves.values())
            holdings.health.queries = self.queries - holdings.first_query
        return {endpoint: holdings.health for endpoint, holdings in self._endpoints.items()}

    def keys(
        self,
        token_ids: Sequence[int],
        block_size: int,
        *,
        model: str = "",
        cache_salt: str = "",
        extras: Mapping[int, Sequence[object]] | None = None,
    ) -> Iterator[int]:
        """Keys of a prompt's full blocks, made as they are asked for.

        `model`: as asked for; counts where it is an adapter that some engine has named. `extras`: by block, the names
        of images and the like, as the engine gives them.
        """
        packed = {number: extra_bytes(extra) for number, extra in (extras or {}).items()}
        if cache_salt:
            packed[0] = extra_bytes([*(extras or {}).get(0, ()), cache_salt])
        adapter = model if model in self._adapters else ""
        if adapter:
            self._adapters.move_to_end(adapter)
        return chain(root_key(adapter), token_ids, block_size, packed)

    def match(self, keys: Iterable[int]) -> dict[str, dict[str, int]]:
        """How many blocks from the first one on each endpoint holds without a gap, by tier; `""` for all its tiers
        taken together. Endpoints that do not hold the first one are left out. No more keys are taken than are needed.
        """
        found: dict[str, dict[str, int]] = {}
        alive, holders, length = self._slots.used, self._holders, 0
        taken: list[int] = []
        for key in keys if alive else ():
            held = holders.get(key, 0) & alive
            if held != alive:
                if length:
                    self._note_runs(alive ^ held, length, found)
                alive = held
                if not alive:
                    break
            taken.append(key)
            length += 1
        if length:
            self._note_runs(alive, length, found)
            if self._num_blocks > self._max_blocks // 2:  # only then is there anybody to be spared
                self._matched.update(taken)
        return found

    def _note_runs(self, bits: int, length: int, found: dict[str, dict[str, int]]) -> None:
        while bits:
            low = bits & -bits
            bits ^= low
            endpoint, tier = self._slots.holder(low)
            found.setdefault(endpoint, {})[tier or ""] = length

    def lookup(self, token_ids: Sequence[int], *, model: str = "", cache_salt: str = "") -> dict[str, PrefixMatch]:
        """How much of a prompt each endpoint holds, in tokens, whatever the size of its blocks. Counts as a query."""
        self.queries += 1
        found: dict[str, PrefixMatch] = {}
        for size in self._sizes:
            keys = self.keys(token_ids, size, model=model, cache_salt=cache_salt)
            for endpoint, tiers in self.match(keys).items():
                self._endpoints[endpoint].health.matches += 1
                found[endpoint] = self._weigh(tiers, size)
        return found

    def _weigh(self, tiers: dict[str, int], size: int) -> PrefixMatch:
        """What the best tier holds from the first block on has its credit; what only all together hold, the credit of
        the next best."""
        if len(tiers) == 1:  # as nearly always
            [(tier, run)] = tiers.items()
            tokens = run * size
            return PrefixMatch(tokens, tokens * self._credits.get(tier, OTHER_TIERS_CREDIT), {tier: tokens})
        total = tiers.pop("")
        ranked = sorted((self._credits.get(tier, OTHER_TIERS_CREDIT), run) for tier, run in tiers.items())
        weighted, covered = 0.0, 0
        for credit, run in reversed(ranked):
            if run > covered:
                weighted += credit * (run - covered)
                covered = run
        weighted += (total - covered) * self._credits.get("cpu", OTHER_TIERS_CREDIT)
        return PrefixMatch(total * size, weighted * size, {tier: run * size for tier, run in tiers.items()})

    # --- writing ------------------------------------------------------------------------------------------------

    def use_credits(self, tier_credits: Mapping[str, float]) -> None:
        """By tier, in small letters: what lookups weigh a token by."""
        self._credits = dict(tier_credits)

    def add(self, endpoint: str) -> KVHealth:
        """Know an endpoint, and nothing of its cache. Its counters, for whoever hears its events."""
        holdings = self._endpoints.get(endpoint)
        if holdings is None:
            holdings = self._endpoints[endpoint] = Holdings(KVHealth(), self.queries)
        return holdings.health

    def remove(self, endpoint: str) -> None:
        """Forget an endpoint."""
        self.clear(endpoint)
        self._endpoints.pop(endpoint, None)

    def clear(self, endpoint: str) -> None:
        """Forget what an endpoint holds."""
        holdings = self._endpoints.get(endpoint)
        if holdings is None:
            return
        bits = holdings.bits
        for shelf in holdings.shelves.values():
            for key in shelf.blocks.values():
                self._drop_bits(key, bits)
            self._num_blocks -= len(shelf.blocks)
        self._slots.release(bits)
        if holdings.health.block_size and holdings.shelves:
            self._sizes -= Counter([holdings.health.block_size])
        holdings.shelves.clear()
        holdings.gone.clear()
        holdings.any_bit, holdings.group = 0, None

    def apply(self, endpoint: str, batch: KVEventBatch) -> None:
        """Take in what an engine told. Events that make no sense are counted and passed over."""
        health = self.add(endpoint)
        holdings = self._endpoints[endpoint]
        health.batches += 1
        health.events += len(batch.events)
        for event in batch.events:
            if isinstance(event, BlockStored):
                try:
                    self._store(endpoint, holdings, event)
                except (BadKVEvents, OverflowError):
                    health.bad_events += 1
            elif isinstance(event, BlockRemoved):
                self._take_away(holdings, event)
            else:
                health.cleared += 1
                self.clear(endpoint)
            if self._num_blocks > self._max_blocks:
                self._shrink()

    def _store(self, endpoint: str, holdings: Holdings, event: BlockStored) -> None:
        health = holdings.health
        if not event.block_hashes and not event.token_ids:
            return
        if not holdings.follows(event.group_idx, event.kv_cache_spec_kind):
            health.skipped += len(event.block_hashes)
            return
        if event.token_ids and len(event.token_ids) != event.block_size * len(event.block_hashes):
            raise BadKVEvents(f"{len(event.token_ids)} tokens of {len(event.block_hashes)} blocks")
        if event.token_ids and event.block_size != health.block_size:
            if holdings.shelves:  # another engine than before: what is known of the old one is of no use
                group = holdings.group
                self.clear(endpoint)
                holdings.group = group
                health.resyncs += 1
            health.block_size = event.block_size
        keys = self._keys_of(holdings, event)
        if keys is None:
            health.orphans += len(event.block_hashes)
            return
        shelf = self._shelf(endpoint, holdings, event.medium)
        bits = shelf.bit | holdings.any_bit
        for block_hash, key in zip(event.block_hashes, keys, strict=True):
            known = shelf.blocks.get(block_hash)
            if known == key:
                shelf.repeats[block_hash] += 1
                continue
            if known is not None:
                self._forget(holdings, shelf, block_hash)
            held = self._holders.get(key)
            if held is None:
                self._holders[key] = bits
            else:
                if held & shelf.bit:
                    shelf.doubles[key] += 1
                self._holders[key] = held | bits
            shelf.blocks[block_hash] = key
            self._num_blocks += 1
        health.stored += len(event.block_hashes)

    def _keys_of(self, holdings: Holdings, event: BlockStored) -> list[int] | None:
        """None where the blocks before them are not known. Without tokens, blocks that are known have come to another
        tier."""
        if not event.token_ids:
            moved = [holdings.key_of(block_hash) for block_hash in event.block_hashes]
            known = [key for key in moved if key is not None]
            return known if len(known) == len(moved) else None
        adapter = event.lora_name or (f"#{event.lora_id}" if event.lora_id is not None else "")
        if event.parent_block_hash is None:
            if adapter:
                self._know(adapter)
            parent: int | None = root_key(adapter)
        else:
            parent = holdings.key_of(event.parent_block_hash)
        if parent is None:
            return None
        return list(
            chain(parent, event.token_ids, event.block_size, extras_of_event(event.extra_keys, event.lora_name))
        )

    def _know(self, adapter: str) -> None:
        self._adapters[adapter] = None
        self._adapters.move_to_end(adapter)
        if len(self._adapters) > MAX_ADAPTERS:
            self._adapters.popitem(last=False)

    def _take_away(self, holdings: Holdings, event: BlockRemoved) -> None:
        if event.group_idx is not None and event.group_idx != holdings.group:
            return
        shelf = holdings.shelves.get(tier_of(event.medium))
        if shelf is None:
            return
        for block_hash in event.block_hashes:
            if shelf.repeats.get(block_hash):
                shelf.repeats[block_hash] -= 1
                if not shelf.repeats[block_hash]:
                    del shelf.repeats[block_hash]
            elif block_hash in shelf.blocks:
                self._forget(holdings, shelf, block_hash)
                holdings.health.removed += 1

    def _forget(self, holdings: Holdings, shelf: Shelf, block_hash: BlockHash) -> None:
        key = shelf.blocks.pop(block_hash)
        self._num_blocks -= 1
        holdings.gone[block_hash] = key
        if len(holdings.gone) > MAX_GONE:
            for old in list(itertools.islice(holdings.gone, MAX_GONE // 2)):
                del holdings.gone[old]
        shelf.repeats.pop(block_hash, None)
        if shelf.doubles.get(key):
            shelf.doubles[key] -= 1
            if not shelf.doubles[key]:
                del shelf.doubles[key]
            return
        bits = shelf.bit
        if holdings.any_bit:
            others = sum(other.bit for other in holdings.shelves.values() if other is not shelf)
            if not self._holders[key] & others:
                bits |= holdings.any_bit
        self._drop_bits(key, bits)

    def _drop_bits(self, key: int, bits: int) -> None:
        left = self._holders.get(key, 0) & ~bits
        if left:
            self._holders[key] = left
        else:
            self._holders.pop(key, None)
            self._matched.discard(key)

    def _shelf(self, endpoint: str, holdings: Holdings, medium: str | None) -> Shelf:
        tier = tier_of(medium)
        shelf = holdings.shelves.get(tier)
        if shelf is not None:
            return shelf
        if len(holdings.shelves) >= MAX_TIERS:
            raise BadKVEvents(f"more than {MAX_TIERS} tiers")
        if not holdings.shelves:
            if holdings.health.block_size <= 0:  # with which no prompt could be cut into blocks
                raise BadKVEvents(f"blocks of {holdings.health.block_size} tokens")
            self._sizes[holdings.health.block_size] += 1
        elif not holdings.any_bit:
            holdings.any_bit = self._slots.take(endpoint, None)
            for first in holdings.shelves.values():
                for key in first.blocks.values():
                    self._holders[key] |= holdings.any_bit
        shelf = holdings.shelves[tier] = Shelf(tier, self._slots.take(endpoint, tier))
        return shelf

    def _shrink(self) -> None:
        """Back to the bound, and a little below, so that it is not for every block."""
        while self._num_blocks > self._max_blocks:
            holdings, shelf = max(
                ((holdings, shelf) for holdings in self._endpoints.values() for shelf in holdings.shelves.values()),
                key=lambda pair: len(pair[1].blocks),
            )
            for block_hash in list(itertools.islice(shelf.blocks, max(1, len(shelf.blocks) // 16))):
                key = shelf.blocks[block_hash]
                if key in self._matched:
                    self._matched.discard(key)
                    del shelf.blocks[block_hash]
                    shelf.blocks[block_hash] = key  # to the back: it has been of use
                else:
                    self._forget(holdings, shelf, block_hash)
                    holdings.health.evicted += 1
