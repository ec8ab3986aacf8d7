"""What a model family consists of, and what families have in common."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from quire.models.arch import Arch
from quire.models.model_config import ModelConfig
from quire.models.rope_fields import read_rope

_SILU = ("silu", "swish")


@dataclass(frozen=True, slots=True)
class Weight:
    """One row of a weight table.

    `parameter` is the attribute path in `Decoder`, `tensor` the name in the checkpoint; `{}` in both is the layer,
    `{expert}` the expert. `shape` names fields of `Arch`. A row with `when` counts only where that field of `Arch` is
    true, one with `sparse` only in layers whose feed-forward block is so.
    """

    parameter: str
    tensor: str
    shape: tuple[str, ...]
    when: str | None = None
    sparse: bool | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """`ignored` are glob patterns of tensors that a checkpoint may hold and nobody needs."""

    architecture: str
    arch: Callable[[ModelConfig], Arch]
    weights: tuple[Weight, ...]
    ignored: tuple[str, ...] = ()


def read_common(
    config: ModelConfig,
    *,
    architecture: str,
    max_positions: int,
    head_dim: int | None = None,
    qkv_bias: bool = False,
    o_bias: bool = False,
    mlp_bias: bool = False,
    qk_norm: bool = False,
) -> Arch:
    """The fields that all these families spell alike. `max_positions` and `head_dim` are the family's defaults."""
    activation = config.text("hidden_act", "silu")
    if activation not in _SILU:
        raise config.fault("hidden_act", activation, f"one of {', '.join(_SILU)}")
    hidden_size, num_heads = config.integer("hidden_size"), config.integer("num_attention_heads")
    num_kv_heads = config.integer("num_key_value_heads", num_heads)
    if num_heads % num_kv_heads:
        raise config.fault("num_key_value_heads", num_kv_heads, f"a divisor of num_attention_heads, {num_heads}")
    if "head_dim" not in config and head_dim is None and hidden_size % num_heads:
        raise config.fault("hidden_size", hidden_size, f"a multiple of num_attention_heads, {num_heads}")
    head_dim = config.integer("head_dim", head_dim or hidden_size // num_heads)
    max_positions = config.integer("max_position_embeddings", max_positions)
    return Arch(
        architecture=architecture,
        vocab_size=config.integer("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=config.integer("intermediate_size"),
        num_layers=config.integer("num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        rms_norm_eps=config.number("rms_norm_eps", 1e-6),
        rope=read_rope(config, head_dim=head_dim, max_positions=max_positions),
        tie_word_embeddings=config.boolean("tie_word_embeddings", False),
        qkv_bias=qkv_bias,
        o_bias=o_bias,
        mlp_bias=mlp_bias,
        qk_norm=qk_norm,
    )


def refuse_sliding_window(config: ModelConfig) -> None:
    """Raises BadValue if any layer would use a sliding window, which attention does not have yet."""
    layer_types = config.raw("layer_types")
    if layer_types is None:
        first = config.integer("max_window_layers", 28, minimum=0)
        windowed = config.boolean("use_sliding_window", False) and first < config.integer("num_hidden_layers")
        if windowed and "sliding_window" in config:
            raise config.fault("use_sliding_window", True, "false: sliding-window attention is not supported yet")
    elif not isinstance(layer_types, list) or any(kind != "full_attention" for kind in layer_types):
        raise config.fault("layer_types", layer_types, "a list of 'full_attention': no other kind is supported yet")
