"""`attention` in torch: online softmax over key tiles (Milakov and Gimelshein, 2018; Dao et al., 2022), in float32.

Legend: t tokens, h query heads, g KV heads, r query heads of one KV head, d head dim, n query tiles of a group, m rows
of a query tile (its tokens times r, padded), p pairs of a query tile and a key tile, x = g * p, w keys of a key tile,
s tokens per block, b bytes of a block.

Keys are widened to float32, so that scores and weights are float32 whatever the cache holds. The product of weights
and values is in the cache's dtype, as in flash attention, and tiles are merged in float32. Promise P1 needs that a
row's products do not depend on how many rows and tiles are multiplied at once: `tile_rows` finds the tile sizes for
which that is so.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Protocol

import msgspec
import torch
from torch import Tensor

from quire.ops.attention import AttentionShape, PagedRequests
from quire.ops.reference.attention_plan import (
    BLOCK_SIZES,
    AttentionPlan,
    KeyRun,
    QueryGroup,
    QueryTiling,
    plan_attention,
)
from quire.ops.reference.kv_layout import KVLayout
from quire.ops.reference.tile_rows import choose_tiling
from quire.ops.target import Target


class ReferenceAttention:
    """An `AttentionKernel` for caches of one dtype. Remembers which tile sizes may be used for a head shape."""

    block_sizes = BLOCK_SIZES
    reads_lengths = True

    def __init__(self, target: Target) -> None:
        self._layout = KVLayout(target.kv_dtype, target.dtype)
        self._tilings: dict[tuple[int, int], QueryTiling] = {}

    def block_bytes(self, block_size: int, head_dim: int) -> int:
        return self._layout.block_bytes(block_size, head_dim)

    def write(self, kv_2gnb: Tensor, k_tgd: Tensor, v_tgd: Tensor, slots_t: Tensor) -> None:
        self._layout.write(kv_2gnb, k_tgd, v_tgd, slots_t)

    def plan(self, shape: AttentionShape, requests: PagedRequests) -> AttentionPlan:
        heads = (shape.num_heads // shape.num_kv_heads, shape.head_dim)
        if heads not in self._tilings:
            self._tilings[heads] = choose_tiling(*heads, self._layout.read_dtype, requests.block_table_rb.device)
        return plan_attention(shape, self._tilings[heads], _on_host(requests))

    def __call__(self, q_thd: Tensor, kv_2gnb: Tensor, plan: AttentionPlan) -> Tensor:
        t, h, d = q_thd.shape
        out_thd = q_thd.new_empty(t + 1, h, d)
        for group in plan.groups:
            attend(q_thd, _KeysAndValues(kv_2gnb, self._layout, plan), group, out_thd)
        return out_thd[:t]


def _on_host(requests: PagedRequests) -> PagedRequests:
    """With the lengths that stand on the device. Rows without a context get keys to look at: what they find is
    nobody's."""
    if requests.lengths is None:
        return requests
    starts = requests.lengths.query_start.tolist()
    rows = (stop - start for start, stop in itertools.pairwise(starts))
    contexts = [max(1, *pair) for pair in zip(requests.lengths.context_lens.tolist(), rows, strict=True)]
    return msgspec.structs.replace(requests, query_start=starts, context_lens=contexts)


class LayerCache(Protocol):
    """What a layer's cache holds for the keys of a run, `[g * p, w, d]`; hidden keys' values are finite."""

    @property
    def shape(self) -> AttentionShape: ...

    def keys(self, run: KeyRun) -> Tensor: ...

    def values(self, run: KeyRun) -> Tensor: ...


class _KeysAndValues:
    """One layer's keys and values, with what is needed to read them."""

    def __init__(self, kv_2gnb: Tensor, layout: KVLayout, plan: AttentionPlan) -> None:
        self._kv_2gnb = kv_2gnb
        self._layout = layout
        self._block_size = plan.block_size
        self.shape = plan.shape

    def keys(self, run: KeyRun) -> Tensor:
        return self._gather(0, run)

    def values(self, run: KeyRun) -> Tensor:
        return self._gather(1, run)

    def _gather(self, which: int, run: KeyRun) -> Tensor:
        g, d = self.shape.num_kv_heads, self.shape.head_dim
        numbers = self._layout.read(self._kv_2gnb[which], run.blocks, self._block_size, d)
        return numbers.reshape(g * len(run.queries_p), run.width, d)


def attend(q_thd: Tensor, cache: LayerCache, group: QueryGroup, out_thd: Tensor) -> None:
    """Attention of one group of query tiles, written to their rows of `out_thd`, which has a row more than there are
    tokens: padding is written there."""
    shape = cache.shape
    q_gnmd = _query_tiles(q_thd, shape, group)
    sums: _Partial | None = None
    for run in group.runs:
        partial = _attend_run(q_gnmd, cache, group, run)
        first = 0
        for count in run.counts:
            tile = partial.tiles(first, first + count)
            if sums is None:
                sums = tile
            else:
                sums.merge(tile, count)
            first += count
    assert sums is not None
    if shape.sinks is not None:
        sums.add_sinks(shape)
    _store(sums.weighted_gntrd.div_(sums.total_gntr1), out_thd, group)


@dataclass(frozen=True, slots=True)
class _Partial:
    """Softmax of some keys for the real rows (r query heads of t tokens): the highest score, the sum of weights
    relative to it, and the values' sum by weight. `n` stands for query tiles, or for pairs with key tiles."""

    top_gntr1: Tensor
    total_gntr1: Tensor
    weighted_gntrd: Tensor

    def tiles(self, first: int, end: int) -> _Partial:
        return _Partial(self.top_gntr1[:, first:end], self.total_gntr1[:, first:end], self.weighted_gntrd[:, first:end])

    def merge(self, other: _Partial, count: int) -> None:
        """Take in later keys of the first `count` tiles. The order of merging is the order of positions."""
        mine = self.tiles(0, count)
        top = torch.maximum(mine.top_gntr1, other.top_gntr1)
        decay, gain = (mine.top_gntr1 - top).exp_(), (other.top_gntr1 - top).exp_()
        mine.top_gntr1.copy_(top)
        mine.total_gntr1.mul_(decay).add_(other.total_gntr1.mul_(gain))
        mine.weighted_gntrd.mul_(decay).add_(other.weighted_gntrd.mul_(gain))

    def add_sinks(self, shape: AttentionShape) -> None:
        """Each head's sink takes its share of the weight."""
        sinks_gr = self.top_gntr1.new_tensor(shape.sinks).view(shape.num_kv_heads, -1)
        sinks_gntr1 = sinks_gr[:, None, None, :, None].expand_as(self.top_gntr1)
        top = torch.maximum(self.top_gntr1, sinks_gntr1)
        decay = (self.top_gntr1 - top).exp_()
        self.total_gntr1.mul_(decay).add_((sinks_gntr1 - top).exp_())
        self.weighted_gntrd.mul_(decay)


def _query_tiles(q_thd: Tensor, shape: AttentionShape, group: QueryGroup) -> Tensor:
    """Scaled float32 queries `[g, n, m, d]`, a token's query heads side by side; padding rows are zero."""
    g, d = shape.num_kv_heads, shape.head_dim
    heads_per_group = shape.num_heads // g
    tiles = q_thd.index_select(0, group.rows_in).view(group.count, group.tokens, g, heads_per_group, d)
    q = torch.zeros(g, group.count, group.tokens, group.group_rows, d, device=q_thd.device)
    q[:, :, :, :heads_per_group] = tiles.permute(2, 0, 1, 3, 4)
    return q.mul_(shape.scale).view(g, group.count, group.tokens * group.group_rows, d)


def _attend_run(q_gnmd: Tensor, cache: LayerCache, group: QueryGroup, run: KeyRun) -> _Partial:
    """Each pair of the run by itself: softmax over the keys of its tile alone."""
    shape = cache.shape
    g, _, m, d = q_gnmd.shape
    p, w, heads = len(run.queries_p), run.width, shape.num_heads // shape.num_kv_heads
    q_xmd = q_gnmd.index_select(1, run.queries_p).view(g * p, m, d)
    scores_xmw = torch.bmm(q_xmd, cache.keys(run).float().transpose(1, 2))
    # The products want padded rows, the rest does without them.
    padded = (g, p, group.tokens, group.group_rows, -1)
    scores_gptrw = scores_xmw.view(padded)[:, :, :, :heads].contiguous()
    if shape.softcap is not None:
        scores_gptrw.div_(shape.softcap).tanh_().mul_(shape.softcap)
    if shape.slopes is not None:
        slopes_gr = scores_gptrw.new_tensor(shape.slopes).view(g, -1)
        scores_gptrw.sub_(slopes_gr[:, None, None, :, None] * run.distance_ptw[:, :, None].abs())
    if shape.distance_bias is not None:
        farthest = shape.distance_bias.farthest
        bias_hptw = shape.distance_bias.table_hf[:, run.distance_ptw.clamp(-farthest, farthest) + farthest]
        scores_gptrw.add_(bias_hptw.view(g, heads, p, -1, w).permute(0, 2, 3, 1, 4))
    if run.hidden_ptw is not None:
        scores_gptrw.masked_fill_(run.hidden_ptw[:, :, None], float("-inf"))
    # Finite, so that a row which sees no key of this tile gets weights of zero, and merging the tile changes nothing.
    top_gptr1 = scores_gptrw.amax(-1, keepdim=True).clamp_min_(torch.finfo(torch.float32).min)
    weights_gptrw = scores_gptrw.sub_(top_gptr1).exp_()
    values_xwd = cache.values(run)
    if heads == group.group_rows:
        weights_xmw = weights_gptrw.to(values_xwd.dtype).view(g * p, m, w)
    else:
        padded_weights = values_xwd.new_zeros(g, p, group.tokens, group.group_rows, w)
        padded_weights[:, :, :, :heads] = weights_gptrw
        weights_xmw = padded_weights.view(g * p, m, w)
    weighted_xmd = torch.bmm(weights_xmw, values_xwd)
    weighted_gptrd = weighted_xmd.view(padded)[:, :, :, :heads].float()
    return _Partial(top_gptr1, weights_gptrw.sum(-1, keepdim=True), weighted_gptrd)


def _store(result_gntrd: Tensor, out_thd: Tensor, group: QueryGroup) -> None:
    rows_thd = result_gntrd.permute(1, 2, 0, 3, 4).reshape(-1, *out_thd.shape[1:])
    out_thd.index_copy_(0, group.rows_out, rows_thd.to(out_thd.dtype))
