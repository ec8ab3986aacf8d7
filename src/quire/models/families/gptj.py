"""GPT-J and CodeGen: parallel blocks with one layer norm, a part of each head rotated, interleaved."""

from __future__ import annotations

from dataclasses import replace

from quire.models.arch import Arch, LayerKind
from quire.models.arch_fields import layer_norm, read_arch
from quire.models.family import Family, Names, Part
from quire.models.model_config import ModelConfig
from quire.models.rope_fields import read_rope


def _base(config: ModelConfig, architecture: str) -> Arch:
    config = config.renamed(
        hidden_size="n_embd",
        num_hidden_layers="n_layer",
        num_attention_heads="n_head",
        max_position_embeddings="n_positions",
        intermediate_size="n_inner",
        hidden_act="activation_function",
        layer_norm_eps="layer_norm_epsilon",
    )
    arch = read_arch(
        config,
        architecture=architecture,
        max_positions=2048,
        norm=layer_norm(config, bias=True),
        grouped=False,
        rotary=False,
        activation="gelu_new",
        intermediate_size=4 * config.integer("hidden_size"),
    )
    rotated = arch.head_dim if config.says_null("rotary_dim") else config.integer("rotary_dim", 64)
    if rotated > arch.head_dim:
        raise config.fault("rotary_dim", rotated, f"at most the head dim, {arch.head_dim}")
    rope = read_rope(config, head_dim=rotated, max_positions=arch.max_positions)
    return replace(
        arch,
        layer_kinds=(LayerKind(rope=rope),) * arch.num_layers,
        parallel=True,
        shared_norm=True,
        rope_interleaved=True,
        gated=False,
        mlp_bias=True,
        head_bias=not arch.tie_word_embeddings,
    )


def _gptj(config: ModelConfig) -> Arch:
    return _base(config, "GPTJForCausalLM")


def _codegen(config: ModelConfig) -> Arch:
    return _base(config, "CodeGenForCausalLM")


_COMMON: Names = {
    "embedding": "transformer.wte",
    "layers.{}.attention_norm": "transformer.h.{}.ln_1",
    "layers.{}.attention.o": "transformer.h.{}.attn.out_proj",
    "layers.{}.mlp.up": "transformer.h.{}.mlp.fc_in",
    "layers.{}.mlp.down": "transformer.h.{}.mlp.fc_out",
    "norm": "transformer.ln_f",
    "head": "lm_head",
}
_GPTJ = {
    **_COMMON,
    "layers.{}.attention.q": "transformer.h.{}.attn.q_proj",
    "layers.{}.attention.k": "transformer.h.{}.attn.k_proj",
    "layers.{}.attention.v": "transformer.h.{}.attn.v_proj",
}
# In four groups, as four accelerators had it in training, and values before keys.
_CODEGEN: Names = {
    **_COMMON,
    **{
        f"layers.{{}}.attention.{name}": Part(
            tensor="transformer.h.{}.attn.qkv_proj", of=("q_size", "kv_size", "kv_size"), index=index, groups=4
        )
        for index, name in enumerate("qvk")
    },
}
_IGNORED = (
    "transformer.h.*.attn.bias",
    "transformer.h.*.attn.masked_bias",
    "transformer.h.*.attn.causal_mask",
    "transformer.h.*.attn.embed_positions",
)

FAMILIES = (
    Family(architecture="GPTJForCausalLM", arch=_gptj, names=_GPTJ, ignored=_IGNORED),
    Family(architecture="CodeGenForCausalLM", arch=_codegen, names=_CODEGEN, ignored=_IGNORED),
)
