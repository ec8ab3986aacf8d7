"""Self-attention with grouped KV heads, rotary positions and a paged cache.

Legend: t tokens, e hidden size, h query heads, g KV heads, d head dim.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from quire.nn.layers import Linear, RMSNorm
from quire.ops.attention import AttentionShape
from quire.ops.kernels import Kernels


@dataclass(frozen=True, slots=True, kw_only=True)
class StepContext:
    """What every layer's attention needs of this step. Made once per step by `Decoder.forward`.

    `plan` is the attention kernel's own; `cos` and `sin` are `[t, r / 2]`, `slots_t` as in `ForwardBatch`.
    """

    plan: Any
    cos: Tensor
    sin: Tensor
    slots_t: Tensor


class Attention:
    """`q_norm` and `k_norm` normalise each head before it is rotated, where the model has them."""

    def __init__(
        self,
        *,
        q: Linear,
        k: Linear,
        v: Linear,
        o: Linear,
        q_norm: RMSNorm | None,
        k_norm: RMSNorm | None,
        shape: AttentionShape,
        kernels: Kernels,
    ) -> None:
        self.q = q
        self.k = k
        self.v = v
        self.o = o
        self.q_norm = q_norm
        self.k_norm = k_norm
        self.shape = shape
        self._kernels = kernels

    def __call__(self, x_te: Tensor, kv_layer: Tensor, step: StepContext) -> Tensor:
        t, d = x_te.shape[0], self.shape.head_dim
        q_thd = self.q(x_te).view(t, self.shape.num_heads, d)
        k_tgd = self.k(x_te).view(t, self.shape.num_kv_heads, d)
        v_tgd = self.v(x_te).view(t, self.shape.num_kv_heads, d)
        if self.q_norm is not None:
            q_thd = self.q_norm(q_thd)
        if self.k_norm is not None:
            k_tgd = self.k_norm(k_tgd)
        q_thd = self._kernels.rope(q_thd, step.cos, step.sin)
        k_tgd = self._kernels.rope(k_tgd, step.cos, step.sin)
        self._kernels.attention.write(kv_layer, k_tgd, v_tgd, step.slots_t)
        return self.o(self._kernels.attention(q_thd, kv_layer, step.plan).view(t, -1))
