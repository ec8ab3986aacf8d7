"""OPT: learned positions that begin at the third row of their table, ReLU."""

from __future__ import annotations

from dataclasses import replace

from quire.models.arch import Arch
from quire.models.arch_fields import layer_norm, read_arch
from quire.models.family import Family, Names, Part
from quire.models.model_config import ModelConfig


def _arch(config: ModelConfig) -> Arch:
    config = config.renamed(intermediate_size="ffn_dim", hidden_act="activation_function")
    for field in ("do_layer_norm_before", "layer_norm_elementwise_affine"):
        if not config.boolean(field, True):
            raise config.fault(field, False, "true: this layout of the first OPT-350m is not supported")
    hidden_size = config.integer("hidden_size")
    if config.integer("word_embed_proj_dim", hidden_size) != hidden_size:
        raise config.fault("word_embed_proj_dim", config.raw("word_embed_proj_dim"), f"hidden_size, {hidden_size}")
    arch = read_arch(
        config,
        architecture="OPTForCausalLM",
        max_positions=2048,
        norm=layer_norm(config, bias=True),
        grouped=False,
        rotary=False,
        activation="relu",
        tied=True,
    )
    bias = config.boolean("enable_bias", True)
    return replace(
        arch,
        gated=False,
        num_learned_positions=arch.max_positions,
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=bias,
    )


_NAMES: Names = {
    "embedding": "model.decoder.embed_tokens",
    "embedding.positions": Part(tensor="model.decoder.embed_positions", skip=2),
    "layers.{}.attention_norm": "model.decoder.layers.{}.self_attn_layer_norm",
    "layers.{}.attention.q": "model.decoder.layers.{}.self_attn.q_proj",
    "layers.{}.attention.k": "model.decoder.layers.{}.self_attn.k_proj",
    "layers.{}.attention.v": "model.decoder.layers.{}.self_attn.v_proj",
    "layers.{}.attention.o": "model.decoder.layers.{}.self_attn.out_proj",
    "layers.{}.mlp_norm": "model.decoder.layers.{}.final_layer_norm",
    "layers.{}.mlp.up": "model.decoder.layers.{}.fc1",
    "layers.{}.mlp.down": "model.decoder.layers.{}.fc2",
    "norm": "model.decoder.final_layer_norm",
    "head": "lm_head",
}

FAMILIES = (Family(architecture="OPTForCausalLM", arch=_arch, names=_NAMES, optional_prefix="model."),)
