"""Linear layers of 4-bit weights by Triton. Legend: t rows, k features in, n features out, g groups, s spans of k."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quire.ops.target import Target
from quire.ops.triton.kernels.int4 import int4_kernel
from quire.ops.triton.launch import Launch
from quire.ops.triton.quantize import quantize
from quire.ops.triton.tiles import MOST_PARTS, PROGRAMS, parts_of, rows_tile, shared_bytes_of
from quire.ops.weight import Int4Weight

FEATURES = 64
MOST_ROWS = 64
"""Of a tile."""
_MOST_STAGES = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedInt4:
    """Nibbles as they lie; what stands beside them, of neighbouring features side by side. `multiplier_gn` where a
    span is more than a group."""

    nibbles_nk2: Tensor
    scale_sn: Tensor
    zero_gn: Tensor | None
    multiplier_gn: Tensor | None
    group_size: int
    span: int


class TritonInt4Linear:
    """`LinearKernel` of int4. One stream at a time may call it, as `TritonLinear`."""

    def __init__(self, target: Target) -> None:
        self._launch: Launch = target.launch
        self._shared_bytes = shared_bytes_of(target)
        self._tickets = torch.zeros(PROGRAMS * MOST_PARTS, dtype=torch.int32, device=target.device)

    def pack(self, weight: Int4Weight) -> PackedInt4:
        parts = weight.split_scales
        return PackedInt4(
            nibbles_nk2=weight.nibbles_nk2.contiguous(),
            scale_sn=(weight.scale_ng if parts is None else parts.step_ns).T.contiguous(),
            zero_gn=None if weight.zero_ng is None else weight.zero_ng.T.contiguous(),
            multiplier_gn=None if parts is None else parts.multiplier_ng.T.contiguous(),
            group_size=weight.group_size,
            span=weight.row_group,
        )

    def __call__(self, x_tk: Tensor, weight: PackedInt4, bias_n: Tensor | None = None) -> Tensor:
        """`[..., n]` for rows of any leading shape."""
        return self._multiply(x_tk, weight, bias_n, x_tk.dtype)

    def wide(self, x_tk: Tensor, weight: PackedInt4, bias_n: Tensor | None) -> Tensor:
        return self._multiply(x_tk, weight, bias_n, torch.float32)

    def group(self, x_tk: Tensor, weights: Sequence[PackedInt4], biases: Sequence[Tensor | None]) -> list[Tensor]:
        """As `TritonLinear.group`, but a launch for each, and results of their own."""
        return [self(x_tk, weight, bias) for weight, bias in zip(weights, biases, strict=True)]

    def _multiply(self, x_tk: Tensor, weight: PackedInt4, bias_n: Tensor | None, dtype: torch.dtype) -> Tensor:
        rows = x_tk.reshape(-1, x_tk.shape[-1])
        (t, k), n = rows.shape, len(weight.nibbles_nk2)
        out = torch.empty(t, n, dtype=dtype, device=x_tk.device)
        if t:
            values, scale = quantize(self._launch, rows, torch.bfloat16, weight.span, halves=True)
            parts, steps = parts_of(n, k, weight.span)
            block = rows_tile(t, MOST_ROWS)
            tiles = -(-n // FEATURES) * -(-t // block)
            form = "one" if parts == 1 else "split" if tiles < PROGRAMS else "loop"
            programs = tiles * parts if form == "split" else tiles
            room = programs * FEATURES * block if form == "split" else 1
            partials = torch.empty(room, dtype=torch.float32, device=x_tk.device)
            self._launch(
                int4_kernel,
                (programs,),
                values,
                scale,
                weight.nibbles_nk2,
                weight.scale_sn,
                weight.nibbles_nk2 if weight.zero_gn is None else weight.zero_gn,
                weight.nibbles_nk2 if weight.multiplier_gn is None else weight.multiplier_gn,
                out if bias_n is None else bias_n,
                out,
                partials,
                self._tickets,
                t,
                k,
                n,
                parts,
                steps,
                GROUP=weight.group_size,
                SPAN=weight.span,
                ZEROS=weight.zero_gn is not None,
                BIAS=bias_n is not None,
                FORM=form,
                BLOCK_F=FEATURES,
                BLOCK_T=block,
                num_warps=4,
                num_stages=stages_of(weight.span, block, values, self._shared_bytes),
            )
        return out.view(*x_tk.shape[:-1], n)


def stages_of(span: int, block: int, values: Tensor, shared_bytes: int) -> int:
    """Spans that are under way at once, of `FEATURES` by `block` rows: two programs share a multiprocessor's memory."""
    stage = span * (FEATURES // 2 + block * values.element_size())
    return max(2, min(_MOST_STAGES, shared_bytes // 2 // stage))
