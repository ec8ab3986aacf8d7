"""StableLM: layer norm, a quarter of each head rotated, blocks in a row or side by side."""

from __future__ import annotations

from dataclasses import replace

from quire.models.arch import Arch, QKNorm
from quire.models.arch_fields import layer_norm, read_arch
from quire.models.families.llama import IGNORED, NAMES
from quire.models.family import Family
from quire.models.model_config import ModelConfig


def _arch(config: ModelConfig) -> Arch:
    norm = layer_norm(config, bias=True)
    parallel = config.boolean("use_parallel_residual", False)
    return replace(
        read_arch(
            config,
            architecture="StableLmForCausalLM",
            max_positions=4096,
            norm=norm,
            partial=0.25,
        ),
        parallel=parallel,
        shared_norm=parallel,
        qkv_bias=config.boolean("use_qkv_bias", False),
        qk_norm=QKNorm(norm=replace(norm, bias=False), over="own_heads")
        if config.boolean("qk_layernorm", False)
        else None,
    )


_NAMES = {
    **NAMES,
    "layers.{}.attention.q_norm.heads.{expert}": "model.layers.{}.self_attn.q_layernorm.norms.{expert}",
    "layers.{}.attention.k_norm.heads.{expert}": "model.layers.{}.self_attn.k_layernorm.norms.{expert}",
}

FAMILIES = (Family(architecture="StableLmForCausalLM", arch=_arch, names=_NAMES, ignored=IGNORED),)
