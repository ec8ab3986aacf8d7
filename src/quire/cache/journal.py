"""What has come into the prefix cache and what has gone, in order: KV events of one engine, step by step."""

from __future__ import annotations

from collections.abc import Sequence

from quire.cache.groups import ALL_OF_THE_PAST, Sight
from quire.wire.kv_events import (
    MEDIUM_DEVICE,
    AllBlocksCleared,
    BlockRemoved,
    BlockStored,
    KVCacheEvent,
    encode_extra_keys,
)


class CacheJournal:
    """Kept by a `BlockPool` and by who publishes its blocks; `take` hands over what has gathered since.

    Layers in groups are told apart as vLLM does: by the group's number and kind. Where one group sees all of the past
    and there is no other, there is nothing to tell.
    """

    def __init__(self, block_size: int, sights: Sequence[Sight] = (ALL_OF_THE_PAST,)) -> None:
        self._block_size = block_size
        self._sights = tuple(sights)
        self._plain = self._sights == (ALL_OF_THE_PAST,)
        self._events: list[KVCacheEvent] = []
        self._gone: list[bytes] = []
        self._gone_group = 0

    def stored(
        self, group: int, indices: Sequence[int], hashes: Sequence[bytes], token_ids: Sequence[int], salt: str
    ) -> None:
        """The blocks of a text at `indices`, ascending, are in the cache now.

        `hashes` and `token_ids` are the whole text's, `salt` what its hashes are salted with.
        """
        self._flush()
        runs: list[range] = []
        for index in indices:
            if runs and index == runs[-1].stop:
                runs[-1] = range(runs[-1].start, index + 1)
            else:
                runs.append(range(index, index + 1))
        self._events.extend(self._stored_run(group, run, hashes, token_ids, salt) for run in runs)

    def removed(self, group: int, block_hash: bytes) -> None:
        if group != self._gone_group:
            self._flush()
            self._gone_group = group
        self._gone.append(block_hash)

    def cleared(self) -> None:
        self._gone.clear()
        self._events = [AllBlocksCleared()]

    def take(self) -> list[KVCacheEvent]:
        """The events since the last call."""
        self._flush()
        taken, self._events = self._events, []
        return taken

    def _stored_run(
        self, group: int, run: range, hashes: Sequence[bytes], token_ids: Sequence[int], salt: str
    ) -> BlockStored:
        size = self._block_size
        sight = self._sights[group]
        extra_keys = None
        if salt and run.start == 0:  # the first block's hash has it, and so have all that are chained from it
            extra_keys = [encode_extra_keys([salt]), *([encode_extra_keys(None)] * (len(run) - 1))]
        return BlockStored(
            block_hashes=hashes[run.start : run.stop],
            parent_block_hash=hashes[run.start - 1] if run.start else None,
            token_ids=token_ids[run.start * size : run.stop * size],
            block_size=size,
            medium=MEDIUM_DEVICE,
            extra_keys=extra_keys,
            group_idx=None if self._plain else group,
            kv_cache_spec_kind=None if self._plain else _kind(sight),
            kv_cache_spec_sliding_window=None if self._plain else sight.reach,
        )

    def _flush(self) -> None:
        if self._gone:
            group = None if self._plain else self._gone_group
            self._events.append(BlockRemoved(block_hashes=self._gone, medium=MEDIUM_DEVICE, group_idx=group))
            self._gone = []


def _kind(sight: Sight) -> str:
    """vLLM's word for it."""
    if sight.reach is None:
        return "full_attention"
    return "sliding_window" if sight.window is not None else "chunked_local_attention"
