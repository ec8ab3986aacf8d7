"""`attention` in C++ (`csrc/attention`): the cache's inner layout, writing to it, and attention over it.

Legend: t tokens, h query heads, g KV heads, d head dim, n blocks, b bytes of a block.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quire.core.kv_format import kv_block_bytes
from quire.ops.attention import AttentionShape, PagedRequests
from quire.ops.cpu.library import kernels_module
from quire.ops.op import Implementation
from quire.ops.target import Target

KV_FORMATS = {"bfloat16": 0, "int8": 1, "fp8": 2}


@dataclass(frozen=True, slots=True, kw_only=True)
class CpuAttentionPlan:
    """What the kernel gets by address; `tensors` keeps those addresses alive."""

    shape: AttentionShape
    block_size: int
    requests: Any
    options: Any
    tensors: tuple[Tensor | None, ...]


class CpuAttention:
    """An `AttentionKernel` for bfloat16 queries and a cache in bfloat16, int8 or fp8."""

    block_sizes = (8, 16, 32, 64, 128, 256)
    reads_lengths = False

    def __init__(self, target: Target) -> None:
        self._backend = target.cpu
        self._module: Any = kernels_module()
        self._kv_dtype = target.kv_dtype

    def block_bytes(self, block_size: int, head_dim: int) -> int:
        return kv_block_bytes(self._kv_dtype, block_size=block_size, head_dim=head_dim)

    def write(self, kv_2gnb: Tensor, k_tgd: Tensor, v_tgd: Tensor, slots_t: Tensor) -> None:
        k_tgd, v_tgd = _by_token(k_tgd), _by_token(v_tgd)
        layer = self._layer(kv_2gnb, self._block_size(kv_2gnb, k_tgd.shape[2]), k_tgd.shape[2])
        self._module.write_kv(
            self._backend,
            layer,
            k_tgd.data_ptr(),
            k_tgd.stride(0),
            v_tgd.data_ptr(),
            v_tgd.stride(0),
            slots_t.contiguous().data_ptr(),
            len(slots_t),
        )

    def plan(self, shape: AttentionShape, requests: PagedRequests) -> CpuAttentionPlan:
        starts_and_lens = torch.tensor([*requests.query_start, *requests.context_lens], dtype=torch.int64)
        table_rb = requests.block_table_rb.contiguous()
        sinks_h, slopes_h = (_floats(values) for values in (shape.sinks, shape.slopes))
        bias_hf = None if shape.distance_bias is None else shape.distance_bias.table_hf.contiguous()
        return CpuAttentionPlan(
            shape=shape,
            block_size=requests.block_size,
            requests=self._module.PagedRequests(
                len(requests.context_lens),
                starts_and_lens.data_ptr(),
                starts_and_lens.data_ptr() + 8 * len(requests.query_start),
                table_rb.data_ptr(),
                table_rb.shape[1],
            ),
            options=self._module.AttentionOptions(
                shape.scale,
                shape.causal,
                shape.window or 0,
                shape.softcap or 0.0,
                _address(sinks_h),
                _address(slopes_h),
                _address(bias_hf),
                0 if shape.distance_bias is None else shape.distance_bias.farthest,
            ),
            tensors=(starts_and_lens, table_rb, sinks_h, slopes_h, bias_hf),
        )

    def __call__(self, q_thd: Tensor, kv_2gnb: Tensor, plan: CpuAttentionPlan) -> Tensor:
        q_thd = _by_token(q_thd)
        out_thd = torch.empty(q_thd.shape, dtype=q_thd.dtype)
        self._module.attention(
            self._backend,
            q_thd.data_ptr(),
            q_thd.stride(0),
            q_thd.shape[1],
            self._layer(kv_2gnb, plan.block_size, plan.shape.head_dim),
            plan.requests,
            plan.options,
            out_thd.data_ptr(),
            out_thd.stride(0),
        )
        return out_thd

    def _block_size(self, kv_2gnb: Tensor, head_dim: int) -> int:
        return kv_2gnb.shape[3] // self.block_bytes(1, head_dim)

    def _layer(self, kv_2gnb: Tensor, block_size: int, head_dim: int) -> Any:
        _, heads, num_blocks, _ = kv_2gnb.shape
        keys, values = kv_2gnb[0], kv_2gnb[1]
        return self._module.KvLayer(
            keys.data_ptr(), values.data_ptr(), heads, num_blocks, block_size, head_dim, KV_FORMATS[self._kv_dtype]
        )


def _by_token(x_thd: Tensor) -> Tensor:
    """A token's heads laid end to end; tokens may lie apart."""
    t, _, d = x_thd.shape
    dense = x_thd.stride(2) == 1 and x_thd.stride(1) == d and t > 0
    return x_thd if dense else x_thd.contiguous()


def _floats(values: tuple[float, ...] | None) -> Tensor | None:
    return None if values is None else torch.tensor(values, dtype=torch.float32)


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def implementations() -> list[Implementation]:
    return [
        Implementation(
            op="attention",
            backend="cpu",
            build=CpuAttention,
            unfit=Target.unfit_for_cpu_kernels,
            preference=100,
            note="key tiles and segments at fixed positions",
        )
    ]
