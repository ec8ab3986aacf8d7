"""EXAONE 3 (Llama by other names), and EXAONE 4: norms after the blocks, full layers without positions."""

from __future__ import annotations

from dataclasses import replace

from quire.models.arch import Arch, QKNorm
from quire.models.arch_fields import (
    FULL,
    SLIDING,
    dense_layers,
    every_nth_full,
    read_arch,
    read_corrected_experts,
    read_layer_types,
    rms_norm,
    sliding_kinds,
)
from quire.models.families.llama import IGNORED, NAMES
from quire.models.family import Family, Names, experts, shared_expert
from quire.models.model_config import ModelConfig


def _exaone3(config: ModelConfig) -> Arch:
    config = config.renamed(
        hidden_act="activation_function", num_hidden_layers="num_layers", rms_norm_eps="layer_norm_epsilon"
    )
    return read_arch(config, architecture="ExaoneForCausalLM", max_positions=2048, norm=rms_norm(config, 1e-5))


def _exaone4(config: ModelConfig) -> Arch:
    arch = _hybrid(config, "Exaone4ForCausalLM")
    return replace(arch, norms="post")


def _exaone_moe(config: ModelConfig) -> Arch:
    arch = _hybrid(config, "ExaoneMoeForCausalLM")
    return replace(
        arch,
        experts=read_corrected_experts(
            config,
            num=64,
            top_k=8,
            inner=1024,
            scale=2.5,
            shared=config.integer("num_shared_experts", 1),
            dense=dense_layers(config, arch.num_layers, first_sparse=1),
        ),
    )


def _hybrid(config: ModelConfig, architecture: str) -> Arch:
    arch = read_arch(config, architecture=architecture, max_positions=2048, norm=rms_norm(config, 1e-5))
    rope = arch.layer_kinds[0].rope
    hybrid = not config.says_null("sliding_window")
    pattern = config.raw("sliding_window_pattern")
    # A pattern in words is written out in layer_types.
    n = 4 if isinstance(pattern, str) else config.integer("sliding_window_pattern", 4, minimum=0)
    default = every_nth_full(arch.num_layers, n) if hybrid and n else (FULL,) * arch.num_layers
    types = read_layer_types(config, arch.num_layers, default)
    ropes = {FULL: None if hybrid else rope, SLIDING: rope}
    return replace(
        arch,
        qk_norm=QKNorm(norm=arch.norm),
        layer_kinds=sliding_kinds(config, types, ropes, window=4096),
    )


_EXAONE3 = {
    "embedding": "transformer.wte",
    "layers.{}.attention_norm": "transformer.h.{}.ln_1",
    "layers.{}.attention.q": "transformer.h.{}.attn.attention.q_proj",
    "layers.{}.attention.k": "transformer.h.{}.attn.attention.k_proj",
    "layers.{}.attention.v": "transformer.h.{}.attn.attention.v_proj",
    "layers.{}.attention.o": "transformer.h.{}.attn.attention.out_proj",
    "layers.{}.mlp_norm": "transformer.h.{}.ln_2",
    "layers.{}.mlp.gate": "transformer.h.{}.mlp.c_fc_0",
    "layers.{}.mlp.up": "transformer.h.{}.mlp.c_fc_1",
    "layers.{}.mlp.down": "transformer.h.{}.mlp.c_proj",
    "norm": "transformer.ln_f",
    "head": "lm_head",
}
_EXAONE4 = {
    **NAMES,
    "layers.{}.attention_out_norm": "model.layers.{}.post_attention_layernorm",
    "layers.{}.mlp_out_norm": "model.layers.{}.post_feedforward_layernorm",
}

_MOE: Names = {
    **NAMES,
    "layers.{}.mlp.router": "model.layers.{}.mlp.gate",
    "layers.{}.mlp.correction": "model.layers.{}.mlp.e_score_correction_bias",
    **experts("model.layers.{}.mlp.experts"),
    **shared_expert("model.layers.{}.mlp.shared_experts"),
}

FAMILIES = (
    Family(architecture="ExaoneMoeForCausalLM", arch=_exaone_moe, names=_MOE, ignored=IGNORED),
    Family(
        architecture="ExaoneForCausalLM",
        arch=_exaone3,
        names=_EXAONE3,
        ignored=("transformer.rotary.inv_freq", "transformer.h.*.attn.attention.rotary.inv_freq"),
    ),
    Family(architecture="Exaone4ForCausalLM", arch=_exaone4, names=_EXAONE4, ignored=IGNORED),
)
