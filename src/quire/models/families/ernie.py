"""ERNIE 4.5: Llama with interleaved rotation, with experts or without."""

from __future__ import annotations

from dataclasses import replace

from quire.models.arch import Arch, Experts
from quire.models.arch_fields import read_arch, read_experts, rms_norm
from quire.models.families.llama import IGNORED, NAMES
from quire.models.family import Family, Names, Part, experts, shared_expert
from quire.models.model_config import ModelConfig


def _base(config: ModelConfig, architecture: str, head_dim: int | None) -> Arch:
    bias = config.boolean("use_bias", False)
    return replace(
        read_arch(
            config,
            architecture=architecture,
            max_positions=131072,
            head_dim=head_dim,
            norm=rms_norm(config, 1e-5),
            theta=500_000.0,
            tied=True,
        ),
        rope_interleaved=True,
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=bias,
    )


def _dense(config: ModelConfig) -> Arch:
    return _base(config, "Ernie4_5ForCausalLM", 128)


def _moe(config: ModelConfig) -> Arch:
    if config.boolean("use_bias", False):
        raise config.fault("use_bias", True, "false for a model with experts")
    config = config.renamed(num_experts="moe_num_experts", num_experts_per_tok="moe_k")
    arch = _base(config, "Ernie4_5_MoeForCausalLM", None)
    num, top_k = read_experts(config, num=64, top_k=6)
    inner = config.integer("moe_intermediate_size", 1536)
    first, step = config.integer("moe_layer_start_index", 1, minimum=0), config.integer("moe_layer_interval", 1)
    last = config.integer("moe_layer_end_index", -1, minimum=-1)
    last = arch.num_layers - 1 if last == -1 else last
    sparse = [layer for layer in range(arch.num_layers) if first <= layer <= last and (layer + 1) % step == 0]
    return replace(
        arch,
        experts=Experts(
            num=num,
            top_k=top_k,
            intermediate_size=inner,
            correction=True,
            renormalize=True,
            shared_size=inner * config.integer("moe_num_shared_experts", 2, minimum=0),
            dense_layers=tuple(layer for layer in range(arch.num_layers) if layer not in sparse),
        ),
    )


_MOE: Names = {
    **NAMES,
    "layers.{}.mlp.router": "model.layers.{}.mlp.gate",
    "layers.{}.mlp.correction": Part(
        tensor="model.layers.{}.mlp.moe_statics.e_score_correction_bias", flat=(1, "num_experts")
    ),
    **experts("model.layers.{}.mlp.experts"),
    **shared_expert("model.layers.{}.mlp.shared_experts"),
}

FAMILIES = (
    Family(architecture="Ernie4_5ForCausalLM", arch=_dense, names=NAMES, ignored=IGNORED),
    Family(architecture="Ernie4_5_MoeForCausalLM", arch=_moe, names=_MOE, ignored=IGNORED),
)
