"""`latent_attention` in C++ (`csrc/latent`): the cache's inner layout, writing to it, and attention over it.

Legend as in `ops.latent_attention`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quire.core.kv_format import kv_block_bytes
from quire.ops.attention import PagedRequests
from quire.ops.cpu.library import kernels_module
from quire.ops.latent_attention import LatentShape
from quire.ops.op import Implementation
from quire.ops.target import Target


@dataclass(frozen=True, slots=True, kw_only=True)
class CpuLatentPlan:
    """What the kernel gets by address; `tensors` keeps those addresses alive."""

    shape: LatentShape
    block_size: int
    requests: Any
    tensors: tuple[Tensor, ...]


class CpuLatentAttention:
    """A `LatentAttentionKernel` for bfloat16 queries and a cache in bfloat16."""

    block_sizes = (8, 16, 32, 64, 128, 256)

    def __init__(self, target: Target) -> None:
        self._backend = target.cpu
        self._module: Any = kernels_module()

    @staticmethod
    def reads_lengths(_shape: LatentShape) -> bool:
        return False

    def block_bytes(self, block_size: int, shape: LatentShape) -> int:
        return _block_bytes(block_size, shape.latent_dim, shape.rope_dim)

    def write(self, cache_nb: Tensor, latent_tc: Tensor, key_tp: Tensor, slots_t: Tensor) -> None:
        latent_tc, key_tp, slots_t = _rows(latent_tc), _rows(key_tp), slots_t.contiguous()
        dims = latent_tc.shape[1], key_tp.shape[1]
        block_size = cache_nb.shape[1] // _block_bytes(1, *dims)
        self._module.write_latents(
            self._backend,
            self._layer(cache_nb, block_size, *dims),
            latent_tc.data_ptr(),
            latent_tc.stride(0),
            key_tp.data_ptr(),
            key_tp.stride(0),
            slots_t.data_ptr(),
            len(slots_t),
        )

    def plan(self, shape: LatentShape, requests: PagedRequests) -> CpuLatentPlan:
        starts_and_lens = torch.tensor([*requests.query_start, *requests.context_lens], dtype=torch.int64)
        table_rb = requests.block_table_rb.contiguous()
        return CpuLatentPlan(
            shape=shape,
            block_size=requests.block_size,
            requests=self._module.PagedRequests(
                len(requests.context_lens),
                starts_and_lens.data_ptr(),
                starts_and_lens.data_ptr() + 8 * len(requests.query_start),
                table_rb.data_ptr(),
                table_rb.shape[1],
            ),
            tensors=(starts_and_lens, table_rb),
        )

    def __call__(self, q_thd: Tensor, cache_nb: Tensor, plan: CpuLatentPlan, chosen_tk: Tensor | None = None) -> Tensor:
        q_thd, shape = q_thd.contiguous(), plan.shape
        chosen_tk = None if chosen_tk is None else chosen_tk.contiguous()
        out_thc = q_thd.new_empty(*q_thd.shape[:2], shape.latent_dim)
        self._module.latent_attention(
            self._backend,
            q_thd.data_ptr(),
            q_thd.stride(0),
            shape.num_heads,
            self._layer(cache_nb, plan.block_size, shape.latent_dim, shape.rope_dim),
            plan.requests,
            shape.scale,
            0 if chosen_tk is None else chosen_tk.data_ptr(),
            0 if chosen_tk is None else chosen_tk.shape[1],
            out_thc.data_ptr(),
            out_thc.stride(0),
        )
        return out_thc

    def _layer(self, cache_nb: Tensor, block_size: int, latent_dim: int, rope_dim: int) -> Any:
        return self._module.LatentLayer(cache_nb.data_ptr(), cache_nb.stride(0), block_size, latent_dim, rope_dim)


def _block_bytes(block_size: int, *dims: int) -> int:
    return sum(kv_block_bytes("bfloat16", block_size=block_size, head_dim=dim) for dim in dims)


def _rows(x_tn: Tensor) -> Tensor:
    """Each row laid end to end; rows may lie apart."""
    return x_tn if x_tn.stride(1) == 1 and len(x_tn) > 0 else x_tn.contiguous()


def _unfit(target: Target) -> str | None:
    if target.kv_dtype != "bfloat16" and target.unfit_for_cpu_kernels() is None:
        return f"it keeps latents in bfloat16, not in {target.kv_dtype}"
    return target.unfit_for_cpu_kernels()


def implementations() -> list[Implementation]:
    return [
        Implementation(
            op="latent_attention",
            backend="cpu",
            build=CpuLatentAttention,
            unfit=_unfit,
            preference=100,
            note="latents in place as keys and turned as values, tiles and segments at fixed positions",
        )
    ]
