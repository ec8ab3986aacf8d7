"""Apertus: a plain feed-forward block whose activation learns, queries and keys normed."""

from __future__ import annotations

from dataclasses import replace

from quire.models.arch import Arch, QKNorm
from quire.models.arch_fields import read_arch, rms_norm
from quire.models.families.llama import IGNORED, NAMES
from quire.models.family import Family
from quire.models.model_config import ModelConfig


def _arch(config: ModelConfig) -> Arch:
    arch = read_arch(
        config,
        architecture="ApertusForCausalLM",
        max_positions=65536,
        norm=rms_norm(config, 1e-5),
        theta=12_000_000.0,
        activation="xielu",
    )
    bias = config.boolean("attention_bias", False)
    return replace(arch, gated=False, qkv_bias=bias, o_bias=bias, qk_norm=QKNorm(norm=arch.norm))


_NAMES = {
    **NAMES,
    "layers.{}.attention_norm": "model.layers.{}.attention_layernorm",
    "layers.{}.mlp_norm": "model.layers.{}.feedforward_layernorm",
    **{
        f"layers.{{}}.mlp.activation.{name}": f"model.layers.{{}}.mlp.act_fn.{name}"
        for name in ("alpha_p", "alpha_n", "beta", "eps")
    },
}

FAMILIES = (Family(architecture="ApertusForCausalLM", arch=_arch, names=_NAMES, ignored=IGNORED),)
