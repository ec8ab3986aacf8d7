"""Qwen3 (dense): Llama with normalised queries and keys, and a head dim of its own."""

from __future__ import annotations

from quire.models.arch import Arch
from quire.models.families.llama import IGNORED, WEIGHTS
from quire.models.family import Family, read_common, refuse_sliding_window
from quire.models.model_config import ModelConfig


def _arch(config: ModelConfig) -> Arch:
    refuse_sliding_window(config)
    bias = config.boolean("attention_bias", False)
    return read_common(
        config,
        architecture="Qwen3ForCausalLM",
        max_positions=32768,
        head_dim=128,
        qkv_bias=bias,
        o_bias=bias,
        qk_norm=True,
    )


QWEN3 = Family(architecture="Qwen3ForCausalLM", arch=_arch, weights=WEIGHTS, ignored=IGNORED)
