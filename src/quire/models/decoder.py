"""The decoder: one class for every model that `Arch`'s flags can describe.

Legend: t tokens of the step, s rows that need logits, e hidden size, v vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from quire.nn.attention import AttentionBlock, StepContext, paged_requests, step_contexts
from quire.nn.batch import ForwardBatch
from quire.nn.kv import KVCache
from quire.nn.layers import InputEmbedding, Linear, Norm
from quire.nn.pooling import Pooler
from quire.ops.kernels import Kernels
from quire.ops.stack import Stack, StackInputs


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerParts:
    """What a layer is made of; see `DecoderLayer`."""

    attention_norm: Norm
    attention: AttentionBlock
    attention_out_norm: Norm | None
    mlp_norm: Norm | None
    mlp: Callable[[Tensor], Tensor]
    mlp_out_norm: Norm | None
    sum_norm: Norm | None
    parallel: bool
    multiplier: float


class DecoderLayer:
    """Attention and feed-forward block around a residual stream, with norms before and after them where the model has
    them. `parallel`: both read the same stream, the feed-forward block through `mlp_norm`, or without one through
    `attention_norm`. `sum_norm`: it and `mlp_norm` normalise what a block and the stream add up to, and their results
    are the stream from there on. `multiplier`: of what a block adds to the stream."""

    def __init__(self, parts: LayerParts) -> None:
        self.attention_norm = parts.attention_norm
        self.attention = parts.attention
        self.attention_out_norm = parts.attention_out_norm
        self.mlp_norm = parts.mlp_norm
        self.mlp = parts.mlp
        self.mlp_out_norm = parts.mlp_out_norm
        self.sum_norm = parts.sum_norm
        self.parallel = parts.parallel
        self.multiplier = parts.multiplier

    def __call__(
        self, x_te: Tensor, residual_te: Tensor | None, kv_layer: Tensor, step: StepContext
    ) -> tuple[Tensor, Tensor | None]:
        """`x_te` is what the layer before adds to the residual stream: each norm does the addition on its way in.
        Without `residual_te`, it is all of the stream."""
        if residual_te is None:
            normed_te, residual_te = self.attention_norm(x_te), x_te
        else:
            normed_te, residual_te = self.attention_norm.add(x_te, residual_te)
        attended_te = self._out(self.attention(normed_te, kv_layer, step), self.attention_out_norm)
        if self.parallel:
            seen_te = normed_te if self.mlp_norm is None else self.mlp_norm(residual_te)
            return attended_te + self._out(self.mlp(seen_te), self.mlp_out_norm), residual_te
        assert self.mlp_norm is not None
        normed_te, residual_te = self.mlp_norm.add(attended_te, residual_te)
        if self.sum_norm is not None:
            return self.sum_norm.add(self.mlp(normed_te), normed_te)[0], None
        return self._out(self.mlp(normed_te), self.mlp_out_norm), residual_te

    def _out(self, x_te: Tensor, norm: Norm | None) -> Tensor:
        x_te = x_te if norm is None else norm(x_te)
        return x_te if self.multiplier == 1.0 else x_te * self.multiplier


class Decoder:
    """A tree of plain modules; parameters' paths (`models.slots`) are its attribute paths. `projection` brings hidden
    states to another width in the end, if the head wants one. `per_layer` makes each layer's own input `[t, l, p]` of
    tokens and their embedding, and `widen` several streams of that, in models that have these. `kv_layers`: which layer
    of the cache a layer's keys and values are in. `logit_multiplier` and `logit_softcap` as in `Arch`. `head`: of a
    model that generates; another has `pooling`."""

    def __init__(
        self,
        *,
        embedding: InputEmbedding,
        per_layer: Callable[[Tensor, Tensor], Tensor] | None,
        widen: Callable[[Tensor], Tensor] | None,
        layers: Sequence[DecoderLayer],
        kv_layers: Sequence[int],
        norm: Norm,
        projection: Linear | None,
        head: Linear | None,
        pooling: Pooler | None = None,
        logit_multiplier: float,
        logit_softcap: float | None,
        kernels: Kernels,
    ) -> None:
        self.embedding = embedding
        self.per_layer = per_layer
        self.widen = widen
        self.layers = list(layers)
        self.kv_layers = tuple(kv_layers)
        self.norm = norm
        self.projection = projection
        self.head = head
        self.pooling = pooling
        self.logit_multiplier = logit_multiplier
        self.logit_softcap = logit_softcap
        self.kernels = kernels
        self.stack: Stack | None = None
        """All layers as one call; without it the layers run op by op, to the same bits. See `models.stack`."""

    def forward(self, batch: ForwardBatch, kv: KVCache) -> Tensor:
        """One step: writes K and V of all its tokens to `kv`, returns the normed hidden states of `logits_rows_s`, as
        `logits` and `pooling` want them: `[s, e]`, or as wide as `projection` makes them."""
        hidden_se = self._hidden(batch, kv)
        return hidden_se if self.projection is None else self.projection(hidden_se)

    def _hidden(self, batch: ForwardBatch, kv: KVCache) -> Tensor:
        if self.stack is not None:
            assert kv.num_groups == 1
            return self.stack(
                StackInputs(
                    token_ids_t=batch.token_ids_t,
                    positions_t=batch.positions_t,
                    slots_t=batch.slots_t,
                    rows_s=batch.logits_rows_s,
                    requests=paged_requests(batch, 0, kv.block_size),
                    kv=kv.data,
                )
            )
        return self._op_by_op(batch, kv)

    @torch.inference_mode()
    def _op_by_op(self, batch: ForwardBatch, kv: KVCache) -> Tensor:
        steps = step_contexts([layer.attention for layer in self.layers], self.kv_layers, batch, kv)
        x_te = self.embedding(batch.token_ids_t, batch.positions_t, batch.token_types_t)
        own_tlp = None if self.per_layer is None else self.per_layer(batch.token_ids_t, x_te)
        if self.widen is not None:
            x_te = self.widen(x_te)
        residual_te: Tensor | None = None
        for index, (layer, step) in enumerate(zip(self.layers, steps, strict=True)):
            seen = step if own_tlp is None else replace(step, own_tp=own_tlp[:, index])
            x_te, residual_te = layer(x_te, residual_te, kv.layer(self.kv_layers[index]), seen)
        rows = batch.logits_rows_s
        x_se = x_te.index_select(0, rows)
        return self.norm(x_se) if residual_te is None else self.norm.add(x_se, residual_te.index_select(0, rows))[0]

    @property
    def block_sizes(self) -> tuple[int, ...]:
        """Of any layer: one kernel serves them all."""
        return self.layers[0].attention.block_sizes

    def block_shapes(self, block_size: int) -> list[tuple[int, int, int]]:
        """(planes, heads, bytes) of a block in each layer of the cache: see `nn.kv.KVCache`."""
        owners = [self.kv_layers.index(layer) for layer in range(1 + max(self.kv_layers))]
        return [self.layers[owner].attention.block_shape(block_size) for owner in owners]

    @property
    def table_bytes(self) -> int:
        """Of the tables of rotary positions, one for each kind that the layers have."""
        ropes = {layer.attention.rope for layer in self.layers}
        return sum(rope.cos.nbytes + rope.sin.nbytes for rope in ropes if rope is not None)

    def logits(self, hidden_se: Tensor) -> Tensor:
        """The head: float32 logits `[s, v]`. Apart from `forward`, so that the caller can bound how many rows of a
        large vocabulary are in memory at one time."""
        assert self.head is not None, "a pooling model has no logits"
        logits_sv = self.head.wide(hidden_se)
        if self.logit_multiplier != 1.0:
            logits_sv.mul_(self.logit_multiplier)
        if self.logit_softcap is not None:
            logits_sv.div_(self.logit_softcap).tanh_().mul_(self.logit_softcap)
        return logits_sv
