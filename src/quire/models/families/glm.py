"""GLM and GLM 4 (dense): half of each head rotated, interleaved; gate and up joined."""

from __future__ import annotations

from dataclasses import replace

from quire.models.arch import Arch
from quire.models.arch_fields import read_arch, rms_norm
from quire.models.families.llama import IGNORED, NAMES
from quire.models.family import Family, gate_up
from quire.models.model_config import ModelConfig


def _base(config: ModelConfig, architecture: str) -> Arch:
    return replace(
        read_arch(
            config,
            architecture=architecture,
            max_positions=131072,
            head_dim=128,
            norm=rms_norm(config, 1.5625e-7),
            partial=0.5,
        ),
        rope_interleaved=True,
        qkv_bias=config.boolean("attention_bias", True),
    )


def _glm(config: ModelConfig) -> Arch:
    return _base(config, "GlmForCausalLM")


def _glm4(config: ModelConfig) -> Arch:
    return replace(_base(config, "Glm4ForCausalLM"), norms="sandwich")


_GLM = {**NAMES, **gate_up("model.layers.{}.mlp.gate_up_proj")}
_GLM4 = {
    **_GLM,
    "layers.{}.attention_out_norm": "model.layers.{}.post_self_attn_layernorm",
    "layers.{}.mlp_out_norm": "model.layers.{}.post_mlp_layernorm",
}

FAMILIES = (
    Family(architecture="GlmForCausalLM", arch=_glm, names=_GLM, ignored=IGNORED),
    Family(architecture="Glm4ForCausalLM", arch=_glm4, names=_GLM4, ignored=IGNORED),
)
