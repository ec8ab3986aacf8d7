"""DBRX: layer norm, clipped queries, keys and values, experts in three tall tensors."""

from __future__ import annotations

from dataclasses import replace

from quire.models.arch import Arch, Experts, LayerKind, NormKind
from quire.models.arch_fields import read_activation, read_arch
from quire.models.family import Family, Names, Part, qkv
from quire.models.model_config import ModelConfig
from quire.models.rope_fields import read_rope


def _arch(config: ModelConfig) -> Arch:
    config = config.renamed(
        hidden_size="d_model",
        num_hidden_layers="n_layers",
        num_attention_heads="n_heads",
        max_position_embeddings="max_seq_len",
    )
    attention, ffn = config.section("attn_config"), config.section("ffn_config")
    arch = read_arch(
        config,
        architecture="DbrxForCausalLM",
        max_positions=2048,
        norm=NormKind(kind="layer", eps=1e-5),
        rotary=False,
        intermediate_size=ffn.integer("ffn_hidden_size", 3584),
    )
    num_kv_heads = attention.integer("kv_n_heads", 1)
    if arch.num_heads % num_kv_heads:
        raise attention.fault("kv_n_heads", num_kv_heads, f"a divisor of n_heads, {arch.num_heads}")
    # Checkpoints of the hub have the base in attn_config, transformers 5 in rope_parameters.
    rope = read_rope(
        config,
        head_dim=arch.head_dim,
        max_positions=arch.max_positions,
        theta=attention.number("rope_theta", 10_000.0),
    )
    num, top_k = ffn.integer("moe_num_experts", 4), ffn.integer("moe_top_k", 1)
    if top_k > num:
        raise ffn.fault("moe_top_k", top_k, f"at most moe_num_experts, {num}")
    power = ffn.number("moe_normalize_expert_weights", 1.0)
    if power != 1.0:
        raise ffn.fault("moe_normalize_expert_weights", power, "1 or null")
    return replace(
        arch,
        num_kv_heads=num_kv_heads,
        layer_kinds=(LayerKind(rope=rope),) * arch.num_layers,
        clip_qkv=attention.optional_number("clip_qkv"),
        activation=read_activation(ffn.section("ffn_act_fn"), "silu", "name"),
        experts=Experts(
            num=num,
            top_k=top_k,
            intermediate_size=arch.intermediate_size,
            renormalize=not ffn.says_null("moe_normalize_expert_weights"),
        ),
    )


_NAMES: Names = {
    "embedding": "transformer.wte",
    "layers.{}.attention_norm": "transformer.blocks.{}.norm_attn_norm.norm_1",
    **qkv("transformer.blocks.{}.norm_attn_norm.attn.Wqkv"),
    "layers.{}.attention.o": "transformer.blocks.{}.norm_attn_norm.attn.out_proj",
    "layers.{}.mlp_norm": "transformer.blocks.{}.norm_attn_norm.norm_2",
    "layers.{}.mlp.router": "transformer.blocks.{}.ffn.router.layer",
    "layers.{}.mlp.experts.{expert}.gate.weight": Part(
        tensor="transformer.blocks.{}.ffn.experts.mlp.w1", stacked="rows"
    ),
    "layers.{}.mlp.experts.{expert}.up.weight": Part(tensor="transformer.blocks.{}.ffn.experts.mlp.v1", stacked="rows"),
    "layers.{}.mlp.experts.{expert}.down.weight": Part(
        tensor="transformer.blocks.{}.ffn.experts.mlp.w2", stacked="rows", transposed=True
    ),
    "norm": "transformer.norm_f",
    "head": "lm_head",
}

FAMILIES = (Family(architecture="DbrxForCausalLM", arch=_arch, names=_NAMES),)
