"""Phi 1 to 2 (parallel blocks with layer norm), and Phi 3 and 4 (Llama with joined projections)."""

from __future__ import annotations

from dataclasses import replace

from quire.models.arch import Arch, QKNorm
from quire.models.arch_fields import FULL, SLIDING, layer_norm, read_arch, rms_norm, sliding_kinds
from quire.models.families.llama import IGNORED, NAMES
from quire.models.family import Family, gate_up, qkv
from quire.models.model_config import ModelConfig


def _phi(config: ModelConfig) -> Arch:
    norm = layer_norm(config, bias=True)
    return replace(
        read_arch(
            config,
            architecture="PhiForCausalLM",
            max_positions=2048,
            norm=norm,
            partial=0.5,
            activation="gelu_new",
        ),
        parallel=True,
        shared_norm=True,
        qkv_bias=True,
        o_bias=True,
        mlp_bias=True,
        head_bias=True,
        gated=False,
        qk_norm=QKNorm(norm=norm) if config.boolean("qk_layernorm", False) else None,
    )


def _phi3(config: ModelConfig) -> Arch:
    arch = read_arch(
        config, architecture="Phi3ForCausalLM", max_positions=4096, norm=rms_norm(config, 1e-5), partial=1.0
    )
    rope = arch.layer_kinds[0].rope
    types = (SLIDING if "sliding_window" in config else FULL,) * arch.num_layers
    return replace(arch, layer_kinds=sliding_kinds(config, types, {FULL: rope, SLIDING: rope}))


_PHI = {
    **NAMES,
    "layers.{}.attention.o": "model.layers.{}.self_attn.dense",
    "layers.{}.attention.q_norm": "model.layers.{}.self_attn.q_layernorm",
    "layers.{}.attention.k_norm": "model.layers.{}.self_attn.k_layernorm",
    "layers.{}.mlp.up": "model.layers.{}.mlp.fc1",
    "layers.{}.mlp.down": "model.layers.{}.mlp.fc2",
    "norm": "model.final_layernorm",
}
_PHI3 = {
    **NAMES,
    **qkv("model.layers.{}.self_attn.qkv_proj"),
    **gate_up("model.layers.{}.mlp.gate_up_proj"),
}

FAMILIES = (
    Family(architecture="PhiForCausalLM", arch=_phi, names=_PHI, ignored=IGNORED),
    Family(architecture="Phi3ForCausalLM", arch=_phi3, names=_PHI3, ignored=IGNORED),
)
