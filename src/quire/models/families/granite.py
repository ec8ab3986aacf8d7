"""Granite and HyperCLOVA X (Llama with multipliers), and MiniCPM, which has them under other names."""

from __future__ import annotations

from dataclasses import replace

from quire.models.arch import Arch
from quire.models.arch_fields import read_arch, rms_norm
from quire.models.families.llama import IGNORED, NAMES
from quire.models.family import Family
from quire.models.model_config import ModelConfig


def _base(config: ModelConfig, architecture: str) -> Arch:
    bias = config.boolean("attention_bias", False)
    arch = read_arch(config, architecture=architecture, max_positions=2048)
    return replace(
        arch,
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=config.boolean("mlp_bias", False),
        embedding_multiplier=config.number("embedding_multiplier", 1.0),
        residual_multiplier=config.number("residual_multiplier", 1.0),
    )


def _granite(config: ModelConfig) -> Arch:
    return replace(
        _base(config, "GraniteForCausalLM"),
        attention_scale=config.number("attention_multiplier", 1.0),
        logit_multiplier=1 / config.number("logits_scaling", 1.0),
    )


def _hyperclova_x(config: ModelConfig) -> Arch:
    arch = _base(config, "HyperCLOVAXForCausalLM")
    return replace(
        arch,
        norms="sandwich" if config.boolean("use_post_norm", True) else "pre",
        attention_scale=config.number("attention_multiplier", arch.attention_scale),
        logit_multiplier=config.number("logits_scaling", 1.0),
    )


def _minicpm(config: ModelConfig) -> Arch:
    arch = read_arch(
        config, architecture="MiniCPMForCausalLM", max_positions=2048, norm=rms_norm(config, 1e-6), tied=True
    )
    return replace(
        arch,
        embedding_multiplier=config.number("scale_emb", 1.0),
        residual_multiplier=config.number("scale_depth", 1.0) / arch.num_layers**0.5,
        logit_multiplier=config.number("dim_model_base", 1.0) / arch.hidden_size,
    )


_POST = {
    **NAMES,
    "layers.{}.attention_out_norm": "model.layers.{}.post_norm1",
    "layers.{}.mlp_out_norm": "model.layers.{}.post_norm2",
}

FAMILIES = (
    Family(architecture="GraniteForCausalLM", arch=_granite, names=NAMES, ignored=IGNORED),
    Family(architecture="HyperCLOVAXForCausalLM", arch=_hyperclova_x, names=_POST, ignored=IGNORED),
    Family(architecture="MiniCPMForCausalLM", arch=_minicpm, names=NAMES, ignored=IGNORED),
)
