"""Qwen2 and Qwen2.5 (Llama with a bias on queries, keys and values), and Qwen3 (normalised queries and keys)."""

from __future__ import annotations

from dataclasses import replace

from quire.models.arch import Arch, Experts, QKNorm
from quire.models.arch_fields import (
    FULL,
    SLIDING,
    dense_layers,
    qwen_layer_types,
    read_arch,
    read_experts,
    read_layer_types,
    sliding_kinds,
)
from quire.models.families.llama import IGNORED, NAMES
from quire.models.family import Family, Names, experts, qkv, shared_expert
from quire.models.model_config import ModelConfig
from quire.models.rope_fields import read_rope


def _base(config: ModelConfig, architecture: str, head_dim: int | None = None) -> Arch:
    arch = read_arch(config, architecture=architecture, max_positions=32768, head_dim=head_dim)
    rope = arch.layer_kinds[0].rope
    types = qwen_layer_types(config, arch.num_layers)
    return replace(arch, layer_kinds=sliding_kinds(config, types, {FULL: rope, SLIDING: rope}))


def _qwen(config: ModelConfig) -> Arch:
    """The first Qwen counts both halves of the gated block as `intermediate_size`."""
    config = config.renamed(
        max_position_embeddings="seq_length",
        rms_norm_eps="layer_norm_epsilon",
        rope_theta="rotary_emb_base",
        head_dim="kv_channels",
    )
    arch = read_arch(config, architecture="QWenLMHeadModel", max_positions=8192)
    return replace(arch, intermediate_size=arch.intermediate_size // 2, qkv_bias=True)


def _qwen2(config: ModelConfig) -> Arch:
    return replace(_base(config, "Qwen2ForCausalLM"), qkv_bias=True)


def _qwen3(config: ModelConfig) -> Arch:
    return _normed(config, _base(config, "Qwen3ForCausalLM", head_dim=128))


def _normed(config: ModelConfig, arch: Arch) -> Arch:
    bias = config.boolean("attention_bias", False)
    return replace(arch, qkv_bias=bias, o_bias=bias, qk_norm=QKNorm(norm=arch.norm))


def _qwen3_moe(config: ModelConfig) -> Arch:
    arch = _normed(config, _base(config, "Qwen3MoeForCausalLM"))
    return replace(arch, experts=_experts(config, arch, num=128, top_k=8))


def _qwen2_moe(config: ModelConfig) -> Arch:
    arch = _base(config, "Qwen2MoeForCausalLM")
    shared = config.integer("shared_expert_intermediate_size", 5632)
    sparse = replace(_experts(config, arch, num=60, top_k=4), shared_size=shared, shared_gate=True)
    return replace(arch, qkv_bias=config.boolean("qkv_bias", True), experts=sparse)


def _experts(config: ModelConfig, arch: Arch, *, num: int, top_k: int) -> Experts:
    """Layers that are named, and those between every `decoder_sparse_step`-th, have none."""
    # transformers 5 writes num_local_experts, checkpoints of the hub have num_experts.
    if "num_local_experts" in config:
        config = config.renamed(num_experts="num_local_experts")
    num, top_k = read_experts(config, num=num, top_k=top_k)
    named, step = config.integers("mlp_only_layers"), config.integer("decoder_sparse_step", 1)
    return Experts(
        num=num,
        top_k=top_k,
        intermediate_size=config.integer("moe_intermediate_size", 768),
        renormalize=config.boolean("norm_topk_prob", False),
        dense_layers=tuple(layer for layer in range(arch.num_layers) if layer in named or (layer + 1) % step),
    )


def _mellum(config: ModelConfig) -> Arch:
    """Qwen3 with experts, and with windows and their own rotation in some layers."""
    arch = _normed(config, read_arch(config, architecture="MellumForCausalLM", max_positions=131072, head_dim=128))
    types = read_layer_types(config, arch.num_layers, (FULL,) * arch.num_layers)
    full = local = arch.layer_kinds[0].rope
    if SLIDING in config.section("rope_parameters"):
        local = read_rope(config, head_dim=arch.head_dim, max_positions=arch.max_positions, layer_type=SLIDING)
    sparse = _experts(config, arch, num=64, top_k=8)
    return replace(
        arch,
        layer_kinds=sliding_kinds(config, types, {FULL: full, SLIDING: local}, window=1024),
        experts=replace(
            sparse,
            renormalize=config.boolean("norm_topk_prob", True),
            dense_layers=dense_layers(config, arch.num_layers, first_sparse=0),
        ),
    )


_EXPERTS: Names = {
    **NAMES,
    "layers.{}.mlp.router": "model.layers.{}.mlp.gate",
    **experts("model.layers.{}.mlp.experts"),
    **shared_expert("model.layers.{}.mlp.shared_expert"),
    "layers.{}.mlp.shared_gate": "model.layers.{}.mlp.shared_expert_gate",
}

_QWEN: Names = {
    "embedding": "transformer.wte",
    "layers.{}.attention_norm": "transformer.h.{}.ln_1",
    **qkv("transformer.h.{}.attn.c_attn"),
    "layers.{}.attention.o": "transformer.h.{}.attn.c_proj",
    "layers.{}.mlp_norm": "transformer.h.{}.ln_2",
    "layers.{}.mlp.gate": "transformer.h.{}.mlp.w2",
    "layers.{}.mlp.up": "transformer.h.{}.mlp.w1",
    "layers.{}.mlp.down": "transformer.h.{}.mlp.c_proj",
    "norm": "transformer.ln_f",
    "head": "lm_head",
}

FAMILIES = (
    Family(architecture="QWenLMHeadModel", arch=_qwen, names=_QWEN, ignored=("transformer.rotary_emb.inv_freq",)),
    Family(architecture="Qwen2ForCausalLM", arch=_qwen2, names=NAMES, ignored=IGNORED),
    Family(architecture="Qwen3ForCausalLM", arch=_qwen3, names=NAMES, ignored=IGNORED),
    Family(architecture="Qwen2MoeForCausalLM", arch=_qwen2_moe, names=_EXPERTS, ignored=IGNORED),
    Family(architecture="MellumForCausalLM", arch=_mellum, names=_EXPERTS, ignored=IGNORED),
    Family(architecture="Qwen3MoeForCausalLM", arch=_qwen3_moe, names=_EXPERTS, ignored=IGNORED),
)
