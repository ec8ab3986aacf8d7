"""OLMo (norms without weights), OLMo 2 (norms after the blocks, of queries and keys as a whole), OLMo 3 (windows)."""

from __future__ import annotations

from dataclasses import replace

from quire.models.arch import Arch, NormKind, QKNorm
from quire.models.arch_fields import FULL, SLIDING, every_nth_full, read_arch, read_layer_types, rms_norm, sliding_kinds
from quire.models.families.llama import IGNORED, NAMES
from quire.models.family import Family
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


_POST = {
    **NAMES,
    "layers.{}.attention_out_norm": "model.layers.{}.post_attention_layernorm",
    "layers.{}.mlp_out_norm": "model.layers.{}.post_feedforward_layernorm",
}

FAMILIES = (
    Family(architecture="OlmoForCausalLM", arch=_olmo, names=NAMES, ignored=IGNORED),
    Family(architecture="Olmo2ForCausalLM", arch=_olmo2, names=_POST, ignored=IGNORED),
    Family(architecture="Olmo3ForCausalLM", arch=_olmo3, names=_POST, ignored=IGNORED),
)
