"""GPT-2, GPT-BigCode (StarCoder 1) and GPT-Neo: learned positions, layer norm, biases."""

from __future__ import annotations

from dataclasses import replace

from quire.models.arch import Arch, LayerKind
from quire.models.arch_fields import layer_norm, read_arch
from quire.models.family import Family, Names, Part, qkv
from quire.models.model_config import ModelConfig


def _base(config: ModelConfig, architecture: str) -> Arch:
    arch = read_arch(
        config,
        architecture=architecture,
        max_positions=1024,
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
        num_learned_positions=arch.max_positions,
        attention_scale=arch.attention_scale if config.boolean("scale_attn_weights", True) else 1.0,
        qkv_bias=True,
        o_bias=True,
        mlp_bias=True,
    )


def _renamed(config: ModelConfig) -> ModelConfig:
    return config.renamed(
        hidden_size="n_embd",
        num_hidden_layers="n_layer",
        num_attention_heads="n_head",
        max_position_embeddings="n_positions",
        intermediate_size="n_inner",
        hidden_act="activation_function",
        layer_norm_eps="layer_norm_epsilon",
    )


def _gpt2(config: ModelConfig) -> Arch:
    arch = _base(_renamed(config), "GPT2LMHeadModel")
    if not config.boolean("scale_attn_by_inverse_layer_idx", False):
        return arch
    kinds = tuple(LayerKind(rope=None, scale=1 / (layer + 1)) for layer in range(arch.num_layers))
    return replace(arch, layer_kinds=kinds)


def _bigcode(config: ModelConfig) -> Arch:
    arch = _base(_renamed(config), "GPTBigCodeForCausalLM")
    return replace(arch, num_kv_heads=1) if config.boolean("multi_query", True) else arch


def _neo(config: ModelConfig) -> Arch:
    """Every other layer, or as `attention_layers` says, sees a window; scores are not scaled."""
    config = config.renamed(
        num_hidden_layers="num_layers",
        num_attention_heads="num_heads",
        hidden_act="activation_function",
        layer_norm_eps="layer_norm_epsilon",
    )
    arch = _base(config, "GPTNeoForCausalLM")
    kinds = config.raw("attention_layers") or ["global", "local"] * (arch.num_layers // 2 + 1)
    if not isinstance(kinds, list) or len(kinds) < arch.num_layers or not set(kinds) <= {"global", "local"}:
        raise config.fault("attention_layers", kinds, f"a list of {arch.num_layers} times 'global' or 'local'")
    window = config.integer("window_size", 256)
    return replace(
        arch,
        layer_kinds=tuple(
            LayerKind(rope=None, window=window if kind == "local" else None) for kind in kinds[: arch.num_layers]
        ),
        attention_scale=1.0,
        qkv_bias=False,
    )


_COMMON: Names = {
    "embedding": "transformer.wte",
    "embedding.positions": "transformer.wpe",
    "layers.{}.attention_norm": "transformer.h.{}.ln_1",
    "layers.{}.mlp_norm": "transformer.h.{}.ln_2",
    "layers.{}.mlp.up": "transformer.h.{}.mlp.c_fc",
    "layers.{}.mlp.down": "transformer.h.{}.mlp.c_proj",
    "norm": "transformer.ln_f",
    "head": "lm_head",
}
_GPT2: Names = {
    **_COMMON,
    **qkv("transformer.h.{}.attn.c_attn", transposed=True),
    "layers.{}.attention.o": Part(tensor="transformer.h.{}.attn.c_proj", transposed=True),
    "layers.{}.mlp.up": Part(tensor="transformer.h.{}.mlp.c_fc", transposed=True),
    "layers.{}.mlp.down": Part(tensor="transformer.h.{}.mlp.c_proj", transposed=True),
}
_BIGCODE = {
    **_COMMON,
    **qkv("transformer.h.{}.attn.c_attn", groups="num_kv_heads"),
    "layers.{}.attention.o": "transformer.h.{}.attn.c_proj",
}
_NEO = {
    **_COMMON,
    "layers.{}.attention.q": "transformer.h.{}.attn.attention.q_proj",
    "layers.{}.attention.k": "transformer.h.{}.attn.attention.k_proj",
    "layers.{}.attention.v": "transformer.h.{}.attn.attention.v_proj",
    "layers.{}.attention.o": "transformer.h.{}.attn.attention.out_proj",
}
# Causal masks that old versions of `transformers` wrote.
_IGNORED = (
    "transformer.h.*.attn.bias",
    "transformer.h.*.attn.masked_bias",
    "transformer.h.*.attn.attention.bias",
    "transformer.h.*.attn.attention.masked_bias",
)

FAMILIES = (
    Family(architecture="GPT2LMHeadModel", arch=_gpt2, names=_GPT2, ignored=_IGNORED, optional_prefix="transformer."),
    Family(
        architecture="GPTBigCodeForCausalLM",
        arch=_bigcode,
        names=_BIGCODE,
        ignored=_IGNORED,
        optional_prefix="transformer.",
    ),
    Family(architecture="GPTNeoForCausalLM", arch=_neo, names=_NEO, ignored=_IGNORED, optional_prefix="transformer."),
)
