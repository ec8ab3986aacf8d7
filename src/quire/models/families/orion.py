"""Orion: Llama with layer norm."""

from __future__ import annotations

from dataclasses import replace

from quire.models.arch import Arch
from quire.models.arch_fields import layer_norm, read_arch
from quire.models.families.llama import IGNORED, NAMES
from quire.models.family import Family
from quire.models.model_config import ModelConfig


def _arch(config: ModelConfig) -> Arch:
    config = config.renamed(layer_norm_eps="rms_norm_eps")  # so its checkpoints call it
    arch = read_arch(config, architecture="OrionForCausalLM", max_positions=4096, norm=layer_norm(config, bias=True))
    bias = config.boolean("attention_bias", False)
    return replace(arch, qkv_bias=bias, o_bias=bias)


FAMILIES = (Family(architecture="OrionForCausalLM", arch=_arch, names=NAMES, ignored=IGNORED),)
