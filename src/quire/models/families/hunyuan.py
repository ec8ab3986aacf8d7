"""Hunyuan (dense): queries and keys are normalised after they are rotated."""

from __future__ import annotations

from dataclasses import replace

from quire.models.arch import Arch, LayerKind, QKNorm
from quire.models.arch_fields import read_arch, rms_norm
from quire.models.families.llama import IGNORED, NAMES
from quire.models.family import Family
from quire.models.model_config import ModelConfig


def _arch(config: ModelConfig) -> Arch:
    arch = read_arch(config, architecture="HunYuanDenseV1ForCausalLM", max_positions=2048, norm=rms_norm(config, 1e-5))
    bias = config.boolean("attention_bias", False)
    return replace(
        arch,
        layer_kinds=_stretched(config, arch),
        qkv_bias=bias,
        o_bias=bias,
        qk_norm=QKNorm(norm=arch.norm, after_rope=True),
    )


def _stretched(config: ModelConfig, arch: Arch) -> tuple[LayerKind, ...]:
    """Its "dynamic" scaling with `alpha` is a larger base for every length."""
    section = config.section("rope_scaling" if "rope_scaling" in config else "rope_parameters")
    rope = arch.layer_kinds[0].rope
    assert rope is not None
    if rope.rope_type == "dynamic" and "alpha" in section:
        theta = rope.theta * section.number("alpha") ** (rope.dim / (rope.dim - 2))
        rope = replace(rope, rope_type="default", theta=theta)
    return (LayerKind(rope=rope),) * arch.num_layers


_NAMES = {
    **NAMES,
    "layers.{}.attention.q_norm": "model.layers.{}.self_attn.query_layernorm",
    "layers.{}.attention.k_norm": "model.layers.{}.self_attn.key_layernorm",
}

FAMILIES = (Family(architecture="HunYuanDenseV1ForCausalLM", arch=_arch, names=_NAMES, ignored=IGNORED),)
