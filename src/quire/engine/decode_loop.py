"""Decode steps that the device does by itself: from the token drawn last to the next one, for all seats at once.

Legend: s seats of the step, v vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from quire.cache.ledger import HEAD_ROWS
from quire.engine.graphs import Graphs
from quire.engine.seats import Seats
from quire.models.decoder import Decoder
from quire.models.model import Model
from quire.nn.attention import Attention, AttentionBlock
from quire.nn.batch import ForwardBatch, GroupTable
from quire.nn.kv import KVCache
from quire.nn.latent import LatentAttention
from quire.nn.layers import MLP, PlainMLP
from quire.nn.moe import SparseMLP
from quire.ops.attention import DeviceLengths
from quire.sched.state import ScheduledChunk

_BUCKETS = (1, 2, 4, 8, 16)
_BUCKET_STEP = 16


def buckets(most: int) -> list[int]:
    """How many seats a captured step runs over: rising, the last at least `most`."""
    steps = range(_BUCKETS[-1] + _BUCKET_STEP, most + _BUCKET_STEP, _BUCKET_STEP)
    found = [*_BUCKETS, *steps]
    end = next(index for index, size in enumerate(found) if size >= most)
    return [min(size, most) for size in found[: end + 1]]


class DecodeLoop:
    """Over `seats`, with graphs for as many of them as take part. `longest`: tokens of the longest request."""

    def __init__(self, model: Model, kv: KVCache, seats: Seats, graphs: Graphs, longest: int) -> None:
        self._model = model
        self._kv = kv
        self._seats = seats
        self._graphs = graphs
        self._longest = longest
        self._sizes = buckets(len(seats.token_s))
        self._has_run = False
        device = seats.token_s.device
        self._starts = torch.arange(len(seats.token_s) + 1, dtype=torch.int32, device=device)
        self._rows = torch.arange(len(seats.token_s), dtype=torch.int64, device=device)

    @staticmethod
    def takes(chunks: Sequence[ScheduledChunk]) -> bool:
        """Whether these are decoded without the host: one token each, sampled by what a seat knows."""
        return all(
            chunk.num_tokens == 1
            and chunk.samples
            and not chunk.first_slot_cached
            and chunk.state.request.token_type_ids is None
            and chunk.state.drawable
            for chunk in chunks
        )

    def step(self, chunks: Sequence[ScheduledChunk]) -> tuple[list[int], Tensor]:
        """Each chunk's place in the tokens drawn, and these, `[s]`; the next step changes them."""
        seats, end = self._seats.prepare(chunks)
        size = next(size for size in self._sizes if size >= end)
        if not self._graphs.has(("decode", size)):
            self._capture(size)
            self._seats.prepare(chunks)
        self._graphs.run(("decode", size), partial(self._decode, size))
        self._seats.advance(seats)
        return seats, self._seats.token_s[:size]

    def captures(self) -> Sequence[Callable[[], None]]:
        """What captures each size that has not been: the largest first, so that buffers which kernels keep for
        themselves are large enough from then on; then from the smallest on."""
        return [partial(self._capture, size) for size in (self._sizes[-1], *self._sizes[:-1])]

    def _capture(self, size: int) -> None:
        if self._graphs.has(("decode", size)):
            return
        self._seats.empty()  # so that trying it out changes nothing
        if not self._has_run:
            self._decode(self._sizes[-1])
            self._has_run = True
        self._graphs.capture(("decode", size), partial(self._decode, size))

    @torch.inference_mode()
    def _decode(self, size: int) -> None:
        """Seats of length 0 write to the null block, and what they find is dropped."""
        seats, block_size = self._seats, self._kv.block_size
        length_s, token_s = seats.length_s[:size], seats.token_s[:size]
        runs_s = length_s > 0
        position_s = (length_s - 1).clamp_(min=0).long()
        groups = [self._table(table_sb[:size], position_s, runs_s, block_size) for table_sb in seats.tables_sb]
        batch = ForwardBatch(
            token_ids_t=token_s.clamp(min=0),  # what is not finite was drawn as a negative number
            positions_t=position_s,
            slots_t=groups[0].slots_t,
            query_start=range(size + 1),
            context_lens=[self._longest] * size,
            block_table_rb=groups[0].block_table_rb,
            logits_rows_s=self._rows[:size],
            later_groups=groups[1:],
            lengths=DeviceLengths(query_start=self._starts[: size + 1], context_lens=length_s),
        )
        hidden_sh = self._model.forward(batch, self._kv)
        for first in range(0, size, HEAD_ROWS):
            rows = slice(first, min(first + HEAD_ROWS, size))
            logits_sv = self._model.logits(hidden_sh[rows])
            drawn_s = self._model.kernels.draw(logits_sv, seats.params[rows], length_s[rows].long())
            token_s[rows] = torch.where(runs_s[rows], drawn_s, token_s[rows])
        length_s += runs_s

    @staticmethod
    def _table(table_sb: Tensor, position_s: Tensor, runs_s: Tensor, block_size: int) -> GroupTable:
        block_s = table_sb.gather(1, (position_s // block_size)[:, None])[:, 0]
        slots_s = block_s * block_size + position_s % block_size
        return GroupTable(slots_t=slots_s.masked_fill(~runs_s, 0), block_table_rb=table_sb)


def runs_alone(model: Model) -> bool:
    """Whether a decode step of this model never looks at the host's numbers, and can be captured."""
    if not isinstance(model, Decoder) or model.pooling is not None:
        return False
    if model.stack is not None:
        return model.stack.reads_lengths
    return all(_reads_lengths(model, layer.attention) and _is_one_call(layer.mlp) for layer in model.layers)


def _reads_lengths(model: Decoder, attention: AttentionBlock) -> bool:
    if attention.transform.chunk is not None:
        return False
    match attention:
        case Attention():
            return model.kernels.attention.reads_lengths
        case LatentAttention():
            return model.kernels.latent_attention.reads_lengths(attention.shape)
        case _:
            return False


def _is_one_call(mlp: Callable[[Tensor], Tensor]) -> bool:
    return isinstance(mlp, MLP | PlainMLP) or (isinstance(mlp, SparseMLP) and mlp.is_one_call)
