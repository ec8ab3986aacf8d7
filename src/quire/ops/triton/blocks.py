"""Copies of KV blocks on the device, for forks of a sequence and for compaction.

Legend: l layers, p parts (keys and values), h KV heads, n blocks, b bytes of a block, m pairs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quire.ops.target import Target
from quire.ops.triton.kernels.blocks import copy_blocks_kernel
from quire.ops.triton.launch import Launch
from quire.ops.triton.row_view import next_power_of_2

_WORD = 4
_PIECE = 2048
"""Words of one program: 8 KiB, four 16-byte loads of a thread."""
_MOST_PAIRS = 65535
"""Of one launch: a grid's second dimension."""


class TritonBlocks:
    def __init__(self, target: Target) -> None:
        self._launch: Launch = target.launch

    def copy(self, source_lphnb: Tensor, destination_lphnb: Tensor, pairs_m2: Tensor) -> None:
        """Block `pairs_m2[:, 0]` of the source goes to block `pairs_m2[:, 1]` of the destination, in all layers.

        Both are uint8 on the device, and may be one tensor; so are the pairs, in int64. All copies are made at once:
        no block is written by two pairs, and none is read that another pair writes. A pair with a number that is no
        block's (-1) is passed over, so that a captured graph may have fewer pairs than places for them.
        """
        assert source_lphnb.shape[:3] == destination_lphnb.shape[:3]
        assert source_lphnb.shape[4] == destination_lphnb.shape[4]
        word = torch.int32 if _in_words(source_lphnb) and _in_words(destination_lphnb) else torch.uint8
        source, destination = source_lphnb.view(word), destination_lphnb.view(word)
        layers, parts, heads, source_n, words = source.shape
        block = min(_PIECE, next_power_of_2(words))
        for pairs in torch.split(pairs_m2.contiguous(), _MOST_PAIRS):
            if not len(pairs) or not source.numel():
                continue
            self._launch(
                copy_blocks_kernel,
                (layers * parts * heads, len(pairs), -(-words // block)),
                source,
                destination,
                pairs,
                parts,
                heads,
                source_n,
                destination.shape[3],
                words,
                *source.stride()[:4],
                *destination.stride()[:4],
                BLOCK=block,
            )


def _in_words(cache: Tensor) -> bool:
    """Whether every block begins at a whole word, and ends at one."""
    places = (cache.storage_offset(), cache.shape[-1], *cache.stride()[:-1])
    return all(place % _WORD == 0 for place in places) and cache.data_ptr() % _WORD == 0
