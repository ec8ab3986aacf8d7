"""The sparse feed-forward block: a router, and experts that are feed-forward blocks of their own.

Legend: t rows, e features, n experts, k experts of a row, g groups of experts, j experts of a group.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from quire.nn.layers import MLP, Linear
from quire.ops.kernels import Kernels
from quire.ops.moe import MoeWeights, add_experts


@dataclass(frozen=True, slots=True, kw_only=True)
class Routing:
    """How a row's experts are chosen and weighed.

    `scoring`: `softmax` over all experts, `sigmoid` of each, or `sparsemixer` (Liu et al., 2023): an expert's softmax
    over those experts only that come within `2 * jitter` of the best one, after which the best one is left out.
    `num_groups` and `top_groups`: the experts stand in groups, and only those of the best groups may be chosen, by the
    sum of the `group_best` best of each (1 in DeepSeek-V2, 2 in DeepSeek-V3). `renormalize`: a row's scores are made to
    add up to 1; `scale` multiplies them then. `weigh_input`: weights multiply what goes into an expert, not what comes
    out. `rank_logits`: experts are chosen by the router's outputs themselves, not by their scores.
    """

    top_k: int
    scoring: Literal["softmax", "sigmoid", "sparsemixer"] = "softmax"
    renormalize: bool = False
    scale: float = 1.0
    weigh_input: bool = False
    num_groups: int = 1
    top_groups: int = 1
    group_best: int = 2
    jitter: float = 0.01
    rank_logits: bool = False

    def choose(self, logits_tn: Tensor, correction_n: Tensor | None) -> tuple[Tensor, Tensor]:
        """(weights float32 `[t, k]`, experts int64 `[t, k]`) of float32 `logits_tn`. `correction_n` is added to the
        scores for choosing alone. Of equal experts the lower number comes first."""
        if self.scoring == "sparsemixer":
            return self._sparsemixer(logits_tn)
        scores_tn = logits_tn.softmax(-1) if self.scoring == "softmax" else 1.0 / (logits_tn.neg().exp() + 1.0)
        ranked_tn = logits_tn if self.rank_logits else scores_tn
        if correction_n is not None:
            ranked_tn = ranked_tn + correction_n
        if self.num_groups > 1:
            ranked_tn = self._within_groups(ranked_tn)
        experts_tk = ranked_tn.sort(dim=-1, descending=True, stable=True).indices[:, : self.top_k]
        weights_tk = scores_tn.gather(1, experts_tk)
        if self.renormalize:
            weights_tk = weights_tk / weights_tk.sum(-1, keepdim=True).clamp_min(1e-20)
        return weights_tk * self.scale, experts_tk

    def _within_groups(self, ranked_tn: Tensor) -> Tensor:
        ranked_tgj = ranked_tn.view(len(ranked_tn), self.num_groups, -1)
        best_tg = ranked_tgj.sort(dim=-1, descending=True).values[..., : self.group_best].sum(-1)
        chosen_tg = best_tg.sort(dim=-1, descending=True, stable=True).indices[:, : self.top_groups]
        open_tg = torch.zeros_like(best_tg, dtype=torch.bool).scatter_(1, chosen_tg, True)
        return ranked_tgj.masked_fill(~open_tg[..., None], float("-inf")).flatten(1)

    def _sparsemixer(self, logits_tn: Tensor) -> tuple[Tensor, Tensor]:
        left_tn, weights, experts = logits_tn, [], []
        for _ in range(self.top_k):
            best_t1, expert_t1 = left_tn.max(dim=-1, keepdim=True)
            far_tn = (best_t1 - logits_tn) / logits_tn.abs().clamp(min=best_t1) > 2 * self.jitter
            weights.append(left_tn.masked_fill(far_tn, float("-inf")).softmax(-1).gather(1, expert_t1))
            experts.append(expert_t1)
            left_tn = left_tn.scatter(1, expert_t1, float("-inf"))
        return torch.cat(weights, dim=1), torch.cat(experts, dim=1)


class SparseMLP:
    """Each row goes through the experts that the router finds best, and through `shared`, if there is one.

    The op `moe` computes the block where it is of the usual kind, or what its experts make of a router's choice where
    it can; otherwise its parts are called one by one.
    `correction` as in `Routing.choose`; `shared_gate` weighs the shared expert by its sigmoid. `averaged`: the result
    is the mean of both, not the sum.
    """

    def __init__(
        self,
        router: Linear,
        experts: Sequence[MLP],
        *,
        routing: Routing,
        correction: Tensor | None,
        shared: MLP | None,
        shared_gate: Linear | None,
        averaged: bool,
        kernels: Kernels,
    ) -> None:
        self.router = router
        self.experts = list(experts)
        self.routing = routing
        self.correction = correction
        self.shared = shared
        self.shared_gate = shared_gate
        self.averaged = averaged
        self._moe = kernels.moe
        self._is_usual = self._routes_as_usual()
        joins = self._has_plain_experts() and (self._is_usual or (kernels.moe.mixes and not routing.weigh_input))
        self._weights = self._join() if joins else None

    @property
    def is_one_call(self) -> bool:
        """Whether the op computes the block, of weights that it could join: nothing is asked of the host then."""
        return self._weights is not None and not isinstance(self._weights, MoeWeights)

    def __call__(self, x_te: Tensor) -> Tensor:
        routed_te = self._routed(x_te)
        if self.shared is None:
            return routed_te
        shared_te = self.shared(x_te)
        if self.shared_gate is not None:
            gate_t1 = 1.0 / (self.shared_gate.wide(x_te).neg().exp() + 1.0)
            shared_te = shared_te * gate_t1.to(shared_te.dtype)
        return (routed_te + shared_te) / 2 if self.averaged else routed_te + shared_te

    def _routed(self, x_te: Tensor) -> Tensor:
        if self._weights is not None and self._is_usual:
            return self._moe(x_te, self._weights)
        weights_tk, experts_tk = self.routing.choose(self.router.wide(x_te), self.correction)
        if self._weights is not None:
            return self._moe.mix(x_te, self._weights, weights_tk, experts_tk)
        if self.routing.weigh_input:
            return self._weighed_before(x_te, weights_tk, experts_tk)
        return add_experts(x_te, weights_tk, experts_tk, lambda expert, x_me: self.experts[expert](x_me))

    def _weighed_before(self, x_te: Tensor, weights_tk: Tensor, experts_tk: Tensor) -> Tensor:
        """Added up in float32 by rising number of the expert, as `add_experts` does."""
        sums_te = torch.zeros(x_te.shape, dtype=torch.float32, device=x_te.device)
        for expert in sorted(set(experts_tk.flatten().tolist())):
            rows_m, places_m = torch.where(experts_tk == expert)
            weighed_me = x_te[rows_m] * weights_tk[rows_m, places_m, None].to(x_te.dtype)
            sums_te[rows_m] += self.experts[expert](weighed_me).float()
        return sums_te.to(x_te.dtype)

    def _routes_as_usual(self) -> bool:
        usual = Routing(top_k=self.routing.top_k, renormalize=self.routing.renormalize, jitter=self.routing.jitter)
        return self.routing == usual and self.correction is None and self.router.bias is None

    def _has_plain_experts(self) -> bool:
        return all(
            expert.is_silu and all(part.bias is None for part in (expert.gate, expert.up, expert.down))
            for expert in self.experts
        )

    def _join(self) -> object:
        return self._moe.join(
            MoeWeights(
                router=self.router.weight,
                gate=[expert.gate.weight for expert in self.experts],
                up=[expert.up.weight for expert in self.experts],
                down=[expert.down.weight for expert in self.experts],
                top_k=self.routing.top_k,
                renormalize=self.routing.renormalize,
            )
        )
