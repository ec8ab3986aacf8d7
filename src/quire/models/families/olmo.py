"""OLMo (norms without weights), OLMo 2 (norms after the blocks, of queries and keys as a whole), OLMo 3 (windows)."""

from __future__ import annotations

from dataclasses import replace

from quire.models.arch import Arch, Experts, NormKind, QKNorm
from quire.models.arch_fields import (
    FULL,
    SLIDING,
    every_nth_full,
    read_arch,
    read_experts,
    read_layer_types,
    rms_norm,
    sliding_kinds,
)
from quire.models.families.llama import IGNORED, NAMES
from quire.models.family import Family, Names, experts
from quire.models.model_config import ModelConfig
from quire.models.rope_fields import read_rope


def _base(config: ModelConfig, architecture: str, norm: NormKind, theta: float = 10_000.0) -> Arch:
    bias = config.boolean("attention_bias", False)
    arch = read_arch(config, architecture=architecture, max_positions=2048, norm=norm, theta=theta)
    return replace(arch, qkv_bias=bias, o_bias=bias)


def _olmo(config: ModelConfig) -> Arch:
    arch = _base(config, "OlmoForCausalLM", NormKind(kind="layer", eps=1e-5, weight=False))
    return replace(arch, clip_qkv=config.optional_number("clip_qkv"))


def _post_normed(arch: Arch) -> Arch:
    return replace(arch, norms="post", qk_norm=QKNorm(norm=arch.norm, over="whole"))


def _olmo2(config: ModelConfig) -> Arch:
    return _post_normed(_base(config, "Olmo2ForCausalLM", rms_norm(config, 1e-5)))


def _olmo3(config: ModelConfig) -> Arch:
    """RoPE is scaled in full layers only."""
    arch = _post_normed(_base(config, "Olmo3ForCausalLM", rms_norm(config, 1e-5), theta=500_000.0))
    types = read_layer_types(config, arch.num_layers, every_nth_full(arch.num_layers, 4))
    d, longest = arch.head_dim, arch.max_positions
    full = read_rope(config, head_dim=d, max_positions=longest, theta=500_000.0)
    local = replace(full, rope_type="default", factor=1.0)
    if SLIDING in config.section("rope_parameters"):
        local = read_rope(config, head_dim=d, max_positions=longest, theta=500_000.0, layer_type=SLIDING)
    return replace(arch, layer_kinds=sliding_kinds(config, types, {FULL: full, SLIDING: local}, window=4096))


def _experts(config: ModelConfig, arch: Arch, *, num: int, top_k: int) -> Experts:
    num, top_k = read_experts(config, num=num, top_k=top_k)
    return Experts(
        num=num,
        top_k=top_k,
        intermediate_size=arch.intermediate_size,
        renormalize=config.boolean("norm_topk_prob", False),
    )


def _olmoe(config: ModelConfig) -> Arch:
    arch = _base(config, "OlmoeForCausalLM", rms_norm(config, 1e-5))
    if "clip_qkv" in config:
        raise config.fault("clip_qkv", config.raw("clip_qkv"), "null: clipping beside norms is not supported")
    qk_norm, sparse = QKNorm(norm=arch.norm, over="whole"), _experts(config, arch, num=64, top_k=8)
    return replace(arch, qk_norm=qk_norm, experts=sparse)


def _flex_olmo(config: ModelConfig) -> Arch:
    arch = _post_normed(_base(config, "FlexOlmoForCausalLM", rms_norm(config, 1e-6), theta=500_000.0))
    return replace(arch, experts=_experts(config, arch, num=7, top_k=5))


_EXPERTS: Names = {
    "layers.{}.mlp.router": "model.layers.{}.mlp.gate",
    **experts("model.layers.{}.mlp.experts"),
}
_POST: Names = {
    **NAMES,
    "layers.{}.attention_out_norm": "model.layers.{}.post_attention_layernorm",
    "layers.{}.mlp_out_norm": "model.layers.{}.post_feedforward_layernorm",
}

FAMILIES = (
    Family(architecture="OlmoeForCausalLM", arch=_olmoe, names={**NAMES, **_EXPERTS}, ignored=IGNORED),
    Family(architecture="FlexOlmoForCausalLM", arch=_flex_olmo, names={**_POST, **_EXPERTS}, ignored=IGNORED),
    Family(architecture="OlmoForCausalLM", arch=_olmo, names=NAMES, ignored=IGNORED),
    Family(architecture="Olmo2ForCausalLM", arch=_olmo2, names=_POST, ignored=IGNORED),
    Family(architecture="Olmo3ForCausalLM", arch=_olmo3, names=_POST, ignored=IGNORED),
)
