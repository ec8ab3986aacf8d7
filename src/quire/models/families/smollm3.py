"""SmolLM3: Llama, of which every fourth layer sees no positions."""

from __future__ import annotations

from dataclasses import replace

from quire.models.arch import Arch
from quire.models.arch_fields import FULL, SLIDING, read_arch, read_layer_types, sliding_kinds
from quire.models.families.llama import IGNORED, NAMES
from quire.models.family import Family
from quire.models.model_config import ModelConfig


def _arch(config: ModelConfig) -> Arch:
    arch = read_arch(config, architecture="SmolLM3ForCausalLM", max_positions=32768, theta=2_000_000.0, tied=True)
    interval = config.integer("no_rope_layer_interval", 4)
    # The field's name says the opposite of what it holds: 1 for a layer that is rotated.
    rotated = config.integers("no_rope_layers") or tuple(
        int((layer + 1) % interval != 0) for layer in range(arch.num_layers)
    )
    if len(rotated) != arch.num_layers:
        raise config.fault("no_rope_layers", list(rotated), f"a list of {arch.num_layers} times 0 or 1")
    windowed = config.boolean("use_sliding_window", False) and "sliding_window" in config
    default = [SLIDING if windowed and not has_rope else FULL for has_rope in rotated]
    types = read_layer_types(config, arch.num_layers, default)
    rope = arch.layer_kinds[0].rope
    kinds = sliding_kinds(config, types, {FULL: rope, SLIDING: rope})
    bias = config.boolean("attention_bias", False)
    return replace(
        arch,
        layer_kinds=tuple(
            kind if has_rope else replace(kind, rope=None) for kind, has_rope in zip(kinds, rotated, strict=True)
        ),
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=config.boolean("mlp_bias", False),
    )


FAMILIES = (Family(architecture="SmolLM3ForCausalLM", arch=_arch, names=NAMES, ignored=IGNORED),)
