"""BLOOM and MPT: positions as slopes (ALiBi), layer norm."""

from __future__ import annotations

from dataclasses import replace

from quire.models.arch import Arch
from quire.models.arch_fields import alibi_slopes, layer_norm, read_arch
from quire.models.family import Family, Names, qkv
from quire.models.model_config import ModelConfig


def _bloom(config: ModelConfig) -> Arch:
    config = config.renamed(
        num_hidden_layers="n_layer",
        num_attention_heads="n_head",
        hidden_size="n_embed" if "n_embed" in config else "hidden_size",
        max_position_embeddings="seq_length",
        layer_norm_eps="layer_norm_epsilon",
    )
    if config.boolean("apply_residual_connection_post_layernorm", False):
        raise config.fault("apply_residual_connection_post_layernorm", True, "false: the other layout is not supported")
    arch = read_arch(
        config,
        architecture="BloomForCausalLM",
        max_positions=2048,
        norm=layer_norm(config, bias=True),
        grouped=False,
        rotary=False,
        activation="gelu_new",
        tied=True,
        intermediate_size=4 * config.integer("hidden_size"),
    )
    return replace(
        arch,
        gated=False,
        alibi_slopes=alibi_slopes(arch.num_heads),
        embedding_norm=True,
        qkv_bias=True,
        o_bias=True,
        mlp_bias=True,
    )


def _mpt(config: ModelConfig) -> Arch:
    config = config.renamed(
        hidden_size="d_model",
        num_hidden_layers="n_layers",
        num_attention_heads="n_heads",
        max_position_embeddings="max_seq_len",
        layer_norm_eps="layer_norm_epsilon",
    )
    attention = config.section("attn_config")
    for section, field, only in (
        (config, "no_bias", True),
        (attention, "alibi", True),
        (attention, "qk_ln", False),
        (attention, "prefix_lm", False),
    ):
        if section.boolean(field, only) != only:
            raise section.fault(field, not only, f"{only}: no other MPT is supported".lower())
    arch = read_arch(
        config,
        architecture="MptForCausalLM",
        max_positions=2048,
        norm=layer_norm(config, bias=False),
        grouped=False,
        rotary=False,
        activation="gelu",
        tied=True,
        intermediate_size=config.integer("expansion_ratio", 4) * config.integer("hidden_size"),
    )
    return replace(
        arch,
        gated=False,
        alibi_slopes=alibi_slopes(arch.num_heads, attention.number("alibi_bias_max", 8.0)),
        attention_scale=attention.number("softmax_scale", arch.attention_scale),
        clip_qkv=attention.optional_number("clip_qkv"),
    )


_BLOOM: Names = {
    "embedding": "transformer.word_embeddings",
    "embedding.norm": "transformer.word_embeddings_layernorm",
    "layers.{}.attention_norm": "transformer.h.{}.input_layernorm",
    **qkv("transformer.h.{}.self_attention.query_key_value", groups="num_kv_heads"),
    "layers.{}.attention.o": "transformer.h.{}.self_attention.dense",
    "layers.{}.mlp_norm": "transformer.h.{}.post_attention_layernorm",
    "layers.{}.mlp.up": "transformer.h.{}.mlp.dense_h_to_4h",
    "layers.{}.mlp.down": "transformer.h.{}.mlp.dense_4h_to_h",
    "norm": "transformer.ln_f",
    "head": "lm_head",
}
_MPT: Names = {
    "embedding": "transformer.wte",
    "layers.{}.attention_norm": "transformer.blocks.{}.norm_1",
    **qkv("transformer.blocks.{}.attn.Wqkv"),
    "layers.{}.attention.o": "transformer.blocks.{}.attn.out_proj",
    "layers.{}.mlp_norm": "transformer.blocks.{}.norm_2",
    "layers.{}.mlp.up": "transformer.blocks.{}.ffn.up_proj",
    "layers.{}.mlp.down": "transformer.blocks.{}.ffn.down_proj",
    "norm": "transformer.norm_f",
    "head": "lm_head",
}

FAMILIES = (
    Family(architecture="BloomForCausalLM", arch=_bloom, names=_BLOOM, optional_prefix="transformer."),
    Family(architecture="MptForCausalLM", arch=_mpt, names=_MPT),
)
