"""Several ops of a layer as one kernel. They compute what the ops compute one by one, to the bit.

Legend: t tokens, h query heads, g KV heads, d head dim, n blocks, b bytes of a block, r rotated dimensions, i features
inside a feed-forward block.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quire.core.kv_format import QUANTIZED, kv_block_bytes
from quire.ops.target import Target
from quire.ops.triton.kernels.fused import qkv_kernel
from quire.ops.triton.launch import Launch
from quire.ops.triton.row_view import next_power_of_2
from quire.ops.triton.rows import TritonActivation, heads_per_program

_WIDEST_HEAD = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadNorms:
    """`rms_norm` of each query and key head; weights `[d]`."""

    q_weight: Tensor
    k_weight: Tensor
    eps: float
    weight_offset: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class RotaryTable:
    """float32 `[positions, r / 2]` each, of one stride, on the device."""

    cos_pr: Tensor
    sin_pr: Tensor


class TritonFused:
    """For a KV cache of the target's dtype, in the layout of `ops.reference.kv_layout`."""

    def __init__(self, target: Target) -> None:
        self._launch: Launch = target.launch
        self._kv_dtype = target.kv_dtype
        self._activation = TritonActivation(target)

    def silu_mul(self, x_t2i: Tensor) -> Tensor:
        """`[t, i]`: `gated_activation` of the product of gate and up, which stand side by side in each row."""
        gate_ti, up_ti = x_t2i.chunk(2, dim=-1)
        return self._activation.gated_activation(gate_ti, up_ti, "silu")

    def qkv(
        self,
        q_thd: Tensor,
        k_tgd: Tensor,
        v_tgd: Tensor,
        *,
        norms: HeadNorms | None,
        rotary: RotaryTable,
        positions_t: Tensor,
        slots_t: Tensor,
        kv_layer: Tensor,
    ) -> Tensor:
        """Queries `[t, h, d]`, normed and turned; keys, likewise, and values go to their slots of `kv_layer`
        `[2, g, n, b]`, as `AttentionKernel.write` puts them. A token whose slot is negative is not written.

        q, k and v may be parts of one product `[t, (h + 2g) * d]`: heads are read where they are.
        """
        t, h, d = q_thd.shape
        g = k_tgd.shape[1]
        assert d <= _WIDEST_HEAD, f"a head of {d} elements, of {_WIDEST_HEAD} at most"
        q_thd, k_tgd, v_tgd = (x if x.stride(-1) == 1 else x.contiguous() for x in (q_thd, k_tgd, v_tgd))
        assert rotary.cos_pr.stride() == rotary.sin_pr.stride()
        assert rotary.cos_pr.stride(-1) == 1
        out_thd = torch.empty(t, h, d, dtype=q_thd.dtype, device=q_thd.device)
        quantized = self._kv_dtype in QUANTIZED
        cache = kv_layer.view(torch.int8 if quantized else getattr(torch, self._kv_dtype))
        half = rotary.cos_pr.shape[-1]
        block = max(16, next_power_of_2(d))
        heads = heads_per_program(h, block)
        q_parts, kv_parts = -(-h // heads), -(-g // heads)
        if t:
            self._launch(
                qkv_kernel,
                (t, q_parts + 2 * kv_parts),
                q_thd,
                k_tgd,
                v_tgd,
                q_thd if norms is None else norms.q_weight,
                q_thd if norms is None else norms.k_weight,
                rotary.cos_pr,
                rotary.sin_pr,
                positions_t.contiguous(),
                slots_t.contiguous(),
                out_thd,
                cache,
                kv_layer.view(torch.float32) if quantized else cache,
                h,
                g,
                d,
                d + d % 2,
                kv_layer.shape[-1] // kv_block_bytes(self._kv_dtype, block_size=1, head_dim=d),
                1.0 if norms is None else norms.eps,
                0.0 if norms is None else norms.weight_offset,
                *q_thd.stride()[:2],
                *k_tgd.stride()[:2],
                *v_tgd.stride()[:2],
                rotary.cos_pr.stride(0),
                *cache.stride()[:3],
                HALF=half,
                REST=d - 2 * half,
                NORMED=norms is not None,
                OFFSETS=norms is not None and norms.weight_offset != 0.0,
                KV=self._kv_dtype if quantized else "wide",
                Q_PARTS=q_parts,
                KV_PARTS=kv_parts,
                HEADS=heads,
                BLOCK=block,
                HALF_BLOCK=next_power_of_2(half),
                REST_BLOCK=next_power_of_2(d - 2 * half),
            )
        return out_thd
