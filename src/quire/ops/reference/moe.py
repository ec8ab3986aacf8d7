"""The sparse block by the reference back end's linear layers, which keep promise P1 for any number of rows."""

from __future__ import annotations

from torch import Tensor

from quire.ops.activation import gated_activation
from quire.ops.moe import MoeWeights, add_experts, route
from quire.ops.reference.linear import ReferenceLinear, ReferenceQuantizedLinear
from quire.ops.weight import Weight


class ReferenceMoe:
    """Over weights as the reference's linear layers have them: as they lie in the checkpoint."""

    mixes = True

    def __init__(self) -> None:
        self._linear = ReferenceLinear()
        self._quantized = ReferenceQuantizedLinear()

    def join(self, weights: MoeWeights) -> MoeWeights:
        return weights

    def __call__(self, x_te: Tensor, weights: MoeWeights) -> Tensor:
        return self.mix(x_te, weights, *route(self._linear(x_te, weights.router), weights))

    def mix(self, x_te: Tensor, weights: MoeWeights, shares_tk: Tensor, experts_tk: Tensor) -> Tensor:
        def ffn(expert: int, x_me: Tensor) -> Tensor:
            gate, up = (self._multiply(x_me, weight[expert]) for weight in (weights.gate, weights.up))
            return self._multiply(gated_activation(gate, up, "silu"), weights.down[expert])

        return add_experts(x_te, shares_tk, experts_tk, ffn)

    def _multiply(self, x_me: Tensor, weight: Weight) -> Tensor:
        return self._linear(x_me, weight) if isinstance(weight, Tensor) else self._quantized(x_me, weight)
