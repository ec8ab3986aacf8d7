"""The small layers: a weight and the kernel that uses it. Shapes in `quire.ops`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from quire.ops.kernels import Kernels
from quire.ops.weight import PackedWeight, Weight

Activation = Callable[[Tensor], Tensor]
GatedActivation = Callable[[Tensor, Tensor], Tensor]
"""act(gate) * up, elementwise."""


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


class Norm(Protocol):
    """Of the last dimension."""

    def __call__(self, x: Tensor) -> Tensor: ...

    def add(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """The norm of `x + residual`, and the sum."""
        ...


class RMSNorm:
    def __init__(self, weight: Tensor, eps: float, kernels: Kernels, *, weight_offset: float = 0.0) -> None:
        self.weight = weight
        self.eps = eps
        self.weight_offset = weight_offset
        self._rms_norm = kernels.rms_norm
        self._add_rms_norm = kernels.add_rms_norm

    def __call__(self, x: Tensor) -> Tensor:
        return self._rms_norm(x, self.weight, self.eps, self.weight_offset)

    def add(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        return self._add_rms_norm(x, residual, self.weight, self.eps, self.weight_offset)


class LayerNorm:
    def __init__(self, weight: Tensor, bias: Tensor | None, eps: float, kernels: Kernels) -> None:
        self.weight = weight
        self.bias = bias
        self.eps = eps
        self._layer_norm = kernels.layer_norm
        self._add_layer_norm = kernels.add_layer_norm

    def __call__(self, x: Tensor) -> Tensor:
        return self._layer_norm(x, self.weight, self.bias, self.eps)

    def add(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        return self._add_layer_norm(x, residual, self.weight, self.bias, self.eps)


class NoNorm:
    """Where other models have a norm."""

    def __call__(self, x: Tensor) -> Tensor:
        return x

    def add(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        total = x + residual
        return total, total


@dataclass(frozen=True, slots=True)
class Weighted:
    weight: Tensor


class OwnHeadsNorm:
    """Normalises each head by itself, then multiplies by a weight of its own, `[head dim]`."""

    def __init__(self, norm: Norm, weights: Sequence[Tensor]) -> None:
        self.heads = [Weighted(weight) for weight in weights]
        self._weight_hd = torch.stack(list(weights))
        self._norm = norm

    def __call__(self, x: Tensor) -> Tensor:
        """`x` is `[t, heads, head dim]`."""
        return self._norm(x) * self._weight_hd

    def add(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        total = x + residual
        return self(total), total


class Embedding:
    """`weight` is `[vocabulary, hidden]`."""

    def __init__(self, weight: Tensor, kernels: Kernels) -> None:
        self.weight = weight
        self._embedding = kernels.embedding

    def __call__(self, ids_t: Tensor) -> Tensor:
        return self._embedding(ids_t, self.weight)


class InputEmbedding:
    """What goes into the first layer: the token's row times `multiplier`, brought to the others' width by
    `token_projection`, plus the rows of its type and its position, normed, projected. `distances` is what attention
    adds to scores (`nn.distance`) and `per_layer` what layers look up besides: tables of the same kind, which belong to
    no layer."""

    def __init__(
        self,
        table: Embedding,
        *,
        multiplier: float,
        token_projection: Linear | None,
        token_types: Embedding | None,
        positions: Embedding | None,
        norm: Norm | None,
        projection: Linear | None,
        distances: Embedding | None,
        per_layer: Embedding | None,
    ) -> None:
        self.weight = table.weight
        self.token_projection = token_projection
        self.token_types = token_types
        self.positions = positions
        self.norm = norm
        self.projection = projection
        self.distances = distances
        self.per_layer = per_layer
        self._table = table
        self.multiplier = multiplier
        # Rounded to the dtype before the product, as `transformers` does.
        self._factor = torch.tensor(multiplier, dtype=table.weight.dtype).item()

    def __call__(self, ids_t: Tensor, positions_t: Tensor, types_t: Tensor | None = None) -> Tensor:
        """`types_t` None: all are of the first type."""
        x_te = self._table(ids_t)
        if self.multiplier != 1.0:
            x_te = x_te * self._factor
        if self.token_projection is not None:
            x_te = self.token_projection(x_te)
        if self.token_types is not None:
            x_te = x_te + (self.token_types.weight[0] if types_t is None else self.token_types(types_t))
        if self.positions is not None:
            x_te = x_te + self.positions(positions_t)
        if self.norm is not None:
            x_te = self.norm(x_te)
        return x_te if self.projection is None else self.projection(x_te)


class MLP:
    """The gated feed-forward block: down(act(gate(x)) * up(x)). `is_silu`: `activation` is silu(gate) * up."""

    def __init__(
        self, gate: Linear, up: Linear, down: Linear, activation: GatedActivation, *, is_silu: bool = False
    ) -> None:
        self.gate = gate
        self.up = up
        self.down = down
        self.activation = activation
        self.is_silu = is_silu

    def __call__(self, x_te: Tensor) -> Tensor:
        return self.down(self.activation(self.gate(x_te), self.up(x_te)))


class PlainMLP:
    """down(act(up(x)))."""

    def __init__(self, up: Linear, down: Linear, activation: Activation) -> None:
        self.up = up
        self.down = down
        self.activation = activation

    def __call__(self, x_te: Tensor) -> Tensor:
        return self.down(self.activation(self.up(x_te)))


class XIELU:
    """An activation that learns its slopes (Huang and Schlag, 2024), in float32, rounded once. Each is one number."""

    def __init__(self, alpha_p: Tensor, alpha_n: Tensor, beta: Tensor, eps: Tensor) -> None:
        self.alpha_p = alpha_p
        self.alpha_n = alpha_n
        self.beta = beta
        self.eps = eps
        self._rising = torch.nn.functional.softplus(alpha_p.float()).item()
        self._falling = (beta.float() + torch.nn.functional.softplus(alpha_n.float())).item()
        self._linear, self._bend = beta.item(), eps.item()

    def __call__(self, x: Tensor) -> Tensor:
        wide = x.float()
        below = (wide.clamp(max=self._bend).expm1() - wide) * self._falling
        return (torch.where(wide > 0, self._rising * wide * wide, below) + self._linear * wide).to(x.dtype)
