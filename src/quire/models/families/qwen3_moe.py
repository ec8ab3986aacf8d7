"""Qwen3 with experts: Qwen3's attention, and feed-forward blocks of which a token sees a few."""

from __future__ import annotations

from dataclasses import replace

from quire.models.arch import Arch
from quire.models.families.llama import IGNORED
from quire.models.families.llama import WEIGHTS as DENSE
from quire.models.family import Family, Weight, read_common, refuse_sliding_window
from quire.models.model_config import ModelConfig

_INWARD, _OUTWARD = ("moe_intermediate_size", "hidden_size"), ("hidden_size", "moe_intermediate_size")
_EXPERT, _EXPERT_TENSOR = "layers.{}.mlp.experts.{expert}", "model.layers.{}.mlp.experts.{expert}"

WEIGHTS = (
    *(replace(weight, sparse=False) if ".mlp." in weight.parameter else weight for weight in DENSE),
    Weight(
        "layers.{}.mlp.router.weight", "model.layers.{}.mlp.gate.weight", ("num_experts", "hidden_size"), sparse=True
    ),
    Weight(f"{_EXPERT}.gate.weight", f"{_EXPERT_TENSOR}.gate_proj.weight", _INWARD, sparse=True),
    Weight(f"{_EXPERT}.up.weight", f"{_EXPERT_TENSOR}.up_proj.weight", _INWARD, sparse=True),
    Weight(f"{_EXPERT}.down.weight", f"{_EXPERT_TENSOR}.down_proj.weight", _OUTWARD, sparse=True),
)


def _arch(config: ModelConfig) -> Arch:
    refuse_sliding_window(config)
    bias = config.boolean("attention_bias", False)
    common = read_common(
        config,
        architecture="Qwen3MoeForCausalLM",
        max_positions=32768,
        qkv_bias=bias,
        o_bias=bias,
        qk_norm=True,
    )
    # transformers 5 writes num_local_experts, checkpoints of the hub have num_experts.
    num_experts = config.integer("num_local_experts" if "num_local_experts" in config else "num_experts", 128)
    top_k = config.integer("num_experts_per_tok", 8)
    if top_k > num_experts:
        raise config.fault("num_experts_per_tok", top_k, f"at most the number of experts, {num_experts}")
    return replace(
        common,
        num_experts=num_experts,
        num_experts_per_tok=top_k,
        moe_intermediate_size=config.integer("moe_intermediate_size", 768),
        norm_topk_prob=config.boolean("norm_topk_prob", False),
        dense_layers=_dense_layers(config, common.num_layers),
    )


def _dense_layers(config: ModelConfig, num_layers: int) -> tuple[int, ...]:
    """Those that are named, and those between every `decoder_sparse_step`-th."""
    named = config.raw("mlp_only_layers") or []
    if not isinstance(named, list) or not all(type(layer) is int for layer in named):
        raise config.fault("mlp_only_layers", named, "a list of layers")
    step = config.integer("decoder_sparse_step", 1)
    return tuple(layer for layer in range(num_layers) if layer in named or (layer + 1) % step)


QWEN3_MOE = Family(architecture="Qwen3MoeForCausalLM", arch=_arch, weights=WEIGHTS, ignored=IGNORED)
