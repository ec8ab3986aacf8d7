"""The sparse feed-forward block by compiled kernels, over the packed weights of the linear layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from quire.ops.cpu.library import kernels_module
from quire.ops.moe import MoeWeights
from quire.ops.op import Implementation
from quire.ops.target import Target


class CpuMoe:
    """`MoeKernel` for experts of all formats, over one engine's threads. All blocks of a model share its memory."""

    mixes = False

    def __init__(self, target: Target) -> None:
        self._backend = target.cpu
        module: Any = kernels_module()
        self._module = module
        self._memory = module.MoeMemory()

    def join(self, weights: MoeWeights) -> Any:
        """A `MoeWeights` of the compiled module. Raises ValueError for shapes and formats that do not go together."""
        lists = (list(weights.gate), list(weights.up), list(weights.down))
        return self._module.MoeWeights(weights.router, *lists, weights.top_k, weights.renormalize)

    def __call__(self, x_te: Tensor, weights: Any) -> Tensor:
        x = x_te if x_te.stride(1) == 1 or x_te.shape[1] == 1 else x_te.contiguous()
        out_te = torch.empty(x.shape, dtype=x.dtype)
        self._module.moe(self._backend, weights, self._memory, x.data_ptr(), x.stride(0), 0, out_te.data_ptr(), len(x))
        return out_te

    def mix(self, x_te: Tensor, weights: Any, shares_tk: Tensor, experts_tk: Tensor) -> Tensor:
        raise NotImplementedError("the compiled block chooses its experts itself")


def implementations() -> list[Implementation]:
    return [
        Implementation(
            op="moe",
            backend="cpu",
            build=CpuMoe,
            unfit=Target.unfit_for_cpu_kernels,
            preference=100,
            note="compiled; expert by expert, all threads on one",
        )
    ]
