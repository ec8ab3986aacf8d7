"""Arcee: Llama with a plain feed-forward block and squared ReLU. Jais 2: the same with layer norm."""

from __future__ import annotations

from dataclasses import replace

from quire.models.arch import Arch
from quire.models.arch_fields import layer_norm, read_arch, rms_norm
from quire.models.families.llama import IGNORED, NAMES
from quire.models.family import Family
from quire.models.model_config import ModelConfig


def _plain(config: ModelConfig, arch: Arch, *, bias: bool) -> Arch:
    attention = config.boolean("attention_bias", bias)
    return replace(arch, gated=False, qkv_bias=attention, o_bias=attention, mlp_bias=config.boolean("mlp_bias", bias))


def _arcee(config: ModelConfig) -> Arch:
    arch = read_arch(
        config,
        architecture="ArceeForCausalLM",
        max_positions=4096,
        norm=rms_norm(config, 1e-5),
        activation="relu2",
    )
    return _plain(config, arch, bias=False)


def _jais2(config: ModelConfig) -> Arch:
    arch = read_arch(
        config,
        architecture="Jais2ForCausalLM",
        max_positions=8192,
        norm=layer_norm(config, bias=True),
        activation="relu2",
    )
    return _plain(config, arch, bias=True)


FAMILIES = (
    Family(architecture="ArceeForCausalLM", arch=_arcee, names=NAMES, ignored=IGNORED),
    Family(architecture="Jais2ForCausalLM", arch=_jais2, names=NAMES, ignored=IGNORED),
)
