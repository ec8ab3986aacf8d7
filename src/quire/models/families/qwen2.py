"""Qwen2 and Qwen2.5: Llama with a bias on queries, keys and values."""

from __future__ import annotations

from quire.models.arch import Arch
from quire.models.families.llama import IGNORED, WEIGHTS
from quire.models.family import Family, read_common, refuse_sliding_window
from quire.models.model_config import ModelConfig


def _arch(config: ModelConfig) -> Arch:
    refuse_sliding_window(config)
    return read_common(config, architecture="Qwen2ForCausalLM", max_positions=32768, qkv_bias=True)


QWEN2 = Family(architecture="Qwen2ForCausalLM", arch=_arch, weights=WEIGHTS, ignored=IGNORED)
