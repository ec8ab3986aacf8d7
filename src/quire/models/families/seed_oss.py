"""Seed-OSS: Llama with biases of its own choice."""

from __future__ import annotations

from dataclasses import replace

from quire.models.arch import Arch
from quire.models.arch_fields import read_arch
from quire.models.families.llama import IGNORED, NAMES
from quire.models.family import Family
from quire.models.model_config import ModelConfig


def _arch(config: ModelConfig) -> Arch:
    return replace(
        read_arch(config, architecture="SeedOssForCausalLM", max_positions=524288, head_dim=128),
        qkv_bias=config.boolean("attention_bias", True),
        o_bias=config.boolean("attention_out_bias", False),
        mlp_bias=config.boolean("mlp_bias", False),
    )


FAMILIES = (Family(architecture="SeedOssForCausalLM", arch=_arch, names=NAMES, ignored=IGNORED),)
