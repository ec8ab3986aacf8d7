"""`latent_attention` in torch: the reference's attention, with one KV head that all query heads share.

Legend as in `ops.latent_attention`; g is 1, p pairs of a query tile and a key tile, w keys of a key tile.

A block holds its tokens' latents, then their rotated keys, each as `kv_layout` has them: in 8 bits each has a scale of
its own, since they differ in size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quire.ops.attention import AttentionShape, PagedRequests
from quire.ops.latent_attention import LatentShape
from quire.ops.reference.attention import attend
from quire.ops.reference.attention_plan import BLOCK_SIZES, AttentionPlan, KeyRun, QueryTiling, plan_attention
from quire.ops.reference.kv_layout import KVLayout
from quire.ops.reference.latent_index import only_chosen
from quire.ops.reference.tile_rows import choose_tiling
from quire.ops.target import Target


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentPlan:
    shape: LatentShape
    attention: AttentionPlan


class ReferenceLatentAttention:
    """A `LatentAttentionKernel` for caches of one dtype. Remembers which tile sizes may be used for a shape."""

    block_sizes = BLOCK_SIZES[1:]  # the scales of one token alone would not lie at a multiple of their size

    def __init__(self, target: Target) -> None:
        self._layout = KVLayout(target.kv_dtype, target.dtype)
        self._tilings: dict[tuple[int, int, int], QueryTiling] = {}

    @staticmethod
    def reads_lengths(_shape: LatentShape) -> bool:
        return False

    def block_bytes(self, block_size: int, shape: LatentShape) -> int:
        return sum(self._layout.block_bytes(block_size, dim) for dim in (shape.latent_dim, shape.rope_dim))

    def write(self, cache_nb: Tensor, latent_tc: Tensor, key_tp: Tensor, slots_t: Tensor) -> None:
        sound_t1 = latent_tc.isfinite().all(dim=-1, keepdim=True)
        dims = latent_tc.shape[1], key_tp.shape[1]
        block_size = cache_nb.shape[1] // sum(self._layout.block_bytes(1, dim) for dim in dims)
        latents_1nb, keys_1nb = self._sections(cache_nb, block_size, dims[0])
        self._layout.write_rows(latents_1nb, latent_tc.masked_fill(~sound_t1, 0.0)[:, None], slots_t)
        self._layout.write_rows(keys_1nb, key_tp.masked_fill(~sound_t1, torch.nan)[:, None], slots_t)

    def plan(self, shape: LatentShape, requests: PagedRequests) -> LatentPlan:
        key = shape.num_heads, shape.width, shape.latent_dim
        if key not in self._tilings:
            self._tilings[key] = choose_tiling(
                shape.num_heads,
                shape.width,
                self._layout.read_dtype,
                requests.block_table_rb.device,
                value_dim=shape.latent_dim,
            )
        as_attention = AttentionShape(
            num_heads=shape.num_heads, num_kv_heads=1, head_dim=shape.width, scale=shape.scale
        )
        return LatentPlan(shape=shape, attention=plan_attention(as_attention, self._tilings[key], requests))

    def __call__(self, q_thd: Tensor, cache_nb: Tensor, plan: LatentPlan, chosen_tk: Tensor | None = None) -> Tensor:
        t, h, _ = q_thd.shape
        out_thc = q_thd.new_empty(t + 1, h, plan.shape.latent_dim)
        sections = self._sections(cache_nb, plan.attention.block_size, plan.shape.latent_dim)
        for group in plan.attention.groups:
            seen = group if chosen_tk is None else only_chosen(group, chosen_tk)
            attend(q_thd, _Latents(sections, self._layout, plan), seen, out_thc)
        return out_thc[:t]

    def _sections(self, cache_nb: Tensor, block_size: int, latent_dim: int) -> tuple[Tensor, Tensor]:
        """Views of the latents and of the keys, `[1, n, bytes]`."""
        end = self._layout.block_bytes(block_size, latent_dim)
        return cache_nb[None, :, :end], cache_nb[None, :, end:]


class _Latents:
    """One layer's latents and keys, with what is needed to read them."""

    def __init__(self, sections: tuple[Tensor, Tensor], layout: KVLayout, plan: LatentPlan) -> None:
        self._latents_1nb, self._keys_1nb = sections
        self._layout = layout
        self._latent = plan.shape
        self._block_size = plan.attention.block_size
        self.shape = plan.attention.shape

    def keys(self, run: KeyRun) -> Tensor:
        rotated_pwr = self._gather(self._keys_1nb, run, self._latent.rope_dim)
        return torch.cat([self.values(run), rotated_pwr], dim=-1)

    def values(self, run: KeyRun) -> Tensor:
        return self._gather(self._latents_1nb, run, self._latent.latent_dim)

    def _gather(self, cache_1nb: Tensor, run: KeyRun, dim: int) -> Tensor:
        numbers = self._layout.read(cache_1nb, run.blocks, self._block_size, dim)
        return numbers.reshape(len(run.queries_p), run.width, dim)
