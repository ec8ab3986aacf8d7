"""The sparse feed-forward block: a router, and experts that are feed-forward blocks of their own."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from quire.nn.layers import MLP, Linear
from quire.ops.kernels import Kernels
from quire.ops.moe import MoeWeights


class SparseMLP:
    """Each row goes through the `top_k` experts that `router` finds likeliest; see `quire.ops.moe`."""

    def __init__(
        self, router: Linear, experts: Sequence[MLP], *, top_k: int, renormalize: bool, kernels: Kernels
    ) -> None:
        self.router = router
        self.experts = list(experts)
        self._moe = kernels.moe
        self._weights = kernels.moe.join(
            MoeWeights(
                router=router.weight,
                gate=[expert.gate.weight for expert in experts],
                up=[expert.up.weight for expert in experts],
                down=[expert.down.weight for expert in experts],
                top_k=top_k,
                renormalize=renormalize,
            )
        )

    def __call__(self, x_te: Tensor) -> Tensor:
        return self._moe(x_te, self._weights)
