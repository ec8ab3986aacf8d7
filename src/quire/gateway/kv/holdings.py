"""What one endpoint holds, tier by tier, and the bits that stand for it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from quire.gateway.kv.health import KVHealth
from quire.wire.kv_events import BlockHash

DEVICE = "gpu"
FULL_ATTENTION = frozenset({"full_attention", "mla_attention", "sink_full_attention"})


def tier_of(medium: str | None) -> str:
    """Engines write it in upper case, or leave it out where they have one tier."""
    return (medium or DEVICE).lower()


class Slots:
    """Numbers for holders, small ones first; a holder's bit is 1 << its number.

    `holder(bit)` is the endpoint and the tier, None for all its tiers together.
    """

    def __init__(self) -> None:
        self._holders: list[tuple[str, str | None] | None] = []
        self._free: list[int] = []
        self.used = 0
        """The sum of the bits that are taken."""

    def take(self, endpoint: str, tier: str | None) -> int:
        """A bit for this holder."""
        if self._free:
            number = self._free.pop()
            self._holders[number] = (endpoint, tier)
        else:
            number = len(self._holders)
            self._holders.append((endpoint, tier))
        self.used |= 1 << number
        return 1 << number

    def release(self, bits: int) -> None:
        self.used &= ~bits
        while bits:
            low = bits & -bits
            bits ^= low
            self._holders[low.bit_length() - 1] = None
            self._free.append(low.bit_length() - 1)

    def holder(self, bit: int) -> tuple[str, str | None]:
        holder = self._holders[bit.bit_length() - 1]
        assert holder is not None, "a bit that nobody has"
        return holder


@dataclass(slots=True)
class Shelf:
    """One tier of one endpoint. `blocks`: the engine's name of a block → its key, those stored first at the front.
    `repeats`: blocks that were stored more than once, and how often more. `doubles`: keys that several blocks have."""

    tier: str
    bit: int
    blocks: dict[BlockHash, int] = field(default_factory=dict)
    repeats: Counter[BlockHash] = field(default_factory=Counter)
    doubles: Counter[int] = field(default_factory=Counter)


@dataclass(slots=True)
class Holdings:
    """One endpoint. `any_bit` is 0 while there is but one tier. `group`: the group of layers that is followed. `gone`:
    blocks that it no longer holds, but may yet name as the parent of others."""

    health: KVHealth
    first_query: int
    shelves: dict[str, Shelf] = field(default_factory=dict)
    any_bit: int = 0
    group: int | None = None
    gone: dict[BlockHash, int] = field(default_factory=dict)

    @property
    def bits(self) -> int:
        return self.any_bit + sum(shelf.bit for shelf in self.shelves.values())

    def key_of(self, block_hash: BlockHash) -> int | None:
        """On whatever tier, or gone of late."""
        for shelf in self.shelves.values():
            key = shelf.blocks.get(block_hash)
            if key is not None:
                return key
        return self.gone.get(block_hash)

    def follows(self, group: int | None, kind: str | None) -> bool:
        """Of the groups of layers that see all of the past one is followed: the first that is heard of. Events of
        engines with one group name none."""
        if group is None:
            return True
        if self.group is None and (kind in FULL_ATTENTION or (kind is None and group == 0)):
            self.group = group
        return group == self.group
