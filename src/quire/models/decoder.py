"""The decoder: one class for every model that `Arch`'s flags can describe.

Legend: t tokens of the step, s rows that need logits, e hidden size, v vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from quire.models.arch import Arch
from quire.nn.attention import Attention, StepContext
from quire.nn.batch import ForwardBatch
from quire.nn.kv import KVCache
from quire.nn.layers import MLP, Embedding, Linear, RMSNorm
from quire.nn.moe import SparseMLP
from quire.nn.rope import RopeTable
from quire.ops.attention import AttentionShape, PagedRequests
from quire.ops.kernels import Kernels
from quire.ops.stack import Stack, StackInputs
from quire.ops.weight import PackedWeight, Weight


class DecoderLayer:
    """Pre-norm attention and feed-forward blocks around a residual stream."""

    def __init__(self, attention_norm: RMSNorm, attention: Attention, mlp_norm: RMSNorm, mlp: MLP | SparseMLP) -> None:
        self.attention_norm = attention_norm
        self.attention = attention
        self.mlp_norm = mlp_norm
        self.mlp = mlp

    def __call__(
        self, x_te: Tensor, residual_te: Tensor | None, kv_layer: Tensor, step: StepContext
    ) -> tuple[Tensor, Tensor]:
        """`x_te` is what the layer before adds to the residual stream: each norm does the addition on its way in."""
        if residual_te is None:
            normed_te, residual_te = self.attention_norm(x_te), x_te
        else:
            normed_te, residual_te = self.attention_norm.add(x_te, residual_te)
        x_te = self.attention(normed_te, kv_layer, step)
        normed_te, residual_te = self.mlp_norm.add(x_te, residual_te)
        return self.mlp(normed_te), residual_te


class Decoder:
    """A tree of plain modules; the weight table's parameter paths are its attribute paths."""

    def __init__(
        self,
        *,
        embedding: Embedding,
        layers: list[DecoderLayer],
        norm: RMSNorm,
        head: Linear,
        rope: RopeTable,
        kernels: Kernels,
    ) -> None:
        self.embedding = embedding
        self.layers = layers
        self.norm = norm
        self.head = head
        self.rope = rope
        self.kernels = kernels
        self.stack: Stack | None = None
        """All layers as one call; without it the layers run op by op, to the same bits. See `models.stack`."""

    def forward(self, batch: ForwardBatch, kv: KVCache) -> Tensor:
        """One step: writes K and V of all its tokens to `kv`, returns the normed hidden states `[s, e]` of
        `logits_rows_s`, for `logits`."""
        requests = PagedRequests(
            query_start=batch.query_start,
            context_lens=batch.context_lens,
            block_table_rb=batch.block_table_rb,
            block_size=kv.block_size,
        )
        if self.stack is not None:
            return self.stack(
                StackInputs(
                    token_ids_t=batch.token_ids_t,
                    positions_t=batch.positions_t,
                    slots_t=batch.slots_t,
                    rows_s=batch.logits_rows_s,
                    requests=requests,
                    kv=kv.data,
                )
            )
        return self._op_by_op(batch, kv, requests)

    @torch.inference_mode()
    def _op_by_op(self, batch: ForwardBatch, kv: KVCache, requests: PagedRequests) -> Tensor:
        step = self._step(batch, requests)
        x_te, residual_te = self.embedding(batch.token_ids_t), None
        for index, layer in enumerate(self.layers):
            x_te, residual_te = layer(x_te, residual_te, kv.layer(index), step)
        assert residual_te is not None
        rows = batch.logits_rows_s
        normed_se, _ = self.norm.add(x_te.index_select(0, rows), residual_te.index_select(0, rows))
        return normed_se

    def logits(self, hidden_se: Tensor) -> Tensor:
        """The head: float32 logits `[s, v]`. Apart from `forward`, so that the caller can bound how many rows of a
        large vocabulary are in memory at one time."""
        return self.head.wide(hidden_se)

    def _step(self, batch: ForwardBatch, requests: PagedRequests) -> StepContext:
        cos, sin = self.rope.rows(batch.positions_t)
        plan = self.kernels.attention.plan(self.layers[0].attention.shape, requests)
        return StepContext(plan=plan, cos=cos, sin=sin, slots_t=batch.slots_t)


def build_decoder(
    arch: Arch, parameters: Mapping[str, Weight | PackedWeight], kernels: Kernels, *, max_model_len: int
) -> Decoder:
    """The decoder that `arch` describes, around `parameters` by path (see `models.weights`).

    Each is packed before the next one is asked for. A tied head that is among them is a copy, quantised or
    packed before.
    """

    def plain(path: str) -> Tensor:
        weight = parameters[path]
        assert isinstance(weight, Tensor)
        return weight

    def linear(path: str, bias: bool) -> Linear:
        bias_n = plain(f"{path}.bias") if bias else None
        return Linear(parameters[f"{path}.weight"], bias_n, kernels)

    def norm(path: str) -> RMSNorm:
        return RMSNorm(plain(f"{path}.weight"), arch.rms_norm_eps, kernels)

    shape = AttentionShape(
        num_heads=arch.num_heads,
        num_kv_heads=arch.num_kv_heads,
        head_dim=arch.head_dim,
        scale=arch.head_dim**-0.5,
    )

    def mlp(path: str) -> MLP:
        return MLP(
            gate=linear(f"{path}.gate", arch.mlp_bias),
            up=linear(f"{path}.up", arch.mlp_bias),
            down=linear(f"{path}.down", arch.mlp_bias),
            kernels=kernels,
        )

    def sparse_mlp(path: str) -> SparseMLP:
        return SparseMLP(
            linear(f"{path}.router", False),
            [mlp(f"{path}.experts.{expert}") for expert in range(arch.num_experts)],
            top_k=arch.num_experts_per_tok,
            renormalize=arch.norm_topk_prob,
            kernels=kernels,
        )

    def layer(index: int) -> DecoderLayer:
        path = f"layers.{index}"
        attention = Attention(
            q=linear(f"{path}.attention.q", arch.qkv_bias),
            k=linear(f"{path}.attention.k", arch.qkv_bias),
            v=linear(f"{path}.attention.v", arch.qkv_bias),
            o=linear(f"{path}.attention.o", arch.o_bias),
            q_norm=norm(f"{path}.attention.q_norm") if arch.qk_norm else None,
            k_norm=norm(f"{path}.attention.k_norm") if arch.qk_norm else None,
            shape=shape,
            kernels=kernels,
        )
        block = sparse_mlp(f"{path}.mlp") if arch.is_sparse(index) else mlp(f"{path}.mlp")
        return DecoderLayer(norm(f"{path}.attention_norm"), attention, norm(f"{path}.mlp_norm"), block)

    embedding = Embedding(plain("embedding.weight"), kernels)
    return Decoder(
        embedding=embedding,
        layers=[layer(index) for index in range(arch.num_layers)],
        norm=norm("norm"),
        head=linear("head", False) if "head.weight" in parameters else Linear(embedding.weight, None, kernels),
        rope=RopeTable(arch.rope, max_model_len, embedding.weight.device),
        kernels=kernels,
    )
