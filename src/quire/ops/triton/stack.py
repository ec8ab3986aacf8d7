"""The layers of a decoder in few launches: ten for a layer, where the ops one by one take eighteen.

Projections that read the same rows are one launch; query and key norms, rotation and the cache's writing another. To
the bit it is what the ops compute.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from quire.ops.stack import Stack, StackDescription, StackInputs, StackLayer, StackLinear
from quire.ops.target import Target
from quire.ops.triton.attention import TritonAttention
from quire.ops.triton.fused import HeadNorms, RotaryTable, TritonFused
from quire.ops.triton.int4 import TritonInt4Linear
from quire.ops.triton.linear import TritonLinear
from quire.ops.triton.rows import TritonEmbedding, TritonNorm
from quire.ops.weight import Fp8Weight, Int8Weight


class TritonStack:
    """Of layers whose projections over the same rows are of one format. `reads_lengths` as of its attention."""

    reads_lengths = True

    def __init__(self, target: Target, description: StackDescription) -> None:
        self._description = description
        self._linear = TritonLinear(target)
        self._int4 = TritonInt4Linear(target)
        self._norm = TritonNorm(target)
        self._embedding = TritonEmbedding(target)
        self._attention = TritonAttention(target)
        self._fused = TritonFused(target)
        self._rotary = RotaryTable(cos_pr=description.cos, sin_pr=description.sin)

    @torch.inference_mode()
    def __call__(self, inputs: StackInputs) -> Tensor:
        whole, eps = self._description, self._description.eps
        plan = self._attention.plan(whole.attention, inputs.requests)
        x_te = self._embedding(inputs.token_ids_t, whole.embedding)
        residual_te: Tensor | None = None
        for index, layer in enumerate(whole.layers):
            kv_layer = inputs.kv[index]
            normed_te, residual_te = self._normed(x_te, residual_te, layer.attention_norm)
            q_thd, k_tgd, v_tgd = self._heads(normed_te, layer)
            q_thd = self._fused.qkv(
                q_thd,
                k_tgd,
                v_tgd,
                norms=_head_norms(layer, eps),
                rotary=self._rotary,
                positions_t=inputs.positions_t,
                slots_t=inputs.slots_t,
                kv_layer=kv_layer,
            )
            found_thd = self._attention(q_thd, kv_layer, plan)
            attended_te = self._group(found_thd.view(len(found_thd), -1), [layer.o])[0]
            normed_te, residual_te = self._normed(attended_te, residual_te, layer.mlp_norm)
            inner_ti = self._fused.silu_mul(_side_by_side(self._group(normed_te, [layer.gate, layer.up])))
            x_te = self._group(inner_ti, [layer.down])[0]
        assert residual_te is not None
        rows = inputs.rows_s
        return self._normed(x_te.index_select(0, rows), residual_te.index_select(0, rows), whole.norm)[0]

    def _normed(self, x_te: Tensor, residual_te: Tensor | None, weight: Tensor) -> tuple[Tensor, Tensor]:
        eps = self._description.eps
        if residual_te is None:
            return self._norm.rms_norm(x_te, weight, eps), x_te
        return self._norm.add_rms_norm(x_te, residual_te, weight, eps)

    def _heads(self, x_te: Tensor, layer: StackLayer) -> list[Tensor]:
        d = self._description.attention.head_dim
        parts = self._group(x_te, [layer.q, layer.k, layer.v])
        return [part.view(len(part), -1, d) for part in parts]

    def _group(self, x_tk: Tensor, parts: Sequence[StackLinear]) -> list[Tensor]:
        weights, biases = [part.weight for part in parts], [part.bias for part in parts]
        plain = isinstance(weights[0], Tensor | Int8Weight | Fp8Weight)
        return (self._linear if plain else self._int4).group(x_tk, weights, biases)


def _side_by_side(parts: Sequence[Tensor]) -> Tensor:
    """Gate and up, `[t, 2i]`: as they lie, where one launch has made both."""
    gate_ti, up_ti = parts
    t, i = gate_ti.shape
    if gate_ti.stride(0) == up_ti.stride(0) == 2 * i and up_ti.data_ptr() == gate_ti.data_ptr() + i * gate_ti.itemsize:
        return gate_ti.as_strided((t, 2 * i), (2 * i, 1))
    return torch.cat([gate_ti, up_ti], dim=-1)


def _head_norms(layer: StackLayer, eps: float) -> HeadNorms | None:
    if layer.q_norm is None or layer.k_norm is None:
        return None
    return HeadNorms(q_weight=layer.q_norm, k_weight=layer.k_norm, eps=eps)


def build_stack(target: Target, description: StackDescription) -> Stack | None:
    """None for layers with a norm of queries or of keys alone, and for projections of several formats in one launch."""
    for layer in description.layers:
        if (layer.q_norm is None) != (layer.k_norm is None):
            return None
        for together in ((layer.q, layer.k, layer.v), (layer.gate, layer.up)):
            if len({type(part.weight) for part in together}) > 1:
                return None
    return TritonStack(target, description)
