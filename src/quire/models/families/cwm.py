"""Code World Model: Llama 3 with windows in most layers."""

from __future__ import annotations

from dataclasses import replace

from quire.models.arch import Arch
from quire.models.arch_fields import FULL, SLIDING, read_arch, read_layer_types, rms_norm, sliding_kinds
from quire.models.families.llama import IGNORED, NAMES
from quire.models.family import Family
from quire.models.model_config import ModelConfig


def _arch(config: ModelConfig) -> Arch:
    arch = read_arch(
        config,
        architecture="CwmForCausalLM",
        max_positions=131072,
        head_dim=128,
        norm=rms_norm(config, 1e-5),
        theta=1_000_000.0,
    )
    default = [SLIDING if layer % 4 else FULL for layer in range(arch.num_layers)]
    types = read_layer_types(config, arch.num_layers, default)
    rope = arch.layer_kinds[0].rope
    return replace(arch, layer_kinds=sliding_kinds(config, types, {FULL: rope, SLIDING: rope}, window=8192))


FAMILIES = (Family(architecture="CwmForCausalLM", arch=_arch, names=NAMES, ignored=IGNORED),)
