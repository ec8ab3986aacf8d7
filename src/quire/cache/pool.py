"""Which KV block is whose.

The pool knows block ids, reference counts and prefix hashes; it holds no tensors. Its blocks are for any group of
layers (`cache.groups`), and a block's content is known by its prefix hash and its group. A block is *used* (referenced
by one or more requests) or *free*. A free block may still have content: it stays findable by its hash until it is
handed out again. So one list serves as free list and as LRU: blocks without content at the front, then blocks with
content, the longest unused first.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence, Set

from quire.cache.groups import ALL_OF_THE_PAST, Sight
from quire.cache.journal import CacheJournal

NULL_BLOCK = 0
"""Never handed out: padding of block tables, the place of blocks in them that nobody can see any more, and where writes
go that nobody may read."""


class BlockPool:
    """`num_blocks` blocks of `block_size` tokens, block 0 of them reserved. Every operation is O(1) per block.

    `sights`: what the layers of each group see of the past. `journal`: is told what is forgotten; who calls `publish`
    tells it what is stored.
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        enable_prefix_caching: bool = True,
        sights: Sequence[Sight] = (ALL_OF_THE_PAST,),
        journal: CacheJournal | None = None,
    ) -> None:
        assert num_blocks >= 1
        assert block_size >= 1
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.enable_prefix_caching = enable_prefix_caching
        self.journal = journal
        self.sights = tuple(sights)
        self.limited = tuple((group, sight) for group, sight in enumerate(self.sights) if sight.reach is not None)
        """The groups that do not see all of the past."""
        self._references = [0] * num_blocks
        self._hashes: list[bytes | None] = [None] * num_blocks
        self._groups = [0] * num_blocks
        """Where a block has a hash, the group whose content it is."""
        self._cached: tuple[dict[bytes, int], ...] = tuple({} for _ in self.sights)
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(1, num_blocks))

    # --- reads ----------------------------------------------------------------------------------------------

    @property
    def num_free(self) -> int:
        """Blocks that `allocate` can hand out, those with content included."""
        return len(self._free)

    @property
    def num_usable(self) -> int:
        return self.num_blocks - 1

    @property
    def num_cached(self) -> int:
        """Blocks that `match` can find, used and free."""
        return sum(map(len, self._cached))

    def cached_hashes(self, group: int = 0) -> Set[bytes]:
        """Of one group's blocks that `match` can find."""
        return self._cached[group].keys()

    @property
    def usage(self) -> float:
        """Share of the usable blocks that requests hold, 0 to 1."""
        return 1.0 - len(self._free) / self.num_usable if self.num_usable else 0.0

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold `num_tokens` tokens of one request."""
        return -(-num_tokens // self.block_size)

    def is_free(self, block_id: int) -> bool:
        return block_id in self._free

    def references(self, block_id: int) -> int:
        """How many requests hold the block."""
        return self._references[block_id]

    def match(self, hashes: Sequence[bytes], num_tokens: int | None = None) -> list[list[int]]:
        """The longest prefix of a chain after which all groups can go on: one table per group, of one length.

        A group that does not see all of the past needs the blocks that are seen from there on; the others are
        `NULL_BLOCK` in its table. A request of `num_tokens` tokens, all of them cached, goes on at its last token.
        Takes no reference: `touch` does.
        """
        length = len(hashes)
        for sight, cached in zip(self.sights, self._cached):
            if sight.reach is None:
                length = next((i for i in range(length) if hashes[i] not in cached), length)
        tables = self._cached
        if self.limited:
            length, firsts = self._limited_match(hashes, length, num_tokens)
            return [
                [NULL_BLOCK] * first + [cached[block_hash] for block_hash in hashes[first:length]]
                for cached, first in zip(tables, firsts)
            ]
        return [[cached[block_hash] for block_hash in hashes[:length]] for cached in tables]

    def _limited_match(self, hashes: Sequence[bytes], length: int, num_tokens: int | None) -> tuple[int, list[int]]:
        """At most `length` blocks, as many as can be gone on after; and the first block of them that each group needs.

        Scans downwards: a block that is missing leaves only what ends before it. `lows`: from where on, up to `length`,
        a group's blocks are known to be there; so each is looked up once.
        """
        lows = {group: length for group, _ in self.limited}
        while True:
            following = length * self.block_size
            firsts = self.first_blocks(following if num_tokens is None else min(following, num_tokens - 1))
            missing = None
            for group, _ in self.limited:
                lows[group] = min(lows[group], length)
                while missing is None and lows[group] > firsts[group]:
                    if hashes[lows[group] - 1] not in self._cached[group]:
                        missing = lows[group] - 1
                    else:
                        lows[group] -= 1
            if missing is None:
                return length, firsts
            length = missing

    def first_blocks(self, position: int) -> list[int]:
        """For each group, the index of the first block that a token at `position`, or any after it, can see."""
        return [sight.first(position) // self.block_size for sight in self.sights]

    # --- writes ---------------------------------------------------------------------------------------------

    def allocate(self, n: int) -> list[int]:
        """Hand out `n` blocks with one reference each; the content of the longest unused ones is forgotten."""
        assert n <= len(self._free), f"{n} blocks wanted, {len(self._free)} free"
        block_ids = []
        for _ in range(n):
            block_id, _none = self._free.popitem(last=False)
            self._forget(block_id)
            self._references[block_id] = 1
            block_ids.append(block_id)
        return block_ids

    def touch(self, block_ids: Sequence[int]) -> None:
        """Take one more reference to blocks that `match` found, but for its null blocks."""
        for block_id in block_ids:
            if block_id == NULL_BLOCK:
                continue
            if self._references[block_id] == 0:
                del self._free[block_id]
            self._references[block_id] += 1

    def release(self, block_ids: Sequence[int]) -> None:
        """Give back one reference to each block of a table, in the table's order, but for null blocks.

        The tail goes to the free list before the head, and is evicted before it: a chain without its head is no use.
        """
        for block_id in reversed(block_ids):
            if block_id == NULL_BLOCK:
                continue
            assert self._references[block_id] > 0, f"block {block_id} is released more often than it was taken"
            self._references[block_id] -= 1
            if self._references[block_id] == 0:
                self._free[block_id] = None
                if self._hashes[block_id] is None:
                    self._free.move_to_end(block_id, last=False)

    def publish(self, block_id: int, block_hash: bytes, group: int = 0) -> bool:
        """Make a full, computed block findable. If its content is cached in another block, that one stays the one, and
        the answer is False."""
        if not self.enable_prefix_caching or block_hash in self._cached[group]:
            return False
        assert self._references[block_id] > 0, f"block {block_id} is published by nobody"
        assert self._hashes[block_id] is None, f"block {block_id} is published under two hashes"
        self._hashes[block_id] = block_hash
        self._groups[block_id] = group
        self._cached[group][block_hash] = block_id
        return True

    def reset(self) -> None:
        """Forget all content. Requests keep the blocks they hold."""
        for cached in self._cached:
            cached.clear()
        self._hashes = [None] * self.num_blocks
        if self.journal is not None:
            self.journal.cleared()

    def _forget(self, block_id: int) -> None:
        block_hash = self._hashes[block_id]
        if block_hash is not None:
            self._hashes[block_id] = None
            del self._cached[self._groups[block_id]][block_hash]
            if self.journal is not None:
                self.journal.removed(self._groups[block_id], block_hash)

    # --- check ----------------------------------------------------------------------------------------------

    def check_integrity(self, tables: Iterable[Sequence[int]]) -> None:
        """AssertionError unless every block is accounted for exactly once, given the blocks in the tables of all
        requests and groups."""
        held: Counter[int] = Counter()
        for table in tables:
            assert len(set(table)) == len(table), f"a block is twice in one table: {list(table)}"
            held.update(table)
        assert NULL_BLOCK not in held, "a request holds the null block"
        assert NULL_BLOCK not in self._free, "the null block is in the free list"
        assert all(0 < block_id < self.num_blocks for block_id in held), "a table names a block that does not exist"
        for block_id in range(1, self.num_blocks):
            count = self._references[block_id]
            assert count == held[block_id], f"block {block_id}: {count} references, {held[block_id]} holders"
            assert (count == 0) == (block_id in self._free), f"block {block_id}: {count} references, yet free or lost"
        assert len(self._free) + len(held) == self.num_usable, "blocks are lost"
        published = {(self._groups[block_id], h): block_id for block_id, h in enumerate(self._hashes) if h is not None}
        index = {(group, h): block_id for group, cached in enumerate(self._cached) for h, block_id in cached.items()}
        assert published == index, "hashes of blocks and the index of hashes differ"
