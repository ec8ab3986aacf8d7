"""gpt-oss: sinks in attention, windows in every other layer, experts with biases and a bounded activation."""

from __future__ import annotations

from dataclasses import replace

from quire.models.arch import Arch, Experts
from quire.models.arch_fields import FULL, SLIDING, read_arch, read_experts, read_layer_types, rms_norm, sliding_kinds
from quire.models.families.llama import IGNORED, NAMES
from quire.models.family import Family, Names, Part
from quire.models.model_config import ModelConfig


def _arch(config: ModelConfig) -> Arch:
    config = config.renamed(num_experts="num_local_experts")
    arch = read_arch(
        config,
        architecture="GptOssForCausalLM",
        max_positions=131072,
        head_dim=64,
        norm=rms_norm(config, 1e-5),
        theta=150_000.0,
    )
    default = [FULL if layer % 2 else SLIDING for layer in range(arch.num_layers)]
    types = read_layer_types(config, arch.num_layers, default)
    bias, rope = config.boolean("attention_bias", True), arch.layer_kinds[0].rope
    num, top_k = read_experts(config, num=128, top_k=4)
    return replace(
        arch,
        layer_kinds=sliding_kinds(config, types, {FULL: rope, SLIDING: rope}, window=128),
        qkv_bias=bias,
        o_bias=bias,
        sinks=True,
        swiglu_limit=config.number("swiglu_limit", 7.0),
        swiglu_alpha=config.number("swiglu_alpha", 1.702),
        experts=Experts(
            num=num,
            top_k=top_k,
            intermediate_size=arch.intermediate_size,
            renormalize=True,
            router_bias=True,
            bias=True,
        ),
    )


def _expert(projection: str, tensor: str, index: int, sections: int) -> dict[str, Part]:
    """Gate and up alternate, row by row; weights lie transposed."""
    path = f"layers.{{}}.mlp.experts.{{expert}}.{projection}"
    name = f"model.layers.{{}}.mlp.experts.{tensor}"
    sizes = ("expert_size",) * sections if sections > 1 else ()
    groups = "expert_size" if sections > 1 else 1
    return {
        f"{path}.weight": Part(tensor=name, of=sizes, index=index, groups=groups, transposed=True, stacked="first"),
        f"{path}.bias": Part(tensor=f"{name}_bias", of=sizes, index=index, groups=groups, stacked="first"),
    }


_NAMES: Names = {
    **NAMES,
    "layers.{}.attention.sinks": "model.layers.{}.self_attn.sinks",
    "layers.{}.mlp.router": "model.layers.{}.mlp.router",
    **_expert("gate", "gate_up_proj", 0, 2),
    **_expert("up", "gate_up_proj", 1, 2),
    **_expert("down", "down_proj", 0, 1),
}

FAMILIES = (Family(architecture="GptOssForCausalLM", arch=_arch, names=_NAMES, ignored=IGNORED),)
