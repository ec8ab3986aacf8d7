"""Steps that compute prompts, over buffers of a few sizes, so that a small model's can be captured.

Where a forward pass takes the device less time than the host takes to launch it, a graph that also computes some rows
for nobody is faster. The sampling behind it is launched as ever: it is a few kernels, and differs from step to step.

Legend: t tokens of a step, padded; r requests, padded; b blocks of the longest request.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from quire.engine.graphs import Graphs
from quire.models.model import Model
from quire.nn.batch import ForwardBatch, GroupTable
from quire.nn.kv import KVCache
from quire.ops.attention import DeviceLengths
from quire.ops.moving import to_device

CHUNKS = 16
"""Requests of a padded step that compute other than one row, at most; what is padded counts as one. Each adds a tile to
what attention launches."""
_SMALLEST = 32
_LAUNCHES_PER_LAYER = 10
_SECONDS_PER_LAUNCH = 12e-6
_FLOPS_PER_SECOND = 400e12
"""Of matrix products in 16 bits on a GPU of today, as they are reached."""


def most_padded(elements_per_row: int, num_layers: int, most: int) -> int:
    """The largest step, of `most` tokens at most, that is launched more slowly than it is computed. `elements_per_row`:
    weights that a token meets. 0 if none is."""
    launching = num_layers * _LAUNCHES_PER_LAYER * _SECONDS_PER_LAUNCH
    tokens = int(launching * _FLOPS_PER_SECOND / (2 * elements_per_row))
    return max((size for size in token_buckets(most) if size <= tokens), default=0)


def token_buckets(most: int) -> list[int]:
    """Tokens that steps are padded to: 32, 48, 64, 96, 128 and so on, the last `most` or less."""
    powers = range(_SMALLEST.bit_length() - 1, most.bit_length())
    return [size for power in powers for size in (1 << power, 3 << (power - 1)) if size <= most]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Group:
    """Buffers of one group of layers."""

    slots_t: Tensor
    table_rb: Tensor


class PaddedSteps:
    """Of `tokens` tokens at most, for so many `requests` at most, each no longer than `longest`."""

    def __init__(self, model: Model, kv: KVCache, graphs: Graphs, *, tokens: int, requests: int, longest: int) -> None:
        self._model = model
        self._kv = kv
        self._graphs = graphs
        self._longest = longest
        self._sizes = token_buckets(tokens)
        self._device = kv.data.device
        self._places = requests + 1
        """The last one is of the rows that are padding."""

        def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(*shape, dtype=dtype, device=self._device)

        self._ids_t, self._positions_t = zeros(2, tokens)
        blocks = -(-longest // kv.block_size)
        self._groups = [
            _Group(slots_t=zeros(tokens), table_rb=zeros(self._places, blocks)) for _ in range(kv.num_groups)
        ]
        self._rows_r = zeros(self._places)
        self._lengths = zeros(2 * self._places + 1, dtype=torch.int32)
        self._hidden_rh: Tensor | None = None

    def takes(self, batch: ForwardBatch) -> bool:
        """Whether `forward` can compute it."""
        others = sum(stop - start != 1 for start, stop in pairwise(batch.query_start))
        return (
            len(batch.token_ids_t) <= self._sizes[-1]
            and max(len(batch.context_lens), len(batch.logits_rows_s)) < self._places
            and others < CHUNKS
            and batch.token_types_t is None
        )

    def forward(self, batch: ForwardBatch) -> Tensor:
        """As `Model.forward`, to the same bits. The next call overwrites it."""
        size = next(size for size in self._sizes if size >= len(batch.token_ids_t))
        self._fill(batch, size)
        work = self._work(size)
        if not self._graphs.has(("padded", size)):
            self._graphs.capture(("padded", size), work)  # trying it out writes what will be written anyway
        self._graphs.run(("padded", size), work)
        assert self._hidden_rh is not None
        return self._hidden_rh[: len(batch.logits_rows_s)]

    def captures(self) -> Sequence[Callable[[], None]]:
        """What captures each size that has not been, the largest first. Nobody's steps: of padding alone."""
        return [partial(self._capture, size) for size in reversed(self._sizes)]

    def _capture(self, size: int) -> None:
        if not self._graphs.has(("padded", size)):
            self._lengths.zero_()
            self._lengths[self._places] = size
            for group in self._groups:
                group.slots_t.zero_()
            self._rows_r.zero_()
            self._graphs.capture(("padded", size), self._work(size))

    def _fill(self, batch: ForwardBatch, size: int) -> None:
        tokens, requests = len(batch.token_ids_t), len(batch.context_lens)
        self._ids_t[:tokens].copy_(batch.token_ids_t)
        self._positions_t[:tokens].copy_(batch.positions_t)
        tables: list[ForwardBatch | GroupTable] = [batch, *batch.later_groups]
        for group, given in zip(self._groups, tables, strict=True):
            group.slots_t[:tokens].copy_(given.slots_t)
            group.slots_t[tokens:size].zero_()
            rows, width = given.block_table_rb.shape
            group.table_rb[:rows, :width].copy_(given.block_table_rb)
        rows = len(batch.logits_rows_s)
        self._rows_r[:rows].copy_(batch.logits_rows_s)
        self._rows_r[rows:].zero_()
        lengths = np.zeros(2 * self._places + 1, np.int32)
        lengths[: requests + 1] = batch.query_start
        lengths[requests + 1 : self._places] = tokens
        lengths[self._places] = size
        lengths[self._places + 1 :][:requests] = batch.context_lens
        self._lengths.copy_(to_device(torch.from_numpy(lengths), self._device))

    def _work(self, size: int) -> Callable[[], None]:
        return partial(self._forward, size)

    @torch.inference_mode()
    def _forward(self, size: int) -> None:
        first, *later = (
            GroupTable(slots_t=group.slots_t[:size], block_table_rb=group.table_rb) for group in self._groups
        )
        batch = ForwardBatch(
            token_ids_t=self._ids_t[:size],
            positions_t=self._positions_t[:size],
            slots_t=first.slots_t,
            query_start=[*[0] * self._places, size],
            context_lens=[self._longest] * self._places,
            block_table_rb=first.block_table_rb,
            logits_rows_s=self._rows_r,
            later_groups=later,
            lengths=DeviceLengths(
                query_start=self._lengths[: self._places + 1],
                context_lens=self._lengths[self._places + 1 :],
                chunks=CHUNKS,
            ),
        )
        hidden_rh = self._model.forward(batch, self._kv)
        if self._hidden_rh is None:  # the first time, when nothing is captured yet
            self._hidden_rh = torch.empty_like(hidden_rh)
        self._hidden_rh.copy_(hidden_rh)
