"""ERNIE 4.5 (dense): Llama with interleaved rotation."""

from __future__ import annotations

from dataclasses import replace

from quire.models.arch import Arch
from quire.models.arch_fields import read_arch, rms_norm
from quire.models.families.llama import IGNORED, NAMES
from quire.models.family import Family
from quire.models.model_config import ModelConfig


def _arch(config: ModelConfig) -> Arch:
    bias = config.boolean("use_bias", False)
    return replace(
        read_arch(
            config,
            architecture="Ernie4_5ForCausalLM",
            max_positions=131072,
            head_dim=128,
            norm=rms_norm(config, 1e-5),
            theta=500_000.0,
            tied=True,
        ),
        rope_interleaved=True,
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=bias,
    )


FAMILIES = (Family(architecture="Ernie4_5ForCausalLM", arch=_arch, names=NAMES, ignored=IGNORED),)
