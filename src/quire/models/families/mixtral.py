"""Mixtral, PhiMoE and MiniMax-M2: experts under `block_sparse_moe`."""

from __future__ import annotations

from dataclasses import replace

from quire.models.arch import Arch, Experts, LayerKind, NormKind, QKNorm
from quire.models.arch_fields import FULL, SLIDING, read_arch, read_experts, rms_norm, sliding_kinds
from quire.models.families.llama import IGNORED, NAMES
from quire.models.family import Family, Names, experts
from quire.models.model_config import ModelConfig
from quire.nn.rope_config import RopeConfig


def _windowed(config: ModelConfig, arch: Arch) -> tuple[LayerKind, ...]:
    rope = arch.layer_kinds[0].rope
    types = (SLIDING if "sliding_window" in config else FULL,) * arch.num_layers
    return sliding_kinds(config, types, {FULL: rope, SLIDING: rope})


def _mixtral(config: ModelConfig) -> Arch:
    config = config.renamed(num_experts="num_local_experts")
    arch = read_arch(
        config,
        architecture="MixtralForCausalLM",
        max_positions=131072,
        norm=rms_norm(config, 1e-5),
        theta=1_000_000.0,
    )
    num, top_k = read_experts(config, num=8, top_k=2)
    sparse = Experts(num=num, top_k=top_k, intermediate_size=arch.intermediate_size, renormalize=True)
    return replace(arch, layer_kinds=_windowed(config, arch), experts=sparse)


def _phimoe(config: ModelConfig) -> Arch:
    config = config.renamed(num_experts="num_local_experts")
    norm = NormKind(kind="layer", eps=config.number("rms_norm_eps", 1e-5), bias=True)
    arch = read_arch(config, architecture="PhimoeForCausalLM", max_positions=131072, norm=norm, theta=1_000_000.0)
    num, top_k = read_experts(config, num=16, top_k=2)
    bias = config.boolean("attention_bias", False)
    sparse = Experts(
        num=num,
        top_k=top_k,
        intermediate_size=arch.intermediate_size,
        scoring="sparsemixer",
        jitter=config.number("router_jitter_noise", 0.01),
    )
    kinds = tuple(replace(kind, rope=_magnified(config, kind)) for kind in _windowed(config, arch))
    return replace(
        arch,
        layer_kinds=kinds,
        qkv_bias=bias,
        o_bias=bias,
        head_bias=config.boolean("lm_head_bias", False),
        experts=sparse,
    )


def _magnified(config: ModelConfig, kind: LayerKind) -> RopeConfig | None:
    """Its longrope names the factor of short and long contexts; both are the same in practice."""
    rope = kind.rope
    section = config.section("rope_scaling" if "rope_scaling" in config else "rope_parameters")
    if rope is None or rope.rope_type != "longrope" or "short_mscale" not in section:
        return rope
    short, long = section.number("short_mscale"), section.number("long_mscale")
    if short != long:
        raise section.fault("long_mscale", long, f"short_mscale, {short}")
    return replace(rope, attention_factor=short)


def _minimax_m2(config: ModelConfig) -> Arch:
    config = config.renamed(num_experts="num_local_experts")
    head_dim = config.integer("head_dim", 128)
    arch = read_arch(
        config,
        architecture="MiniMaxM2ForCausalLM",
        max_positions=196608,
        head_dim=128,
        theta=5_000_000.0,
        partial=config.integer("rotary_dim", head_dim) / head_dim,
    )
    num, top_k = read_experts(config, num=256, top_k=8)
    sparse = Experts(
        num=num,
        top_k=top_k,
        intermediate_size=arch.intermediate_size,
        scoring="sigmoid",
        correction=True,
        renormalize=True,
    )
    return replace(arch, qk_norm=QKNorm(norm=arch.norm, over="whole"), experts=sparse)


_NAMES: Names = {
    **NAMES,
    "layers.{}.mlp.router": "model.layers.{}.block_sparse_moe.gate",
    "layers.{}.mlp.correction": "model.layers.{}.block_sparse_moe.e_score_correction_bias",
    **experts("model.layers.{}.block_sparse_moe.experts", gate="w1", up="w3", down="w2"),
}

FAMILIES = (
    Family(architecture="MixtralForCausalLM", arch=_mixtral, names=_NAMES, ignored=IGNORED),
    Family(architecture="PhimoeForCausalLM", arch=_phimoe, names=_NAMES, ignored=IGNORED),
    Family(architecture="MiniMaxM2ForCausalLM", arch=_minimax_m2, names=_NAMES, ignored=IGNORED),
)
