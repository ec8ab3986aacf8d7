"""Llama 1 to 3, and the many checkpoints that took over its shape."""

from __future__ import annotations

from dataclasses import replace

from quire.models.arch import Arch
from quire.models.arch_fields import read_arch
from quire.models.family import Family, Names, alias
from quire.models.model_config import ModelConfig

NAMES: Names = {
    "embedding": "model.embed_tokens",
    "layers.{}.attention_norm": "model.layers.{}.input_layernorm",
    "layers.{}.attention.q": "model.layers.{}.self_attn.q_proj",
    "layers.{}.attention.k": "model.layers.{}.self_attn.k_proj",
    "layers.{}.attention.v": "model.layers.{}.self_attn.v_proj",
    "layers.{}.attention.o": "model.layers.{}.self_attn.o_proj",
    "layers.{}.attention.q_norm": "model.layers.{}.self_attn.q_norm",
    "layers.{}.attention.k_norm": "model.layers.{}.self_attn.k_norm",
    "layers.{}.mlp_norm": "model.layers.{}.post_attention_layernorm",
    "layers.{}.mlp.gate": "model.layers.{}.mlp.gate_proj",
    "layers.{}.mlp.up": "model.layers.{}.mlp.up_proj",
    "layers.{}.mlp.down": "model.layers.{}.mlp.down_proj",
    "norm": "model.norm",
    "head": "lm_head",
}
"""The names that most families of `transformers` use."""

IGNORED = ("model.layers.*.self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq")
"""Written by old versions of `transformers`: a table that follows from the configuration."""


def _arch(config: ModelConfig) -> Arch:
    bias = config.boolean("attention_bias", False)
    return replace(
        read_arch(config, architecture="LlamaForCausalLM", max_positions=2048),
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=config.boolean("mlp_bias", False),
    )


LLAMA = Family(architecture="LlamaForCausalLM", arch=_arch, names=NAMES, ignored=IGNORED)

FAMILIES = (
    LLAMA,
    alias(LLAMA, "AquilaForCausalLM"),
    alias(LLAMA, "AquilaModel"),
    alias(LLAMA, "IQuestCoderForCausalLM"),
    alias(LLAMA, "XverseForCausalLM"),
)
