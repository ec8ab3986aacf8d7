"""Helium: Llama with interleaved rotation."""

from __future__ import annotations

from dataclasses import replace

from quire.models.arch import Arch
from quire.models.arch_fields import read_arch, rms_norm
from quire.models.families.llama import IGNORED, NAMES
from quire.models.family import Family
from quire.models.model_config import ModelConfig


def _arch(config: ModelConfig) -> Arch:
    return replace(
        read_arch(
            config,
            architecture="HeliumForCausalLM",
            max_positions=4096,
            head_dim=128,
            norm=rms_norm(config, 1e-8),
            theta=100_000.0,
        ),
        rope_interleaved=True,
        qkv_bias=config.boolean("attention_bias", False),
        mlp_bias=config.boolean("mlp_bias", False),
    )


FAMILIES = (Family(architecture="HeliumForCausalLM", arch=_arch, names=NAMES, ignored=IGNORED),)
