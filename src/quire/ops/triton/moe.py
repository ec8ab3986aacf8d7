"""The sparse feed-forward block by Triton: nothing is asked of the device, so that a graph can hold it.

Legend: t rows, e features, n experts, i features inside an expert, k experts of a row; a pair is a row and one of its
experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from quire.ops.activation import gated_activation
from quire.ops.moe import Ffn, MoeWeights, add_experts, route
from quire.ops.target import Target
from quire.ops.triton.int4 import FEATURES, MOST_ROWS, PackedInt4, TritonInt4Linear, stages_of
from quire.ops.triton.kernels.moe import (
    add_experts_kernel,
    arrange_kernel,
    count_kernel,
    expert_kernel,
    route_kernel,
)
from quire.ops.triton.kernels.moe_int4 import int4_expert_kernel
from quire.ops.triton.launch import Launch
from quire.ops.triton.linear import TritonLinear, row_dtype
from quire.ops.triton.quantize import quantize
from quire.ops.triton.tiles import FEW_ROWS, rows_tile, shared_bytes_of, stages, step_of
from quire.ops.weight import Fp8Weight, Int8Weight, weight_shape

_TYPES = {
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.float32: tl.float32,
    torch.int8: tl.int8,
    torch.float8_e4m3fn: tl.float8e4nv,
}
_FEW_PAIRS = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class _Experts:
    """One weight of each expert, of one shape and format, where they lie. `kept` holds them."""

    addresses_n: Tensor
    scale_addresses_n: Tensor
    sample: Tensor
    align: int
    scales: int
    kept: Sequence[Any]

    @property
    def shape(self) -> tuple[int, int]:
        n, k = self.sample.shape
        return n, k


@dataclass(frozen=True, slots=True, kw_only=True)
class _Int4Experts:
    """One 4-bit weight of each expert, all like `sample`. `tables`: see `one_product`."""

    tables: Tensor
    sample: PackedInt4
    align: int
    kept: Sequence[PackedInt4]

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.sample.nibbles_nk2), 2 * self.sample.nibbles_nk2.shape[1]


@dataclass(frozen=True, slots=True, kw_only=True)
class TritonMoeWeights:
    """Gate and up are of one shape and format."""

    plain: MoeWeights
    gate: _Experts | _Int4Experts
    up: _Experts | _Int4Experts
    down: _Experts | _Int4Experts


@dataclass(frozen=True, slots=True, kw_only=True)
class _Places:
    """Pairs in order of their experts, see `kernels.moe`. `most_tiles`: what there may be, by the shapes alone."""

    places: Tensor
    tile_experts: Tensor
    num_tiles: Tensor
    most_tiles: int
    tile: int
    pairs: int


class TritonMoe:
    """`MoeKernel`. Experts in several formats or shapes are computed one after the other, which waits for the device:
    no graph can hold that."""

    mixes = True

    def __init__(self, target: Target) -> None:
        self._launch: Launch = target.launch
        self._shared_bytes = shared_bytes_of(target)
        self._linear = TritonLinear(target)
        self._int4 = TritonInt4Linear(target)

    def join(self, weights: MoeWeights) -> TritonMoeWeights | MoeWeights:
        lists = [_experts(each) for each in (weights.gate, weights.up, weights.down)]
        if any(each is None for each in lists):
            return weights
        gate, up, down = (each for each in lists if each is not None)
        if gate.shape != up.shape or _format(gate.sample) != _format(up.sample):
            return weights
        return TritonMoeWeights(plain=weights, gate=gate, up=up, down=down)

    def __call__(self, x_te: Tensor, weights: TritonMoeWeights | MoeWeights) -> Tensor:
        if isinstance(weights, MoeWeights):
            return self._one_by_one(x_te, weights)
        if not len(x_te):
            return torch.empty_like(x_te)
        probabilities_tk, experts_tk = self._route(self._linear(x_te, weights.plain.router), weights.plain)
        return self._mixed(x_te, weights, probabilities_tk, experts_tk)

    def mix(
        self, x_te: Tensor, weights: TritonMoeWeights | MoeWeights, shares_tk: Tensor, experts_tk: Tensor
    ) -> Tensor:
        if isinstance(weights, MoeWeights):
            return add_experts(x_te, shares_tk, experts_tk, self._ffn(weights))
        if not len(x_te):
            return torch.empty_like(x_te)
        rising_tk, order_tk = experts_tk.sort(dim=1)
        return self._mixed(x_te, weights, shares_tk.gather(1, order_tk), rising_tk.int())

    def _mixed(self, x_te: Tensor, weights: TritonMoeWeights, shares_tk: Tensor, experts_tk: Tensor) -> Tensor:
        """Of experts by rising number."""
        x = x_te if x_te.stride(1) == 1 else x_te.contiguous()
        places = self._arrange(experts_tk, len(weights.gate.kept), _pair_tile(experts_tk, weights))
        inner = self._experts(x, weights.gate, weights.up, places, experts_tk.shape[1])
        return self._add(self._experts(inner, weights.down, None, places, 1), shares_tk)

    def _experts(
        self,
        x: Tensor,
        first: _Experts | _Int4Experts,
        second: _Experts | _Int4Experts | None,
        places: _Places,
        top_k: int,
    ) -> Tensor:
        """`[pairs, n]` of `[pairs / top_k, k]`: by one weight of each expert, or gated, by two."""
        if isinstance(first, _Int4Experts):
            assert second is None or isinstance(second, _Int4Experts)
            return self._multiply_int4(x, first, second, places, top_k)
        assert second is None or isinstance(second, _Experts)
        return self._multiply(x, first, second, places, top_k)

    def _one_by_one(self, x_te: Tensor, weights: MoeWeights) -> Tensor:
        probabilities_tk, experts_tk = route(self._linear(x_te, weights.router), weights)
        return add_experts(x_te, probabilities_tk, experts_tk, self._ffn(weights))

    def _ffn(self, weights: MoeWeights) -> Ffn:
        def ffn(expert: int, x_me: Tensor) -> Tensor:
            gate, up = (self._linear_for(each[expert])(x_me, each[expert]) for each in (weights.gate, weights.up))
            inner = gated_activation(gate, up, "silu")
            return self._linear_for(weights.down[expert])(inner, weights.down[expert])

        return ffn

    def _linear_for(self, weight: Any) -> TritonLinear | TritonInt4Linear:
        return self._int4 if isinstance(weight, PackedInt4) else self._linear

    def _route(self, logits_tn: Tensor, weights: MoeWeights) -> tuple[Tensor, Tensor]:
        """(probabilities, experts int32), both `[t, k]`, by rising number of the expert."""
        t, n = logits_tn.shape
        probabilities = torch.empty(t, weights.top_k, dtype=torch.float32, device=logits_tn.device)
        experts = torch.empty(t, weights.top_k, dtype=torch.int32, device=logits_tn.device)
        self._launch(
            route_kernel,
            (t,),
            logits_tn,
            probabilities,
            experts,
            n,
            TOP_K=weights.top_k,
            BLOCK_N=_power_above(n),
            RENORMALIZE=weights.renormalize,
            num_warps=1 if n <= 256 else 4,
        )
        return probabilities, experts

    def _arrange(self, experts_tk: Tensor, n: int, tile: int) -> _Places:
        pairs, device = experts_tk.numel(), experts_tk.device
        most_tiles = min(pairs, pairs // tile + min(n, pairs))
        counts, places, tile_experts, num_tiles = (
            torch.empty(size, dtype=torch.int32, device=device) for size in (n, most_tiles * tile, most_tiles, 1)
        )
        counted = pairs > _FEW_PAIRS
        block = 4 * _FEW_PAIRS if counted else _FEW_PAIRS
        if counted:
            self._launch(count_kernel, (n,), experts_tk, counts, pairs, BLOCK=block)
        self._launch(
            arrange_kernel,
            (n,),
            experts_tk,
            counts,
            places,
            tile_experts,
            num_tiles,
            pairs,
            n,
            COUNTED=counted,
            TILE=tile,
            BLOCK=block,
            BLOCK_N=_power_above(n + 1),
        )
        return _Places(
            places=places, tile_experts=tile_experts, num_tiles=num_tiles, most_tiles=most_tiles, tile=tile, pairs=pairs
        )

    def _multiply(self, x: Tensor, first: _Experts, second: _Experts | None, places: _Places, top_k: int) -> Tensor:
        narrow = row_dtype(first.kept[0])
        (n, k), step = first.sample.shape, step_of(first.sample, rounds_rows=narrow is not None)
        out = torch.empty(places.pairs, n, dtype=x.dtype, device=x.device)
        scale = None
        if narrow is not None:
            x, scale = quantize(self._launch, x, narrow)
        features = 128 if places.tile == FEW_ROWS else 64
        self._launch(
            expert_kernel,
            (places.most_tiles * -(-n // features),),
            x,
            x if scale is None else scale,
            first.addresses_n,
            (second or first).addresses_n,
            first.scale_addresses_n,
            (second or first).scale_addresses_n,
            places.places,
            places.tile_experts,
            places.num_tiles,
            out,
            k,
            n,
            x.stride(0),
            GATED=second is not None,
            TOP_K=top_k,
            W_TYPE=_TYPES[first.sample.dtype],
            ALIGN=min(first.align, (second or first).align),
            SCALES=first.scales,
            EVEN_K=k % step == 0,
            BLOCK_F=features,
            BLOCK_M=places.tile,
            BLOCK_K=step,
            num_warps=features // 16,
            num_stages=stages(
                features,
                places.tile,
                x,
                step,
                shared_bytes=self._shared_bytes,
                weights=1 if second is None else 2,
            ),
        )
        return out

    def _multiply_int4(
        self, x: Tensor, first: _Int4Experts, second: _Int4Experts | None, places: _Places, top_k: int
    ) -> Tensor:
        (n, k), sample = first.shape, first.sample
        out = torch.empty(places.pairs, n, dtype=x.dtype, device=x.device)
        values, scale = quantize(self._launch, x, torch.bfloat16, sample.span, halves=True)
        self._launch(
            int4_expert_kernel,
            (places.most_tiles * -(-n // FEATURES),),
            values,
            scale,
            first.tables,
            (second or first).tables,
            len(first.kept),
            places.places,
            places.tile_experts,
            places.num_tiles,
            out,
            k,
            n,
            GATED=second is not None,
            TOP_K=top_k,
            ALIGN=min(first.align, (second or first).align),
            GROUP=sample.group_size,
            SPAN=sample.span,
            ZEROS=sample.zero_gn is not None,
            BLOCK_F=FEATURES,
            BLOCK_M=places.tile,
            num_warps=4,
            num_stages=stages_of(sample.span, places.tile, values, self._shared_bytes),
        )
        return out

    def _add(self, shares: Tensor, probabilities_tk: Tensor) -> Tensor:
        (t, top_k), e = probabilities_tk.shape, shares.shape[1]
        out = torch.empty(t, e, dtype=shares.dtype, device=shares.device)
        block = min(1024, _power_above(e))
        self._launch(
            add_experts_kernel, (t, -(-e // block)), shares, probabilities_tk, out, e, TOP_K=top_k, BLOCK=block
        )
        return out


def _format(sample: Tensor | PackedInt4) -> tuple[object, ...]:
    """What weights share that one launch multiplies by."""
    if isinstance(sample, Tensor):
        return (sample.dtype,)
    return sample.nibbles_nk2.shape, sample.group_size, sample.span, sample.zero_gn is None


def _experts(weights: Sequence[Any]) -> _Experts | _Int4Experts | None:
    """None where one kernel cannot serve them all."""
    int4 = [weight for weight in weights if isinstance(weight, PackedInt4)]
    if int4:
        return _int4_experts(int4) if len(int4) == len(weights) else None
    if len({(type(weight), weight_shape(weight)) for weight in weights}) > 1:
        return None
    values = [weight if isinstance(weight, Tensor) else weight.values_nk for weight in weights]
    scales = [weight.scale_n for weight in weights if isinstance(weight, Int8Weight | Fp8Weight)]
    if len({each.dtype for each in values}) > 1:
        return None
    return _Experts(
        addresses_n=_addresses(values),
        scale_addresses_n=_addresses(scales or values),
        sample=values[0],
        align=_alignment(values),
        scales=bool(scales) + (row_dtype(weights[0]) is not None),
        kept=weights,
    )


def _int4_experts(weights: Sequence[PackedInt4]) -> _Int4Experts | None:
    if len({_format(weight) for weight in weights}) > 1:
        return None
    nibbles = [weight.nibbles_nk2 for weight in weights]
    lists = [
        nibbles,
        [weight.scale_sn for weight in weights],
        [weight.nibbles_nk2 if weight.zero_gn is None else weight.zero_gn for weight in weights],
        [weight.nibbles_nk2 if weight.multiplier_gn is None else weight.multiplier_gn for weight in weights],
    ]
    return _Int4Experts(
        tables=torch.stack([_addresses(each) for each in lists]),
        sample=weights[0],
        align=_alignment(nibbles),
        kept=weights,
    )


def _alignment(tensors: Sequence[Tensor]) -> int:
    """In bytes, that all of them have."""
    return 16 if all(each.data_ptr() % 16 == 0 for each in tensors) else tensors[0].element_size()


def _addresses(tensors: Sequence[Tensor]) -> Tensor:
    return torch.tensor([each.data_ptr() for each in tensors], dtype=torch.int64, device=tensors[0].device)


def _pair_tile(experts_tk: Tensor, weights: TritonMoeWeights) -> int:
    """Pairs of a tile: twice what an expert has if all have as many, so that most need one tile when rows are few."""
    share = 2 * experts_tk.numel() // len(weights.gate.kept)
    return rows_tile(max(1, share), min(_most_pairs(weights.gate), _most_pairs(weights.down)))


def _most_pairs(experts: _Experts | _Int4Experts) -> int:
    """Of a tile. Odd rows and float32 pass through registers; sums of 8-bit floats have two accumulators each."""
    if isinstance(experts, _Int4Experts):
        return MOST_ROWS
    if experts.sample.shape[1] % 16 != 0:
        return 16
    if experts.sample.dtype == torch.float32:
        return 32
    return 64 if row_dtype(experts.kept[0]) == torch.float8_e4m3fn else FEW_ROWS


def _power_above(size: int) -> int:
    return max(16, 1 << (size - 1).bit_length())
