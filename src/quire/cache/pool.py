"""Which KV block is whose.

The pool knows block ids, reference counts and prefix hashes; it holds no tensors. A block is *used* (referenced by one
or more requests) or *free*. A free block may still have content: it stays findable by its hash until it is handed out
again. So one list serves as free list and as LRU: blocks without content at the front, then blocks with content, the
longest unused first.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence

NULL_BLOCK = 0
"""Never handed out: padding of block tables, and where writes go that nobody may read."""


class BlockPool:
    """`num_blocks` blocks of `block_size` tokens, block 0 of them reserved. Every operation is O(1) per block."""

    def __init__(self, num_blocks: int, block_size: int, enable_prefix_caching: bool = True) -> None:
        assert num_blocks >= 1
        assert block_size >= 1
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.enable_prefix_caching = enable_prefix_caching
        self._references = [0] * num_blocks
        self._hashes: list[bytes | None] = [None] * num_blocks
        self._cached: dict[bytes, int] = {}
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
        return len(self._cached)

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

    def match(self, hashes: Iterable[bytes]) -> list[int]:
        """The longest run of cached blocks from the start of a chain. Takes no reference: `touch` does."""
        block_ids: list[int] = []
        for block_hash in hashes:
            block_id = self._cached.get(block_hash)
            if block_id is None:
                break
            block_ids.append(block_id)
        return block_ids

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
        """Take one more reference to blocks that `match` found."""
        for block_id in block_ids:
            assert block_id != NULL_BLOCK
            if self._references[block_id] == 0:
                del self._free[block_id]
            self._references[block_id] += 1

    def release(self, block_ids: Sequence[int]) -> None:
        """Give back one reference to each block of a table, in the table's order.

        The tail goes to the free list before the head, and is evicted before it: a chain without its head is no use.
        """
        for block_id in reversed(block_ids):
            assert self._references[block_id] > 0, f"block {block_id} is released more often than it was taken"
            self._references[block_id] -= 1
            if self._references[block_id] == 0:
                self._free[block_id] = None
                if self._hashes[block_id] is None:
                    self._free.move_to_end(block_id, last=False)

    def publish(self, block_id: int, block_hash: bytes) -> None:
        """Make a full, computed block findable. If its content is cached in another block, that one stays the one."""
        if not self.enable_prefix_caching or block_hash in self._cached:
            return
        assert self._references[block_id] > 0, f"block {block_id} is published by nobody"
        assert self._hashes[block_id] is None, f"block {block_id} is published under two hashes"
        self._hashes[block_id] = block_hash
        self._cached[block_hash] = block_id

    def reset(self) -> None:
        """Forget all content. Requests keep the blocks they hold."""
        self._cached.clear()
        self._hashes = [None] * self.num_blocks

    def _forget(self, block_id: int) -> None:
        block_hash = self._hashes[block_id]
        if block_hash is not None:
            self._hashes[block_id] = None
            del self._cached[block_hash]

    # --- check ----------------------------------------------------------------------------------------------

    def check_integrity(self, tables: Iterable[Sequence[int]]) -> None:
        """AssertionError unless every block is accounted for exactly once, given the tables of all requests."""
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
        published = {h: block_id for block_id, h in enumerate(self._hashes) if h is not None}
        assert published == self._cached, "hashes of blocks and the index of hashes differ"
