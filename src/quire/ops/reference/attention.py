"""`attention` in torch: online softmax over key tiles (Milakov and Gimelshein, 2018; Dao et al., 2022), in float32.

Legend: t tokens, h query heads, g KV heads, d head dim, n query tiles of a group, m rows of a query tile (its tokens
times the query heads of one KV head), w keys of a key tile, s tokens per block.

Keys and values are gathered tile by tile and widened to float32, so that scores and sums are float32 whatever the
cache holds. Promise P1 needs that a row's products do not depend on how many rows and tiles are multiplied at once:
`tile_rows` finds the tile sizes for which that is so.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quire.ops.attention import AttentionShape, PagedRequests
from quire.ops.reference.attention_plan import (
    BLOCK_SIZES,
    AttentionPlan,
    KeyTile,
    QueryGroup,
    QueryTiling,
    plan_attention,
)
from quire.ops.reference.tile_rows import choose_tiling


class ReferenceAttention:
    """An `AttentionKernel`. Remembers which tile sizes may be used for a head shape."""

    block_sizes = BLOCK_SIZES

    def __init__(self) -> None:
        self._tilings: dict[tuple[int, int], QueryTiling] = {}

    def plan(self, shape: AttentionShape, requests: PagedRequests) -> AttentionPlan:
        heads = (shape.num_heads // shape.num_kv_heads, shape.head_dim)
        if heads not in self._tilings:
            self._tilings[heads] = choose_tiling(*heads, requests.block_table_rb.device)
        return plan_attention(shape, self._tilings[heads], requests)

    def __call__(self, q_thd: Tensor, kv_2gnsd: Tensor, plan: AttentionPlan) -> Tensor:
        t, h, d = q_thd.shape
        # One row more than there are tokens: padding is written there.
        out_thd = q_thd.new_empty(t + 1, h, d)
        for group in plan.groups:
            _attend(q_thd, kv_2gnsd, plan.shape, group, out_thd)
        return out_thd[:t]


def _attend(q_thd: Tensor, kv_2gnsd: Tensor, shape: AttentionShape, group: QueryGroup, out_thd: Tensor) -> None:
    """Attention of one group of query tiles, written to their rows of `out_thd`."""
    q_gnmd = _query_tiles(q_thd, shape, group)
    first, *others = group.key_tiles
    scores_gnmw = _scores(q_gnmd, kv_2gnsd, first, group)
    top_gnm1 = scores_gnmw.amax(-1, keepdim=True)
    weights_gnmw = scores_gnmw.sub_(top_gnm1).exp_()
    total_gnm1 = weights_gnmw.sum(-1, keepdim=True)
    sum_gnmd = _weighted(weights_gnmw, kv_2gnsd, first)
    for tile in others:
        scores_gnmw = _scores(q_gnmd, kv_2gnsd, tile, group)
        top, total, acc = top_gnm1[:, : tile.count], total_gnm1[:, : tile.count], sum_gnmd[:, : tile.count]
        new_top = torch.maximum(top, scores_gnmw.amax(-1, keepdim=True))
        decay = (top - new_top).exp_()
        weights_gnmw = scores_gnmw.sub_(new_top).exp_()
        top.copy_(new_top)
        total.mul_(decay).add_(weights_gnmw.sum(-1, keepdim=True))
        acc.mul_(decay).add_(_weighted(weights_gnmw, kv_2gnsd, tile))
    _store(sum_gnmd.div_(total_gnm1), shape, group, out_thd)


def _query_tiles(q_thd: Tensor, shape: AttentionShape, group: QueryGroup) -> Tensor:
    """Scaled float32 queries `[g, n, m, d]`, a token's query heads side by side; padding rows are zero."""
    g, d = shape.num_kv_heads, shape.head_dim
    heads_per_group = shape.num_heads // g
    tiles = q_thd.index_select(0, group.rows_in).view(group.count, group.tokens, g, heads_per_group, d)
    q = torch.zeros(g, group.count, group.tokens, group.group_rows, d, device=q_thd.device)
    q[:, :, :, :heads_per_group] = tiles.permute(2, 0, 1, 3, 4)
    return q.mul_(shape.scale).view(g, group.count, group.tokens * group.group_rows, d)


def _scores(q_gnmd: Tensor, kv_2gnsd: Tensor, tile: KeyTile, group: QueryGroup) -> Tensor:
    g, _, m, d = q_gnmd.shape
    k_xwd = _gather(kv_2gnsd[0], tile)
    q_xmd = q_gnmd[:, : tile.count].reshape(g * tile.count, m, d)
    scores_gnmw = torch.bmm(q_xmd, k_xwd.transpose(1, 2)).view(g, tile.count, m, tile.width)
    if tile.hidden_ntw is not None:
        by_token = scores_gnmw.view(g, tile.count, group.tokens, group.group_rows, tile.width)
        by_token.masked_fill_(tile.hidden_ntw[:, :, None], float("-inf"))
    return scores_gnmw


def _weighted(weights_gnmw: Tensor, kv_2gnsd: Tensor, tile: KeyTile) -> Tensor:
    """Sum of values by weight `[g, n, m, d]`. Hidden keys have weight zero, and their values are finite: `kv_write`."""
    g, n, m, w = weights_gnmw.shape
    v_xwd = _gather(kv_2gnsd[1], tile)
    return torch.bmm(weights_gnmw.view(g * n, m, w), v_xwd).view(g, n, m, -1)


def _gather(cache_gnsd: Tensor, tile: KeyTile) -> Tensor:
    """A tile's keys or values `[g * n, w, d]` in float32."""
    g, _, _, d = cache_gnsd.shape
    return cache_gnsd.index_select(1, tile.blocks).view(g * tile.count, tile.width, d).float()


def _store(result_gnmd: Tensor, shape: AttentionShape, group: QueryGroup, out_thd: Tensor) -> None:
    g, d = shape.num_kv_heads, shape.head_dim
    by_token = result_gnmd.view(g, group.count, group.tokens, group.group_rows, d)
    rows_thd = by_token[:, :, :, : shape.num_heads // g].permute(1, 2, 0, 3, 4).reshape(-1, shape.num_heads, d)
    out_thd.index_copy_(0, group.rows_out, rows_thd.to(out_thd.dtype))
