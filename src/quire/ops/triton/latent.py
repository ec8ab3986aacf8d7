"""`latent_attention` by Triton: split decodes and tiles of prompts, bit for bit alike.

Legend as in `ops.latent_attention`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from quire.core.kv_format import QUANTIZED, kv_block_bytes
from quire.ops.attention import AttentionShape, PagedRequests
from quire.ops.latent_attention import LatentShape
from quire.ops.reference.latent_attention import LatentPlan, ReferenceLatentAttention
from quire.ops.target import Target
from quire.ops.triton.attention import LARGEST, MULTIPLIED, STORED, programs_of
from quire.ops.triton.attention_plan import SPLIT, Tiling, TritonPlan, plan_attention
from quire.ops.triton.kernels.attention import combine_kernel
from quire.ops.triton.kernels.latent import latent_decode_kernel, latent_prefill_kernel, latent_write_kernel
from quire.ops.triton.launch import Launch
from quire.ops.triton.tiles import shared_bytes_of

_PART = 256
"""Numbers of a latent whose sums a program has registers for."""
_MOST_PARTS = 2
_ROOM = 96 << 10
"""Bytes of shared memory without which tiles have half as many keys."""


@dataclass(frozen=True, kw_only=True)
class TritonLatentPlan:
    """`plain` counts programs' work as for one KV head."""

    shape: LatentShape
    requests: PagedRequests
    plain: TritonPlan | None
    fallback: ReferenceLatentAttention

    @cached_property
    def reference(self) -> LatentPlan:
        """For rows that see chosen tokens alone."""
        return self.fallback.plan(self.shape, self.requests)


class TritonLatentAttention:
    """A `LatentAttentionKernel` for caches of one dtype, laid out as the reference's, which computes what has an index.

    Decodes have tiles of as many rows as prompts, some of them empty: it is memory that they wait for.
    """

    block_sizes = (2, 4, 8, 16, 32, 64, 128, 256)

    def __init__(self, target: Target) -> None:
        self._launch: Launch = target.launch
        self._reference = ReferenceLatentAttention(target)
        self._kv_dtype = target.kv_dtype
        self._quantized = target.kv_dtype in QUANTIZED
        self._stored = STORED[target.kv_dtype]
        self._multiplied = target.dtype if self._quantized or self._stored == target.dtype else torch.float32
        self._rows = 16 if self._multiplied == torch.float32 else 32
        roomy = shared_bytes_of(target) >= _ROOM
        self._keys, self._stages = (32, 4) if roomy else (16, 2)
        # Where there is less (CDNA 2 and 3), eight waves of 64 have 256 registers each: too few to widen 8-bit numbers.
        self._warps = 4 if self._quantized and not roomy else 8
        self._programs = programs_of(target)

    def block_bytes(self, block_size: int, shape: LatentShape) -> int:
        return self._reference.block_bytes(block_size, shape)

    def write(self, cache_nb: Tensor, latent_tc: Tensor, key_tp: Tensor, slots_t: Tensor) -> None:
        (t, c), p = latent_tc.shape, key_tp.shape[1]
        if not t:
            return
        latent_tc, key_tp = (x if x.stride(1) == 1 else x.contiguous() for x in (latent_tc, key_tp))
        values, scales = self._views(cache_nb)
        token_bytes = sum(kv_block_bytes(self._kv_dtype, block_size=1, head_dim=dim) for dim in (c, p))
        self._launch(
            latent_write_kernel,
            (t,),
            latent_tc,
            key_tp,
            values,
            scales,
            slots_t,
            latent_tc.stride(0),
            key_tp.stride(0),
            values.stride(0),
            scales.stride(0),
            LARGEST.get(self._kv_dtype, 1.0),
            LATENT=c,
            ROPE=p,
            BLOCK_SIZE=cache_nb.shape[1] // token_bytes,
            LATENT_PADDED=_padded(c),
            ROPE_PADDED=_padded(p),
            QUANTIZED=self._quantized,
            ROUNDED=self._stored == torch.int8,
            num_warps=1,
        )

    @staticmethod
    def reads_lengths(shape: LatentShape) -> bool:
        return shape.index is None and _parts(shape) <= _MOST_PARTS

    def plan(self, shape: LatentShape, requests: PagedRequests) -> TritonLatentPlan:
        plain = None
        if self.reads_lengths(shape):
            h, rows = shape.num_heads, self._rows
            tiling = Tiling(
                padded_dim=_parts(shape) * _part(shape),
                keys=self._keys,
                decode_rows=rows,
                decode_warps=self._warps,
                prefill_rows=max(1, rows // h) * h,
                prefill_warps=self._warps,
                num_stages=self._stages,
            )
            as_attention = AttentionShape(num_heads=h, num_kv_heads=1, head_dim=shape.latent_dim, scale=shape.scale)
            plain = plan_attention(as_attention, requests, tiling, self._launch)
        return TritonLatentPlan(shape=shape, requests=requests, plain=plain, fallback=self._reference)

    def __call__(
        self, q_thd: Tensor, cache_nb: Tensor, plan: TritonLatentPlan, chosen_tk: Tensor | None = None
    ) -> Tensor:
        plain, shape = plan.plain, plan.shape
        if plain is None or chosen_tk is not None:
            return self._reference(q_thd, cache_nb, plan.reference, chosen_tk)
        q_thd = q_thd.contiguous()
        (t, h, _), c = q_thd.shape, shape.latent_dim
        out_thc = q_thd.new_empty(t, h, c)
        values, scales = self._views(cache_nb)
        table = plain.block_table_rb
        cache = (values, scales, values.stride(0), scales.stride(0), table, table.stride(0))
        scale = shape.scale * math.log2(math.e)  # scores are in base 2
        constants = self._constants(shape, plain)
        pieces = -(-h // constants["HEADS_HERE"]) * constants["PARTS"]
        if plain.tiles is not None:
            grid = (plain.tiles.shape[0], pieces)
            self._launch(latent_prefill_kernel, grid, q_thd, out_thc, plain.tiles, *cache, scale, **constants)
        if plain.work is not None and plain.decodes:
            work = plain.work
            space = (work.partial, work.tops, work.totals, work.numbers)
            programs = max(1, min(self._programs, work.most_items * pieces))
            numbers = (work.requests, work.most_items)
            self._launch(
                latent_decode_kernel,
                (programs,),
                q_thd,
                out_thc,
                *space,
                *cache,
                scale,
                *numbers,
                programs,
                **constants,
            )
            heads_at_once = 4
            self._launch(
                combine_kernel,
                (plain.decodes, -(-h // heads_at_once)),
                out_thc,
                *space,
                q_thd,
                *numbers,
                HEADS=h,
                HEAD_DIM=c,
                D=plain.tiling.padded_dim,
                SINKS=False,
                HEADS_AT_ONCE=heads_at_once,
            )
        return out_thc

    def _constants(self, shape: LatentShape, plain: TritonPlan) -> Mapping[str, Any]:
        return {
            "HEADS": shape.num_heads,
            "HEADS_HERE": min(shape.num_heads, self._rows),
            "ROWS": self._rows,
            "LATENT": shape.latent_dim,
            "ROPE": shape.rope_dim,
            "BLOCK_SIZE": plain.block_size,
            "PART": _part(shape),
            "PARTS": _parts(shape),
            "ROPE_PADDED": _padded(shape.rope_dim),
            "TILE": plain.tiling.keys,
            "SPLIT": SPLIT,
            "QUANTIZED": self._quantized,
            "TYPE": MULTIPLIED[self._multiplied],
            "num_warps": plain.tiling.prefill_warps,
            "num_stages": plain.tiling.num_stages,
        }

    def _views(self, cache_nb: Tensor) -> tuple[Tensor, Tensor]:
        """The cache as numbers, and as scales if it has any."""
        values = cache_nb.view(self._stored)
        return values, cache_nb.view(torch.float32) if self._quantized else values


def _padded(size: int) -> int:
    return max(16, 1 << (size - 1).bit_length())


def _part(shape: LatentShape) -> int:
    return min(_PART, _padded(shape.latent_dim))


def _parts(shape: LatentShape) -> int:
    return _padded(shape.latent_dim) // _part(shape)
