"""Falcon: rotated or with slopes; one norm or two for its parallel blocks."""

from __future__ import annotations

from dataclasses import replace

from quire.models.arch import Arch
from quire.models.arch_fields import alibi_slopes, layer_norm, read_arch
from quire.models.family import Family, Names, qkv
from quire.models.model_config import ModelConfig


def _arch(config: ModelConfig) -> Arch:
    new = config.boolean("new_decoder_architecture", False)
    config = config.renamed(
        layer_norm_eps="layer_norm_epsilon",
        hidden_act="activation",
        intermediate_size="ffn_hidden_size",
        num_key_value_heads="num_kv_heads",
    )
    alibi, bias = config.boolean("alibi", False), config.boolean("bias", False)
    arch = read_arch(
        config,
        architecture="FalconForCausalLM",
        max_positions=2048,
        norm=layer_norm(config, bias=True),
        grouped=new,
        rotary=not alibi,
        activation="gelu",
        tied=True,
        intermediate_size=4 * config.integer("hidden_size"),
    )
    parallel = new or config.boolean("parallel_attn", True)
    num_norms = config.integer("num_ln_in_parallel_attn", 2 if new else 1)
    # Slopes are added before the scores are scaled.
    slopes = tuple(slope * arch.attention_scale for slope in alibi_slopes(arch.num_heads)) if alibi else None
    return replace(
        arch,
        num_kv_heads=1 if not new and config.boolean("multi_query", True) else arch.num_kv_heads,
        parallel=parallel,
        shared_norm=parallel and num_norms == 1,
        gated=False,
        alibi_slopes=slopes,
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=bias,
    )


def _names(arch: Arch) -> Names:
    two = arch.parallel and not arch.shared_norm
    return {
        "embedding": "transformer.word_embeddings",
        "layers.{}.attention_norm": "transformer.h.{}.ln_attn" if two else "transformer.h.{}.input_layernorm",
        **qkv("transformer.h.{}.self_attention.query_key_value", groups="num_kv_heads"),
        "layers.{}.attention.o": "transformer.h.{}.self_attention.dense",
        "layers.{}.mlp_norm": "transformer.h.{}.ln_mlp" if two else "transformer.h.{}.post_attention_layernorm",
        "layers.{}.mlp.up": "transformer.h.{}.mlp.dense_h_to_4h",
        "layers.{}.mlp.down": "transformer.h.{}.mlp.dense_4h_to_h",
        "norm": "transformer.ln_f",
        "head": "lm_head",
    }


FAMILIES = (Family(architecture="FalconForCausalLM", arch=_arch, names=_names),)
