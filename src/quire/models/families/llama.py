"""Llama 1 to 3, and the many checkpoints that took over its shape."""

from __future__ import annotations

from quire.models.arch import Arch
from quire.models.family import Family, Weight, read_common
from quire.models.model_config import ModelConfig

WEIGHTS = (
    Weight("embedding.weight", "model.embed_tokens.weight", ("vocab_size", "hidden_size")),
    Weight("layers.{}.attention_norm.weight", "model.layers.{}.input_layernorm.weight", ("hidden_size",)),
    Weight("layers.{}.attention.q.weight", "model.layers.{}.self_attn.q_proj.weight", ("q_size", "hidden_size")),
    Weight("layers.{}.attention.k.weight", "model.layers.{}.self_attn.k_proj.weight", ("kv_size", "hidden_size")),
    Weight("layers.{}.attention.v.weight", "model.layers.{}.self_attn.v_proj.weight", ("kv_size", "hidden_size")),
    Weight("layers.{}.attention.o.weight", "model.layers.{}.self_attn.o_proj.weight", ("hidden_size", "q_size")),
    Weight("layers.{}.attention.q.bias", "model.layers.{}.self_attn.q_proj.bias", ("q_size",), when="qkv_bias"),
    Weight("layers.{}.attention.k.bias", "model.layers.{}.self_attn.k_proj.bias", ("kv_size",), when="qkv_bias"),
    Weight("layers.{}.attention.v.bias", "model.layers.{}.self_attn.v_proj.bias", ("kv_size",), when="qkv_bias"),
    Weight("layers.{}.attention.o.bias", "model.layers.{}.self_attn.o_proj.bias", ("hidden_size",), when="o_bias"),
    Weight(
        "layers.{}.attention.q_norm.weight", "model.layers.{}.self_attn.q_norm.weight", ("head_dim",), when="qk_norm"
    ),
    Weight(
        "layers.{}.attention.k_norm.weight", "model.layers.{}.self_attn.k_norm.weight", ("head_dim",), when="qk_norm"
    ),
    Weight("layers.{}.mlp_norm.weight", "model.layers.{}.post_attention_layernorm.weight", ("hidden_size",)),
    Weight("layers.{}.mlp.gate.weight", "model.layers.{}.mlp.gate_proj.weight", ("intermediate_size", "hidden_size")),
    Weight("layers.{}.mlp.up.weight", "model.layers.{}.mlp.up_proj.weight", ("intermediate_size", "hidden_size")),
    Weight("layers.{}.mlp.down.weight", "model.layers.{}.mlp.down_proj.weight", ("hidden_size", "intermediate_size")),
    Weight("layers.{}.mlp.gate.bias", "model.layers.{}.mlp.gate_proj.bias", ("intermediate_size",), when="mlp_bias"),
    Weight("layers.{}.mlp.up.bias", "model.layers.{}.mlp.up_proj.bias", ("intermediate_size",), when="mlp_bias"),
    Weight("layers.{}.mlp.down.bias", "model.layers.{}.mlp.down_proj.bias", ("hidden_size",), when="mlp_bias"),
    Weight("norm.weight", "model.norm.weight", ("hidden_size",)),
    Weight("head.weight", "lm_head.weight", ("vocab_size", "hidden_size"), when="untied_head"),
)

# Written by old versions of `transformers`: a table that follows from the configuration.
IGNORED = ("model.layers.*.self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq")


def _arch(config: ModelConfig) -> Arch:
    bias = config.boolean("attention_bias", False)
    return read_common(
        config,
        architecture="LlamaForCausalLM",
        max_positions=2048,
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=config.boolean("mlp_bias", False),
    )


LLAMA = Family(architecture="LlamaForCausalLM", arch=_arch, weights=WEIGHTS, ignored=IGNORED)
