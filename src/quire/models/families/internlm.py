"""InternLM 1 to 3: Llama with biases of their own choice; the second joins queries, keys and values."""

from __future__ import annotations

from dataclasses import replace

from quire.models.arch import Arch
from quire.models.arch_fields import read_arch
from quire.models.families.llama import IGNORED, NAMES
from quire.models.family import Family, Names, qkv
from quire.models.model_config import ModelConfig


def _internlm(config: ModelConfig) -> Arch:
    bias = config.boolean("bias", True)
    return replace(
        read_arch(config, architecture="InternLMForCausalLM", max_positions=2048), qkv_bias=bias, o_bias=bias
    )


def _internlm2(config: ModelConfig) -> Arch:
    bias = config.boolean("bias", True)
    return replace(
        read_arch(config, architecture="InternLM2ForCausalLM", max_positions=2048), qkv_bias=bias, o_bias=bias
    )


def _internlm3(config: ModelConfig) -> Arch:
    """Its own names for biases, or those that `transformers` writes."""
    bias = config.boolean("bias", config.boolean("mlp_bias", False))
    return replace(
        read_arch(config, architecture="InternLM3ForCausalLM", max_positions=32768, head_dim=128),
        qkv_bias=config.boolean("qkv_bias", config.boolean("attention_bias", False)),
        o_bias=bias,
        mlp_bias=bias,
    )


_INTERNLM2: Names = {
    "embedding": "model.tok_embeddings",
    "layers.{}.attention_norm": "model.layers.{}.attention_norm",
    **qkv("model.layers.{}.attention.wqkv", groups="num_kv_heads"),
    "layers.{}.attention.o": "model.layers.{}.attention.wo",
    "layers.{}.mlp_norm": "model.layers.{}.ffn_norm",
    "layers.{}.mlp.gate": "model.layers.{}.feed_forward.w1",
    "layers.{}.mlp.up": "model.layers.{}.feed_forward.w3",
    "layers.{}.mlp.down": "model.layers.{}.feed_forward.w2",
    "norm": "model.norm",
    "head": "output",
}

FAMILIES = (
    Family(architecture="InternLMForCausalLM", arch=_internlm, names=NAMES, ignored=IGNORED),
    Family(architecture="InternLM2ForCausalLM", arch=_internlm2, names=_INTERNLM2),
    Family(architecture="InternLM3ForCausalLM", arch=_internlm3, names=NAMES, ignored=IGNORED),
)
