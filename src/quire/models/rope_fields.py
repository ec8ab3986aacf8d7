"""Reads rotary embedding from config.json, in its new form (`rope_parameters`) and its old one (`rope_theta` and
`rope_scaling`). Precedence and defaults are those of `transformers`."""

from __future__ import annotations

from typing import get_args

from quire.models.model_config import ModelConfig
from quire.nn.rope_config import ROPE_TYPES, RopeConfig, RopeType

_OLD_NAMES = {"su": "longrope"}
_DEFAULT_THETA = 10_000.0


def read_rope(config: ModelConfig, *, head_dim: int, max_positions: int) -> RopeConfig:
    """Raises BadValue for a type that is not known, or one that lacks what it needs."""
    section = _section(config)
    rope_type = _rope_type(section)
    if rope_type != "default" and _partial_factor(config, section) != 1.0:
        # Of the families that are known so far none rotates a part of a head. `transformers` ignores the field with the
        # default type, and cannot run the others.
        raise section.fault("partial_rotary_factor", _partial_factor(config, section), "1.0")
    if head_dim % 2:
        raise config.fault("head_dim", head_dim, "an even number, since rotary embedding turns pairs")
    original = max_positions
    if rope_type in ("llama3", "yarn", "longrope"):
        source = config if "original_max_position_embeddings" in config else section
        original = source.integer("original_max_position_embeddings", max_positions)
    return RopeConfig(
        rope_type=rope_type,
        theta=section.number("rope_theta", config.number("rope_theta", _DEFAULT_THETA)),
        dim=head_dim,
        max_positions=max_positions,
        original_max_positions=original,
        factor=_factor(section, rope_type, max_positions / original),
        attention_factor=section.optional_number("attention_factor"),
        low_freq_factor=section.number("low_freq_factor", None if rope_type == "llama3" else 1.0),
        high_freq_factor=section.number("high_freq_factor", None if rope_type == "llama3" else 4.0),
        beta_fast=section.number("beta_fast", 32.0),
        beta_slow=section.number("beta_slow", 1.0),
        mscale=section.optional_number("mscale"),
        mscale_all_dim=section.optional_number("mscale_all_dim"),
        truncate=section.boolean("truncate", True),
        short_factor=section.numbers("short_factor", head_dim // 2) if rope_type == "longrope" else (),
        long_factor=section.numbers("long_factor", head_dim // 2) if rope_type == "longrope" else (),
    )


def _section(config: ModelConfig) -> ModelConfig:
    """Old form first. An object per kind of layer is read for full attention, the one kind there is."""
    section = config.section("rope_scaling" if config.raw("rope_scaling") else "rope_parameters")
    return section.section("full_attention") if "full_attention" in section else section


def _rope_type(section: ModelConfig) -> RopeType:
    name = section.text("rope_type", section.text("type", "default"))
    for known in get_args(RopeType):
        if _OLD_NAMES.get(name, name) == known:
            found: RopeType = known
            return found
    raise section.fault("rope_type", name, f"one of {', '.join(ROPE_TYPES)}")


def _partial_factor(config: ModelConfig, section: ModelConfig) -> float:
    return section.number("partial_rotary_factor", config.number("partial_rotary_factor", 1.0))


def _factor(section: ModelConfig, rope_type: RopeType, ratio: float) -> float:
    if rope_type == "default":
        return 1.0
    return section.number("factor", ratio if rope_type in ("yarn", "longrope") else None)
