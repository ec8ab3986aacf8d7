"""StableLM: layer norm, a quarter of each head rotated, blocks in a row or side by side."""

from __future__ import annotations

from dataclasses import replace

from quire.models.arch import Arch
from quire.models.arch_fields import layer_norm, read_arch
from quire.models.families.llama import IGNORED, NAMES
from quire.models.family import Family
from quire.models.model_config import ModelConfig


def _arch(config: ModelConfig) -> Arch:
    if config.boolean("qk_layernorm", False):
        raise config.fault("qk_layernorm", True, "false: a norm for each head is not supported for this family")
    parallel = config.boolean("use_parallel_residual", False)
    return replace(
        read_arch(
            config,
            architecture="StableLmForCausalLM",
            max_positions=4096,
            norm=layer_norm(config, bias=True),
            partial=0.25,
        ),
        parallel=parallel,
        shared_norm=parallel,
        qkv_bias=config.boolean("use_qkv_bias", False),
    )


FAMILIES = (Family(architecture="StableLmForCausalLM", arch=_arch, names=NAMES, ignored=IGNORED),)
