"""Cohere and Cohere 2: parallel blocks with one layer norm, interleaved rotation, scaled logits."""

from __future__ import annotations

from dataclasses import replace

from quire.models.arch import Arch, QKNorm
from quire.models.arch_fields import (
    FULL,
    SLIDING,
    every_nth_full,
    layer_norm,
    read_arch,
    read_layer_types,
    sliding_kinds,
)
from quire.models.families.llama import IGNORED, NAMES
from quire.models.family import Family, Part
from quire.models.model_config import ModelConfig


def _base(config: ModelConfig, architecture: str, theta: float) -> Arch:
    bias = config.boolean("attention_bias", False)
    return replace(
        read_arch(
            config,
            architecture=architecture,
            max_positions=8192,
            norm=layer_norm(config, bias=False),
            theta=theta,
            tied=True,
        ),
        parallel=True,
        shared_norm=True,
        rope_interleaved=True,
        qkv_bias=bias,
        o_bias=bias,
        logit_multiplier=config.number("logit_scale", 0.0625),
    )


def _cohere(config: ModelConfig) -> Arch:
    arch = _base(config, "CohereForCausalLM", 500_000.0)
    normed = config.boolean("use_qk_norm", False)
    return replace(arch, qk_norm=QKNorm(norm=arch.norm, over="own_heads") if normed else None)


def _cohere2(config: ModelConfig) -> Arch:
    """Layers without a window see no positions."""
    arch = _base(config, "Cohere2ForCausalLM", 10_000.0)
    pattern = config.integer("sliding_window_pattern", 4)
    types = read_layer_types(config, arch.num_layers, every_nth_full(arch.num_layers, pattern))
    ropes = {FULL: None, SLIDING: arch.layer_kinds[0].rope}
    return replace(arch, layer_kinds=sliding_kinds(config, types, ropes, window=4096))


_NAMES = {
    **NAMES,
    "layers.{}.attention.q_norm.heads.{expert}": Part(
        tensor="model.layers.{}.self_attn.q_norm", stacked="first", count="num_heads"
    ),
    "layers.{}.attention.k_norm.heads.{expert}": Part(
        tensor="model.layers.{}.self_attn.k_norm", stacked="first", count="num_kv_heads"
    ),
}

FAMILIES = (
    Family(architecture="CohereForCausalLM", arch=_cohere, names=_NAMES, ignored=IGNORED),
    Family(architecture="Cohere2ForCausalLM", arch=_cohere2, names=NAMES, ignored=IGNORED),
)
