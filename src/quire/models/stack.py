"""Hands a decoder's layers to a back end that runs them in one call."""

from __future__ import annotations

from torch import Tensor

from quire.models.decoder import Decoder, DecoderLayer
from quire.nn.layers import MLP, Linear, RMSNorm
from quire.ops.stack import Stack, StackDescription, StackLayer, StackLinear


def stack_of(decoder: Decoder) -> Stack | None:
    """The decoder's layers as one call, or None where the kernels have none, or none for layers like these."""
    build = decoder.kernels.stack
    if build is None:
        return None
    layers = [_layer(layer) for layer in decoder.layers]
    described = [layer for layer in layers if layer is not None]
    if len(described) < len(layers):
        return None
    return build(
        StackDescription(
            layers=described,
            embedding=decoder.embedding.weight,
            norm=decoder.norm.weight,
            cos=decoder.rope.cos,
            sin=decoder.rope.sin,
            eps=decoder.norm.eps,
            attention=decoder.layers[0].attention.shape,
        )
    )


def _layer(layer: DecoderLayer) -> StackLayer | None:
    """None for a feed-forward block of another build: a mixture of experts."""
    attention, mlp = layer.attention, layer.mlp
    if not isinstance(mlp, MLP):
        return None
    return StackLayer(
        attention_norm=layer.attention_norm.weight,
        q=_linear(attention.q),
        k=_linear(attention.k),
        v=_linear(attention.v),
        o=_linear(attention.o),
        q_norm=_weight(attention.q_norm),
        k_norm=_weight(attention.k_norm),
        mlp_norm=layer.mlp_norm.weight,
        gate=_linear(mlp.gate),
        up=_linear(mlp.up),
        down=_linear(mlp.down),
    )


def _linear(linear: Linear) -> StackLinear:
    return StackLinear(weight=linear.weight, bias=linear.bias)


def _weight(norm: RMSNorm | None) -> Tensor | None:
    return None if norm is None else norm.weight
