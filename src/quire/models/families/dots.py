"""dots.llm1: queries and keys normed, windows in late layers, experts with a correction."""

from __future__ import annotations

from dataclasses import replace

from quire.models.arch import Arch, Experts, QKNorm
from quire.models.arch_fields import (
    FULL,
    SLIDING,
    read_arch,
    read_experts,
    read_groups,
    read_layer_types,
    sliding_kinds,
)
from quire.models.families.llama import IGNORED, NAMES
from quire.models.family import Family, Names, experts, shared_expert
from quire.models.model_config import ModelConfig


def _arch(config: ModelConfig) -> Arch:
    config = config.renamed(num_experts="n_routed_experts")
    arch = read_arch(config, architecture="Dots1ForCausalLM", max_positions=2048)
    bias, rope = config.boolean("attention_bias", False), arch.layer_kinds[0].rope
    first = (
        arch.num_layers if config.says_null("sliding_window") else config.integer("max_window_layers", 62, minimum=0)
    )
    default = [SLIDING if layer >= first else FULL for layer in range(arch.num_layers)]
    types = read_layer_types(config, arch.num_layers, default)
    num, top_k = read_experts(config)
    groups, chosen = read_groups(config, num, top_k)
    inner = config.integer("moe_intermediate_size")
    return replace(
        arch,
        layer_kinds=sliding_kinds(config, types, {FULL: rope, SLIDING: rope}, window=4096),
        qkv_bias=bias,
        o_bias=bias,
        qk_norm=QKNorm(norm=arch.norm),
        experts=Experts(
            num=num,
            top_k=top_k,
            intermediate_size=inner,
            scoring="sigmoid",
            correction=True,
            renormalize=config.boolean("norm_topk_prob", False),
            scale=config.number("routed_scaling_factor", 1.0),
            num_groups=groups,
            top_groups=chosen,
            shared_size=inner * config.integer("n_shared_experts"),
            dense_layers=tuple(range(config.integer("first_k_dense_replace", 0, minimum=0))),
        ),
    )


_NAMES: Names = {
    **NAMES,
    "layers.{}.mlp.router": "model.layers.{}.mlp.gate",
    "layers.{}.mlp.correction": "model.layers.{}.mlp.gate.e_score_correction_bias",
    **experts("model.layers.{}.mlp.experts"),
    **shared_expert("model.layers.{}.mlp.shared_experts"),
}

FAMILIES = (Family(architecture="Dots1ForCausalLM", arch=_arch, names=_NAMES, ignored=IGNORED),)
