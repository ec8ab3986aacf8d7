"""`attention` by Triton. See `kernels.attention` for how a row's sums are ordered.

Legend: t tokens, h query heads, g KV heads, d head dim, r requests, n those that decode, b bytes of a block.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quire.core.kv_format import QUANTIZED, kv_block_bytes
from quire.ops.attention import AttentionShape, PagedRequests
from quire.ops.target import Target
from quire.ops.triton.kernels.attention import (
    combine_kernel,
    decode_kernel,
    plan_kernel,
    prefill_kernel,
    write_kernel,
)
from quire.ops.triton.launch import Launch
from quire.ops.triton.row_view import next_power_of_2

SPLIT = 256
"""Tokens of a context that a decoding row folds as one; half a block of the largest size at least."""
MOST_ITEMS = 2048
"""Splits of a step whose results are kept apart. Where there are more, there is work enough for all processors without
cutting contexts, and a program walks through the whole of one."""
PROGRAMS_PER_PROCESSOR = 4
_PROCESSORS_OF_NO_GPU = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Tensors:
    """What a shape adds to scores, float32; empty where it does not."""

    slopes_h: Tensor
    bias_hf: Tensor
    sinks_h: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class TritonPlan:
    """`request_ids`: those that decode. `items`: (header, request of each item, its split, first item of each request,
    its first split). `tiles`: (request, first row) of each tile of rows of those that do not decode."""

    shape: AttentionShape
    requests: PagedRequests
    added: Tensors
    query_start: Tensor
    context_lens: Tensor
    request_ids: Tensor
    items: tuple[Tensor, ...]
    most_items: int
    tile_request: Tensor
    tile_row: Tensor
    part_ml: Tensor
    part_acc: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Tiling:
    """`few`: rows of a program that decodes one request, `many`: of one that does not; `width`: keys of a tile."""

    few: int
    many: int
    width: int
    columns: int


class TritonAttention:
    """`AttentionKernel` for a cache in the layout of `ops.reference.kv_layout`."""

    block_sizes = (8, 16, 32, 64, 128, 256)
    reads_lengths = True

    def __init__(self, target: Target) -> None:
        self._launch: Launch = target.launch
        self._device = target.device
        self._dtype = target.dtype
        self._kv_dtype = target.kv_dtype
        self._added: dict[AttentionShape, Tensors] = {}
        if target.device.type == "cuda":
            processors = torch.cuda.get_device_properties(target.device).multi_processor_count
        else:
            processors = _PROCESSORS_OF_NO_GPU
        self._programs = PROGRAMS_PER_PROCESSOR * processors

    def block_bytes(self, block_size: int, head_dim: int) -> int:
        return kv_block_bytes(self._kv_dtype, block_size=block_size, head_dim=head_dim)

    def write(self, kv_layer: Tensor, k_tgd: Tensor, v_tgd: Tensor, slots_t: Tensor) -> None:
        t, g, d = k_tgd.shape
        if not t:
            return
        k_tgd, v_tgd = (x if x.stride(-1) == 1 else x.contiguous() for x in (k_tgd, v_tgd))
        cache, scales = self._views(kv_layer)
        self._launch(
            write_kernel,
            (t, g, 2),
            k_tgd,
            v_tgd,
            cache,
            scales,
            slots_t,
            d,
            d + d % 2,
            kv_layer.shape[-1] // self.block_bytes(1, d),
            *k_tgd.stride()[:2],
            *v_tgd.stride()[:2],
            *cache.stride()[:3],
            D=max(16, next_power_of_2(d)),
            KV=self._form,
            num_warps=1 if d <= 128 else 2,
        )

    def plan(self, shape: AttentionShape, requests: PagedRequests) -> TritonPlan:
        """Reads nothing from the device. With `requests.lengths`, nothing from the host's numbers but how many and how
        long at most."""
        tiling = tiling_of(shape)
        lengths = requests.lengths
        if lengths is None:
            query_start, context_lens, request_ids, tile_request, tile_row = self._uploaded(requests, tiling, shape)
        else:
            query_start, context_lens = lengths.query_start, lengths.context_lens
            request_ids = torch.arange(len(context_lens), dtype=torch.int32, device=self._device)
            tile_request = tile_row = request_ids[:0]
        n = len(request_ids)
        most = max(MOST_ITEMS, n)
        longest = max(requests.context_lens, default=0)
        kept = min(most, n * -(-longest // SPLIT))
        items = self._room(2, torch.int32), *(self._room(size, torch.int32) for size in (most, most, n, n))
        plan = TritonPlan(
            shape=shape,
            requests=requests,
            added=self._tensors(shape),
            query_start=query_start,
            context_lens=context_lens,
            request_ids=request_ids,
            items=items,
            most_items=most,
            tile_request=tile_request,
            tile_row=tile_row,
            part_ml=self._room(kept * shape.num_kv_heads * 2 * tiling.few, torch.float32),
            part_acc=self._room(kept * shape.num_kv_heads * tiling.few * tiling.columns, torch.float32),
        )
        if n:
            self._launch(
                plan_kernel,
                (n,),
                context_lens,
                request_ids,
                *items,
                n,
                shape.window or 0,
                most,
                SPLIT=SPLIT,
                WINDOW=shape.window is not None,
                N=next_power_of_2(n),
            )
        return plan

    def __call__(self, q_thd: Tensor, kv_layer: Tensor, plan: TritonPlan) -> Tensor:
        shape, tiling = plan.shape, tiling_of(plan.shape)
        q_thd = q_thd if q_thd.stride(-1) == 1 else q_thd.contiguous()
        out_thd = torch.empty(q_thd.shape, dtype=q_thd.dtype, device=q_thd.device)
        cache, scales = self._views(kv_layer)
        caches = cache[0], cache[1], scales[0], scales[1]
        table = plan.requests.block_table_rb
        strides = (*q_thd.stride()[:2], *out_thd.stride()[:2], *cache.stride()[1:3], table.stride(0))
        farthest = 0 if shape.distance_bias is None else shape.distance_bias.farthest
        numbers = (shape.scale, shape.softcap or 0.0, shape.window or 0, farthest, shape.head_dim + shape.head_dim % 2)
        added = plan.added
        constants: dict[str, Any] = {
            "GROUP": shape.num_heads // shape.num_kv_heads,
            "S": plan.requests.block_size,
            "SPLIT": SPLIT,
            "TILE": tiling.width,
            "D": tiling.columns,
            "CAUSAL": shape.causal,
            "WINDOW": shape.window is not None,
            "SOFTCAP": shape.softcap is not None,
            "SLOPES": shape.slopes is not None,
            "BIAS": shape.distance_bias is not None,
            "SINKS": shape.sinks is not None,
            "KV": self._form,
        }
        if len(plan.tile_request):
            self._launch(
                prefill_kernel,
                (shape.num_kv_heads, len(plan.tile_request)),
                q_thd,
                *caches,
                table,
                plan.query_start,
                plan.context_lens,
                plan.tile_request,
                plan.tile_row,
                added.slopes_h,
                added.bias_hf,
                added.sinks_h,
                out_thd,
                shape.head_dim,
                *strides,
                *numbers,
                **constants,
                M=tiling.many,
                num_warps=8 if tiling.many * tiling.columns >= 128 * 128 else 4,
                num_stages=2,
            )
        n = len(plan.request_ids)
        if n:
            header, item_request, item_split, first_item, first_split = plan.items
            self._launch(
                decode_kernel,
                (min(self._programs, max(1, plan.most_items * shape.num_kv_heads)),),
                q_thd,
                *caches,
                table,
                plan.query_start,
                plan.context_lens,
                plan.request_ids,
                header,
                item_request,
                item_split,
                first_split,
                added.slopes_h,
                added.bias_hf,
                added.sinks_h,
                out_thd,
                plan.part_ml,
                plan.part_acc,
                shape.head_dim,
                *strides,
                *numbers,
                **constants,
                HEADS=shape.num_kv_heads,
                M=tiling.few,
                num_warps=4,
                num_stages=3,
            )
            self._launch(
                combine_kernel,
                (n, shape.num_kv_heads),
                plan.query_start,
                plan.context_lens,
                plan.request_ids,
                header,
                first_item,
                first_split,
                added.sinks_h,
                out_thd,
                plan.part_ml,
                plan.part_acc,
                shape.head_dim,
                *out_thd.stride()[:2],
                GROUP=constants["GROUP"],
                HEADS=shape.num_kv_heads,
                SPLIT=SPLIT,
                D=tiling.columns,
                M=tiling.few,
                SINKS=constants["SINKS"],
                num_warps=4,
            )
        return out_thd

    def _uploaded(self, requests: PagedRequests, tiling: Tiling, shape: AttentionShape) -> Sequence[Tensor]:
        """Query starts, contexts, those that decode, and the tiles of the others: in one copy to the device."""
        starts, contexts = list(requests.query_start), list(requests.context_lens)
        tokens = tiling.many // (shape.num_heads // shape.num_kv_heads)
        decoding, tile_request, tile_row = [], [], []
        for request in range(len(contexts)):
            first, end = starts[request], starts[request + 1]
            if end - first == 1 and shape.causal:
                decoding.append(request)
            else:
                rows = range(first, end, tokens)
                tile_request += [request] * len(rows)
                tile_row += rows
        parts = (starts, contexts, decoding, tile_request, tile_row)
        numbers = torch.tensor([number for part in parts for number in part], dtype=torch.int32)
        return numbers.to(self._device, non_blocking=True).split([len(part) for part in parts])

    def _tensors(self, shape: AttentionShape) -> Tensors:
        if shape not in self._added:

            def tensor(values: Sequence[float] | None) -> Tensor:
                return torch.tensor(values or (0.0,), dtype=torch.float32).to(self._device)

            bias = shape.distance_bias
            self._added[shape] = Tensors(
                slopes_h=tensor(shape.slopes),
                bias_hf=tensor(None) if bias is None else bias.table_hf.float().contiguous().to(self._device),
                sinks_h=tensor(shape.sinks),
            )
        return self._added[shape]

    @property
    def _form(self) -> str:
        return self._kv_dtype if self._kv_dtype in QUANTIZED else "wide"

    def _views(self, kv_layer: Tensor) -> tuple[Tensor, Tensor]:
        """`[2, g, n, b]` of the cache's numbers, 8 bits of them as int8, and the same as float32, for scales."""
        if self._kv_dtype in QUANTIZED:
            return kv_layer.view(torch.int8), kv_layer.view(torch.float32)
        cache = kv_layer.view(getattr(torch, self._kv_dtype))
        return cache, cache

    def _room(self, size: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(max(1, size), dtype=dtype, device=self._device)


def tiling_of(shape: AttentionShape) -> Tiling:
    """By the shape alone. Tiles of rows are as large as registers allow: float32 sums of a tile, one column per
    dimension, beside the scores."""
    group = shape.num_heads // shape.num_kv_heads
    columns = max(16, next_power_of_2(shape.head_dim))
    few = max(16, next_power_of_2(group))
    many = max(few, 128 if columns <= 64 else 64)
    return Tiling(few=few, many=many, width=64 if columns <= 128 else 32, columns=columns)
