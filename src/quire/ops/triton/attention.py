"""`attention` by Triton: split-KV decoding (Dao et al., Flash-Decoding, 2023) and tiles of prompts, bit for bit alike.

Legend: t tokens, h query heads, g KV heads, d head dim, r requests, n blocks, s tokens per block, b bytes of a block.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton.language as tl
from torch import Tensor

from quire.core.kv_format import QUANTIZED, kv_block_bytes
from quire.ops.attention import AttentionShape, PagedRequests
from quire.ops.target import Target
from quire.ops.triton.attention_plan import SPLIT, Tiling, TritonPlan, plan_attention
from quire.ops.triton.kernels.attention import combine_kernel, decode_kernel, prefill_kernel, write_kernel
from quire.ops.triton.launch import Launch
from quire.ops.triton.row_tile import choose_decode_rows
from quire.ops.triton.tiles import shared_bytes_of

STORED = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "int8": torch.int8,
    "fp8": torch.float8_e4m3fn,
}
LARGEST = {"int8": 127.0, "fp8": 448.0}
MULTIPLIED = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
_INTERPRETED_PROGRAMS = 3


@dataclass(frozen=True, slots=True)
class _Constants:
    """What kernels need of a shape, on the device."""

    slopes: Tensor | None
    sinks: Tensor | None
    bias: Tensor | None


class TritonAttention:
    """An `AttentionKernel` for caches of one dtype. Head dims up to 256. `row_tile`: rows that a decode is padded to;
    None finds out, once for each head shape, how few have the bits of a prefill's."""

    block_sizes = (1, 2, 4, 8, 16, 32, 64, 128, 256)
    reads_lengths = True

    def __init__(self, target: Target, *, row_tile: int | None = None) -> None:
        self._launch: Launch = target.launch
        self.target = target
        self._quantized = target.kv_dtype in QUANTIZED
        self._stored = STORED[target.kv_dtype]
        # Where the cache holds other numbers than the model has, both are widened.
        self._multiplied = target.dtype if self._quantized or self._stored == target.dtype else torch.float32
        self._row_tile = row_tile
        self._programs = programs_of(target)
        self._tilings: dict[tuple[int, int], Tiling] = {}
        self._constants: dict[AttentionShape, _Constants] = {}

    def block_bytes(self, block_size: int, head_dim: int) -> int:
        return kv_block_bytes(self.target.kv_dtype, block_size=block_size, head_dim=head_dim)

    def write(self, kv_layer: Tensor, k_tgd: Tensor, v_tgd: Tensor, slots_t: Tensor) -> None:
        t, g, d = k_tgd.shape
        if not t:
            return
        k_tgd, v_tgd = (x if x.stride(2) == 1 else x.contiguous() for x in (k_tgd, v_tgd))
        block_size = kv_layer.shape[3] // self.block_bytes(1, d)
        values, scales = self._views(kv_layer, block_size, d)
        # Few tokens: as many programs as can be. Many: each has something to do.
        tokens_at_once, num_warps = (4, 1) if t <= 64 else (32, 4)
        self._launch(
            write_kernel,
            (-(-t // tokens_at_once), g),
            k_tgd,
            v_tgd,
            values,
            scales,
            slots_t,
            t,
            *k_tgd.stride()[:2],
            *v_tgd.stride()[:2],
            *values.stride()[:3],
            *scales.stride()[:3],
            LARGEST.get(self.target.kv_dtype, 1.0),
            HEAD_DIM=d,
            BLOCK_SIZE=block_size,
            D=max(16, 1 << (d - 1).bit_length()),
            TOKENS=tokens_at_once,
            QUANTIZED=self._quantized,
            ROUNDED=self._stored == torch.int8,
            num_warps=num_warps,
        )

    def plan(self, shape: AttentionShape, requests: PagedRequests) -> TritonPlan:
        return plan_attention(shape, requests, self._tiling(shape), self._launch)

    def __call__(self, q_thd: Tensor, kv_layer: Tensor, plan: TritonPlan) -> Tensor:
        q_thd = q_thd.contiguous()
        out_thd = torch.empty_like(q_thd)
        shape, tiling = plan.shape, plan.tiling
        g, d = shape.num_kv_heads, shape.head_dim
        constants = self._constants_of(shape, q_thd.device)
        values, scales = self._views(kv_layer, plan.block_size, d)
        cache = (values[0], values[1], scales[0], scales[1], *values.stride()[1:3], *scales.stride()[1:3])
        bias = q_thd if constants.bias is None else constants.bias
        slopes = q_thd if constants.slopes is None else constants.slopes
        sinks = q_thd if constants.sinks is None else constants.sinks
        # Scores are in base 2. With a soft cap: `tanh(x)` is taken from `2 ** (2 * x * log2(e))`.
        scale, cap = shape.scale * math.log2(math.e), 0.0
        if shape.softcap is not None:
            scale, cap = 2 * scale / shape.softcap, shape.softcap * math.log2(math.e)
        numbers = (0 if shape.distance_bias is None else shape.distance_bias.farthest, scale, cap, shape.window or 0)
        table = (plan.block_table_rb, plan.block_table_rb.stride(0))
        constexprs = {
            "KV_HEADS": g,
            "GROUP": shape.num_heads // g,
            "SPLIT": SPLIT,
            "HEAD_DIM": d,
            "BLOCK_SIZE": plan.block_size,
            "D": tiling.padded_dim,
            "TILE": tiling.keys,
            "QUANTIZED": self._quantized,
            "WINDOW": shape.window is not None,
            "SOFTCAP": shape.softcap is not None,
            "SLOPES": shape.slopes is not None,
            "BIAS": shape.distance_bias is not None,
            "MULTIPLIED": MULTIPLIED[self._multiplied],
            "num_stages": tiling.num_stages,
        }
        if plan.tiles is not None:
            self._launch(
                prefill_kernel,
                (plan.tiles.shape[0], g),
                q_thd,
                out_thd,
                plan.tiles,
                *cache,
                *table,
                bias,
                slopes,
                sinks,
                *numbers,
                ROWS=tiling.prefill_rows,
                SINKS=shape.sinks is not None,
                CAUSAL=shape.causal,
                num_warps=tiling.prefill_warps,
                **constexprs,
            )
        if plan.work is not None and plan.decodes:
            work = plan.work
            programs = max(1, min(self._programs, work.most_items * g))
            space = (work.partial, work.tops, work.totals)
            self._launch(
                decode_kernel,
                (programs,),
                q_thd,
                out_thd,
                *space,
                work.numbers,
                *cache,
                *table,
                bias,
                slopes,
                *numbers,
                sinks,
                work.requests,
                work.most_items,
                programs,
                ROWS=tiling.decode_rows,
                SINKS=shape.sinks is not None,
                num_warps=tiling.decode_warps,
                **constexprs,
            )
            heads_at_once = 4
            self._launch(
                combine_kernel,
                (plan.decodes, -(-shape.num_heads // heads_at_once)),
                out_thd,
                *space,
                work.numbers,
                sinks,
                work.requests,
                work.most_items,
                HEADS=shape.num_heads,
                HEAD_DIM=d,
                D=tiling.padded_dim,
                SINKS=shape.sinks is not None,
                HEADS_AT_ONCE=heads_at_once,
            )
        return out_thd

    def _tiling(self, shape: AttentionShape) -> Tiling:
        group = shape.num_heads // shape.num_kv_heads
        key = (group, shape.head_dim)
        if key not in self._tilings:
            tiling = Tiling.of(group, shape.head_dim, self._multiplied, quantized=self._quantized)
            tiling = tiling.within(shared_bytes_of(self.target), self._multiplied.itemsize)
            device = self.target.device
            if self._row_tile is not None:
                tiling = tiling.with_decode_rows(self._row_tile)
            elif device.type != "cpu":
                if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
                    # Nothing can be tried out here; as many rows as a prefill has are always right.
                    return tiling.with_decode_rows(tiling.prefill_rows)
                tiling = choose_decode_rows(lambda rows: TritonAttention(self.target, row_tile=rows), tiling, group)
            self._tilings[key] = tiling
        return self._tilings[key]

    def _constants_of(self, shape: AttentionShape, device: torch.device) -> _Constants:
        if shape not in self._constants:
            bias = None if shape.distance_bias is None else shape.distance_bias.table_hf
            self._constants[shape] = _Constants(
                slopes=_in_base_2(shape.slopes, device),
                sinks=_in_base_2(shape.sinks, device),
                bias=None if bias is None else bias.to(device=device, dtype=torch.float32).contiguous(),
            )
        return self._constants[shape]

    def _views(self, kv_2gnb: Tensor, block_size: int, head_dim: int) -> tuple[Tensor, Tensor]:
        """The cache as numbers, and as scales, from the first block's first one."""
        values = kv_2gnb.view(self._stored)
        if not self._quantized:
            return values, values
        return values, kv_2gnb.view(torch.float32)[..., block_size * (head_dim + head_dim % 2) // 4 :]


def programs_of(target: Target) -> int:
    """Of a decode. Two fit a multiprocessor, and one's loads run while the other computes."""
    if target.device.type == "cuda":
        return 2 * int(torch.cuda.get_device_properties(target.device).multi_processor_count)
    if target.device.type == "xpu":
        return 2 * int(torch.xpu.get_device_properties(target.device).max_compute_units)
    return _INTERPRETED_PROGRAMS


def _in_base_2(values: tuple[float, ...] | None, device: torch.device) -> Tensor | None:
    if values is None:
        return None
    return (torch.tensor(values, dtype=torch.float64) * math.log2(math.e)).float().to(device)
