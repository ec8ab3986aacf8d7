"""`moe`: a sparse feed-forward block, of which each row sees the few experts that a router finds likeliest.

Legend: t rows, e features, n experts, i features inside an expert, k experts of a row.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from quire.ops.activation import gated_activation
from quire.ops.linear import linear, linear_fp8, linear_fp8_rows, linear_int4, linear_int8
from quire.ops.op import Inputs, Op, Tolerance, random_int, random_tensor
from quire.ops.weight import Fp8Weight, Int4Weight, Int8Weight, Weight, pack_nibbles, split

Ffn = Callable[[int, Tensor], Tensor]
"""From (expert, its rows `[m, e]`) to what the expert makes of them, `[m, e]`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MoeWeights:
    """Expert j is `down[j](silu(gate[j](x)) * up[j](x))`; its gate and up are of one format.

    `router` is `[n, e]`, plain. For the definition, weights are as a checkpoint has them; for a kernel, as the linear
    kernels of the same back end have packed them. `renormalize`: the probabilities of a row's experts are made to add
    up to 1.
    """

    router: Any
    gate: Sequence[Any]
    up: Sequence[Any]
    down: Sequence[Any]
    top_k: int
    renormalize: bool


class MoeKernel(Protocol):
    @property
    def mixes(self) -> bool:
        """Whether it has `mix`."""
        ...

    def join(self, weights: MoeWeights) -> Any:
        """Weights that the linear kernels have packed, as one; none is copied."""
        ...

    def __call__(self, x_te: Tensor, weights: Any) -> Tensor:
        """`[t, e]` in the dtype of `x_te`; `weights` is what `join` gave."""
        ...

    def mix(self, x_te: Tensor, weights: Any, shares_tk: Tensor, experts_tk: Tensor) -> Tensor:
        """The same for a router of another kind, which has chosen: experts int64 `[t, k]`, no two of a row alike, and
        their shares, float32."""
        ...


def moe(x_te: Tensor, weights: MoeWeights) -> Tensor:
    """Every product rounds to the dtype of `x_te`, as a linear layer does; the weighted sum is in float32."""

    def ffn(expert: int, x_me: Tensor) -> Tensor:
        inner = gated_activation(_multiply(x_me, weights.gate[expert]), _multiply(x_me, weights.up[expert]), "silu")
        return _multiply(inner, weights.down[expert])

    probabilities_tk, experts_tk = route(linear(x_te, weights.router), weights)
    return add_experts(x_te, probabilities_tk, experts_tk, ffn)


def route(logits_tn: Tensor, weights: MoeWeights) -> tuple[Tensor, Tensor]:
    """(probabilities float32 `[t, k]`, experts int64 `[t, k]`), likeliest first, of equal ones the lower number first.

    Softmax in float32 over all experts.
    """
    wide_tn = logits_tn.float()
    experts_tk = wide_tn.sort(dim=-1, descending=True, stable=True).indices[:, : weights.top_k]
    probabilities_tk = wide_tn.softmax(-1).gather(1, experts_tk)
    if weights.renormalize:
        probabilities_tk /= probabilities_tk.sum(-1, keepdim=True)
    return probabilities_tk, experts_tk


def add_experts(x_te: Tensor, probabilities_tk: Tensor, experts_tk: Tensor, ffn: Ffn) -> Tensor:
    """A row's experts are added up in float32 by rising number, whatever other rows there are."""
    sums_te = torch.zeros(x_te.shape, dtype=torch.float32, device=x_te.device)
    for expert in sorted(set(experts_tk.flatten().tolist())):
        rows_m, places_m = torch.where(experts_tk == expert)
        share_me = ffn(expert, x_te[rows_m]).float() * probabilities_tk[rows_m, places_m, None]
        sums_te[rows_m] += share_me
    return sums_te.to(x_te.dtype)


def _multiply(x_me: Tensor, weight: Weight) -> Tensor:
    match weight:
        case Int8Weight():
            return linear_int8(x_me, weight)
        case Int4Weight():
            return linear_int4(x_me, weight)
        case Fp8Weight(rounds_rows=True):
            return linear_fp8_rows(x_me, weight)
        case Fp8Weight():
            return linear_fp8(x_me, weight)
        case _:
            return linear(x_me, weight)


def _random_weight(kind: int, n: int, k: int, dtype: torch.dtype, generator: torch.Generator) -> Weight:
    scale_n = torch.rand(n, generator=generator).add_(0.5).mul_(k**-0.5)
    match kind:
        case 0:
            values = torch.randint(-127, 128, (n, k), generator=generator).to(torch.int8)
            return Int8Weight(values_nk=values, scale_n=scale_n / 64)
        case 1 | 3 | 4:
            nibbles = pack_nibbles(torch.randint(0, 16, (n, k), generator=generator))
            scale_ng = scale_n[:, None].repeat(1, k // 32) / 4
            zero = torch.randint(6, 11, (n, k // 32), dtype=torch.uint8, generator=generator) if kind == 3 else None
            weight = Int4Weight(nibbles_nk2=nibbles, scale_ng=scale_ng, zero_ng=zero, group_size=32)
            return split(weight) if kind == 4 else weight
        case 2:
            values = random_tensor(n, k, dtype=torch.float8_e4m3fn, generator=generator)
            return Fp8Weight(values_nk=values, scale_n=scale_n)
        case _:
            return random_tensor(n, k, dtype=dtype, generator=generator, scale=k**-0.5)


def _inputs(rows: int, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
    e, i, n = (random_int(1, most, generator) for most in (4, 3, 12))
    e, i, kind = 32 * e, 32 * i, random_int(0, 6, generator)

    def experts(outputs: int, inputs: int) -> list[Weight]:
        return [_random_weight(kind, outputs, inputs, dtype, generator) for _ in range(n)]

    weights = MoeWeights(
        # Logits of whole numbers: which experts a row sees must not hang on a last bit.
        router=torch.randint(-2, 3, (n, e), generator=generator).to(dtype),
        gate=experts(i, e),
        up=experts(i, e),
        down=experts(e, i),
        top_k=random_int(1, n, generator),
        renormalize=bool(random_int(0, 1, generator)),
    )
    x_te = torch.randint(-2, 3, (rows, e), generator=generator).to(dtype) / 2
    return {"x_te": x_te, "weights": weights}


_TOLERANCES: Mapping[torch.dtype, Tolerance] = {
    # Of quantised experts: a value between two steps of the 8-bit rows may go to either.
    torch.float32: Tolerance(relative=1e-2, absolute=2e-3),
    torch.bfloat16: Tolerance(relative=2e-2, absolute=3e-2),
    torch.float16: Tolerance(relative=2e-3, absolute=2e-3),
}
MOE = Op(name="moe", definition=moe, inputs=_inputs, row_arguments=("x_te",), tolerances=_TOLERANCES)
