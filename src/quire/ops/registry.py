"""All ops, and all implementations of them."""

from __future__ import annotations

from quire.core.registry import Registry
from quire.ops.activation import ACTIVATION, GATED_ACTIVATION
from quire.ops.attention import ATTENTION
from quire.ops.cpu import attention, latent_attention, linear, moe, rows, sampling
from quire.ops.draw import DRAW
from quire.ops.embedding import EMBEDDING
from quire.ops.latent_attention import LATENT_ATTENTION
from quire.ops.latent_index import LATENT_INDEX
from quire.ops.layer_norm import ADD_LAYER_NORM, LAYER_NORM
from quire.ops.linear import LINEARS
from quire.ops.moe import MOE
from quire.ops.norm import ADD_RMS_NORM, RMS_NORM
from quire.ops.op import Implementation, Op
from quire.ops.reference.attention import ReferenceAttention
from quire.ops.reference.latent_attention import ReferenceLatentAttention
from quire.ops.reference.latent_index import ReferenceLatentIndex
from quire.ops.reference.linear import ReferenceLinear, ReferenceQuantizedLinear
from quire.ops.reference.moe import ReferenceMoe
from quire.ops.rotary import ROPE
from quire.ops.sampling import SAMPLE, TOKEN_LOGPROBS
from quire.ops.target import Target
from quire.ops.triton import implementations as triton_kernels

AS_DEFINED = (
    ACTIVATION,
    ADD_LAYER_NORM,
    ADD_RMS_NORM,
    DRAW,
    EMBEDDING,
    GATED_ACTIVATION,
    LAYER_NORM,
    RMS_NORM,
    ROPE,
    SAMPLE,
    TOKEN_LOGPROBS,
)
"""Ops whose definition is the reference back end's implementation as well."""


def op_registry() -> Registry[Op]:
    registry: Registry[Op] = Registry("op")
    for op in (*AS_DEFINED, ATTENTION, LATENT_ATTENTION, LATENT_INDEX, *LINEARS, MOE):
        registry.add(op.name, op)
    return registry


def implementations() -> list[Implementation]:
    """Every implementation that this installation has, whether or not it fits this machine."""
    reference = [_as_defined(op) for op in AS_DEFINED]
    reference.append(
        Implementation(
            op="linear",
            backend="reference",
            build=lambda _target: ReferenceLinear(),
            unfit=_fits_anywhere,
            preference=0,
            note="torch's matrix product, in row counts that were checked to give the same bits",
        )
    )
    reference.extend(
        Implementation(
            op=op.name,
            backend="reference",
            build=lambda _target: ReferenceQuantizedLinear(),
            unfit=_fits_anywhere,
            preference=0,
            note="the weight written out in float32 for each call",
        )
        for op in LINEARS[1:]
    )
    reference.append(
        Implementation(
            op="moe",
            backend="reference",
            build=lambda _target: ReferenceMoe(),
            unfit=_fits_anywhere,
            preference=0,
            note="expert by expert, with the reference's linear layers",
        )
    )
    reference.append(
        Implementation(
            op="attention",
            backend="reference",
            build=ReferenceAttention,
            unfit=_fits_anywhere,
            preference=0,
            note="online softmax over gathered key tiles, scores in float32",
        )
    )
    reference.append(
        Implementation(
            op="latent_attention",
            backend="reference",
            build=ReferenceLatentAttention,
            unfit=_fits_anywhere,
            preference=0,
            note="the reference's attention, over latents that are not expanded",
        )
    )
    reference.append(
        Implementation(
            op="latent_index",
            backend="reference",
            build=ReferenceLatentIndex,
            unfit=_fits_anywhere,
            preference=0,
            note="single tokens against gathered key tiles, scores in float32",
        )
    )
    return [
        *reference,
        *attention.implementations(),
        *latent_attention.implementations(),
        *linear.implementations(),
        *moe.implementations(),
        *rows.implementations(),
        *sampling.implementations(),
        *triton_kernels.implementations(),
    ]


def _as_defined(op: Op) -> Implementation:
    return Implementation(
        op=op.name,
        backend="reference",
        build=lambda _target: op.definition,
        unfit=_fits_anywhere,
        preference=0,
        note="the op's definition, in torch",
    )


def _fits_anywhere(_target: Target) -> str | None:
    return None
