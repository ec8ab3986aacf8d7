"""The small layers: a weight and the kernel that uses it. Shapes in `quire.ops`."""

from __future__ import annotations

from torch import Tensor

from quire.ops.kernels import Kernels
from quire.ops.weight import PackedWeight, Weight


class Linear:
    """Of a weight `[out, in]` in any format, and a bias `[out]`. `weight` is packed for the kernel that serves it."""

    def __init__(self, weight: Weight | PackedWeight, bias: Tensor | None, kernels: Kernels) -> None:
        self._kernel = kernels.linear_for(weight)
        self.weight = weight.value if isinstance(weight, PackedWeight) else self._kernel.pack(weight)
        self.bias = bias

    def __call__(self, x: Tensor) -> Tensor:
        return self._kernel(x, self.weight, self.bias)

    def wide(self, x: Tensor) -> Tensor:
        """In float32, see `LinearKernel.wide`."""
        return self._kernel.wide(x, self.weight, self.bias)


class RMSNorm:
    def __init__(self, weight: Tensor, eps: float, kernels: Kernels) -> None:
        self.weight = weight
        self.eps = eps
        self._rms_norm = kernels.rms_norm
        self._add_rms_norm = kernels.add_rms_norm

    def __call__(self, x: Tensor) -> Tensor:
        return self._rms_norm(x, self.weight, self.eps)

    def add(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """The norm of `x + residual`, and the sum."""
        return self._add_rms_norm(x, residual, self.weight, self.eps)


class Embedding:
    """`weight` is `[vocabulary, hidden]`."""

    def __init__(self, weight: Tensor, kernels: Kernels) -> None:
        self.weight = weight
        self._embedding = kernels.embedding

    def __call__(self, ids_t: Tensor) -> Tensor:
        return self._embedding(ids_t, self.weight)


class MLP:
    """The gated feed-forward block: down(silu(gate(x)) * up(x))."""

    def __init__(self, gate: Linear, up: Linear, down: Linear, kernels: Kernels) -> None:
        self.gate = gate
        self.up = up
        self.down = down
        self._silu_mul = kernels.silu_mul

    def __call__(self, x_te: Tensor) -> Tensor:
        return self.down(self._silu_mul(self.gate(x_te), self.up(x_te)))
