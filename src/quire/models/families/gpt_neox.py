"""GPT-NeoX and Pythia (parallel blocks with two layer norms), and Persimmon (in a row, queries and keys normed)."""

from __future__ import annotations

from dataclasses import replace

from quire.models.arch import Arch, QKNorm
from quire.models.arch_fields import layer_norm, read_arch
from quire.models.family import Family, Names, qkv
from quire.models.model_config import ModelConfig


def _neox(config: ModelConfig) -> Arch:
    config = config.renamed(rope_theta="rotary_emb_base", partial_rotary_factor="rotary_pct")
    bias = config.boolean("attention_bias", True)
    arch = read_arch(
        config,
        architecture="GPTNeoXForCausalLM",
        max_positions=2048,
        norm=layer_norm(config, bias=True),
        grouped=False,
        partial=0.25,
        activation="gelu",
    )
    parallel = config.boolean("use_parallel_residual", True)
    return replace(arch, parallel=parallel, gated=False, qkv_bias=bias, o_bias=bias, mlp_bias=True)


def _persimmon(config: ModelConfig) -> Arch:
    norm = layer_norm(config, bias=True)
    arch = read_arch(
        config,
        architecture="PersimmonForCausalLM",
        max_positions=16384,
        norm=norm,
        grouped=False,
        theta=25_000.0,
        partial=0.5,
        activation="relu2",
    )
    normed = config.boolean("qk_layernorm", True)
    return replace(
        arch, gated=False, qkv_bias=True, o_bias=True, mlp_bias=True, qk_norm=QKNorm(norm=norm) if normed else None
    )


def _names(layers: str, attention: str) -> Names:
    return {
        "layers.{}.attention_norm": f"{layers}.{{}}.input_layernorm",
        **qkv(f"{layers}.{{}}.{attention}.query_key_value", groups="num_kv_heads"),
        "layers.{}.attention.o": f"{layers}.{{}}.{attention}.dense",
        "layers.{}.attention.q_norm": f"{layers}.{{}}.{attention}.q_layernorm",
        "layers.{}.attention.k_norm": f"{layers}.{{}}.{attention}.k_layernorm",
        "layers.{}.mlp_norm": f"{layers}.{{}}.post_attention_layernorm",
        "layers.{}.mlp.up": f"{layers}.{{}}.mlp.dense_h_to_4h",
        "layers.{}.mlp.down": f"{layers}.{{}}.mlp.dense_4h_to_h",
    }


_NEOX = {
    "embedding": "gpt_neox.embed_in",
    **_names("gpt_neox.layers", "attention"),
    "norm": "gpt_neox.final_layer_norm",
    "head": "embed_out",
}
_PERSIMMON = {
    "embedding": "model.embed_tokens",
    **_names("model.layers", "self_attn"),
    "norm": "model.final_layernorm",
    "head": "lm_head",
}
# Masks and tables that old versions of `transformers` wrote.
_IGNORED = (
    "gpt_neox.layers.*.attention.bias",
    "gpt_neox.layers.*.attention.masked_bias",
    "gpt_neox.layers.*.attention.rotary_emb.inv_freq",
)

FAMILIES = (
    Family(architecture="GPTNeoXForCausalLM", arch=_neox, names=_NEOX, ignored=_IGNORED),
    Family(architecture="PersimmonForCausalLM", arch=_persimmon, names=_PERSIMMON),
)
