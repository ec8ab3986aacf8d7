"""Nemotron: layer norms that store their weight less one, squared ReLU, half of each head rotated."""

from __future__ import annotations

from dataclasses import replace

from quire.models.arch import Arch
from quire.models.arch_fields import layer_norm, read_arch
from quire.models.families.llama import IGNORED, NAMES
from quire.models.family import Family
from quire.models.model_config import ModelConfig


def _arch(config: ModelConfig) -> Arch:
    config = config.renamed(layer_norm_eps="norm_eps")
    bias = config.boolean("attention_bias", False)
    return replace(
        read_arch(
            config,
            architecture="NemotronForCausalLM",
            max_positions=4096,
            norm=replace(layer_norm(config, bias=True), weight_offset=1.0),
            partial=0.5,
            activation="relu2",
        ),
        gated=False,
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=config.boolean("mlp_bias", False),
    )


FAMILIES = (Family(architecture="NemotronForCausalLM", arch=_arch, names=NAMES, ignored=IGNORED),)
