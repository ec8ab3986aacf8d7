"""StarCoder 2: layer norm, biases, a plain feed-forward block, a window."""

from __future__ import annotations

from dataclasses import replace

from quire.models.arch import Arch
from quire.models.arch_fields import FULL, SLIDING, layer_norm, read_arch, sliding_kinds
from quire.models.families.llama import IGNORED, NAMES
from quire.models.family import Family
from quire.models.model_config import ModelConfig


def _arch(config: ModelConfig) -> Arch:
    config = config.renamed(layer_norm_eps="norm_epsilon")
    arch = read_arch(
        config,
        architecture="Starcoder2ForCausalLM",
        max_positions=4096,
        norm=layer_norm(config, bias=True),
        activation="gelu_pytorch_tanh",
        tied=True,
    )
    bias = config.boolean("use_bias", True)
    rope = arch.layer_kinds[0].rope
    types = (SLIDING if "sliding_window" in config else FULL,) * arch.num_layers
    return replace(
        arch,
        layer_kinds=sliding_kinds(config, types, {FULL: rope, SLIDING: rope}),
        gated=False,
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=bias,
    )


_NAMES = {
    **NAMES,
    "layers.{}.mlp.up": "model.layers.{}.mlp.c_fc",
    "layers.{}.mlp.down": "model.layers.{}.mlp.c_proj",
}

FAMILIES = (Family(architecture="Starcoder2ForCausalLM", arch=_arch, names=_NAMES, ignored=IGNORED),)
