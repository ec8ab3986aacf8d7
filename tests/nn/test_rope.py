"""Angles against `transformers`, for each scaling and each way a config.json spells it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from quire.core.errors import BadValue
from quire.models.model_config import ModelConfig
from quire.models.rope_fields import read_rope
from quire.nn.rope import RopeTable

HEAD_DIM = 20
LONGROPE = {
    "short_factor": [1.0 + 0.1 * index for index in range(HEAD_DIM // 2)],
    "long_factor": [2.0 + 0.5 * index for index in range(HEAD_DIM // 2)],
}
VARIANTS: list[dict[str, Any]] = [
    {"rope_type": "default"},
    {"rope_type": "linear", "factor": 4.0},
    {"rope_type": "dynamic", "factor": 2.0},
    {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
     "original_max_position_embeddings": 64},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128, "attention_factor": 0.7},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128, "mscale": 0.8, "mscale_all_dim": 0.5,
     "beta_fast": 16, "beta_slow": 2, "truncate": False},
    {"rope_type": "yarn", "factor": 2.5},
    {"rope_type": "longrope", "factor": 4.0, "original_max_position_embeddings": 128, **LONGROPE},
    {"rope_type": "longrope", "original_max_position_embeddings": 128, "attention_factor": 1.3, **LONGROPE},
]  # fmt: skip


def config_json(**fields: Any) -> dict[str, Any]:
    return {"max_position_embeddings": 512, **fields}


def theirs(parameters: dict[str, Any], length: int) -> tuple[torch.Tensor, torch.Tensor]:
    config = LlamaConfig(
        hidden_size=4 * HEAD_DIM,
        num_attention_heads=4,
        head_dim=HEAD_DIM,
        max_position_embeddings=512,
        rope_parameters={"rope_theta": 5000.0, **parameters},
    )
    cos, sin = LlamaRotaryEmbedding(config)(torch.zeros(1), torch.arange(length)[None])
    return cos[0, :, : HEAD_DIM // 2], sin[0, :, : HEAD_DIM // 2]


@pytest.mark.parametrize("spelling", ["new", "old", "oldest"])
@pytest.mark.parametrize("parameters", VARIANTS, ids=lambda fields: fields["rope_type"])
def test_angles_are_those_of_transformers(parameters: dict[str, Any], spelling: str) -> None:
    if spelling == "new":
        fields = config_json(rope_parameters={"rope_theta": 5000.0, **parameters})
    else:
        scaling = dict(parameters)
        if spelling == "oldest":
            scaling["type"] = scaling.pop("rope_type")
        fields = config_json(rope_theta=5000.0, rope_scaling=scaling)
    rope = read_rope(ModelConfig(fields, "config.json"), head_dim=HEAD_DIM, max_positions=512)
    length = rope.default_context
    table = RopeTable(rope, length, torch.device("cpu"))
    expected_cos, expected_sin = theirs(parameters, length)
    torch.testing.assert_close(table.cos, expected_cos, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(table.sin, expected_sin, rtol=1e-6, atol=1e-6)


def test_longrope_beyond_its_original_context_uses_the_long_factors_everywhere() -> None:
    parameters = {"rope_type": "longrope", "factor": 4.0, "original_max_position_embeddings": 128, **LONGROPE}
    fields = config_json(rope_parameters={"rope_theta": 5000.0, **parameters})
    rope = read_rope(ModelConfig(fields, "config.json"), head_dim=HEAD_DIM, max_positions=512)
    table = RopeTable(rope, 200, torch.device("cpu"))
    expected_cos, _ = theirs(parameters, 200)
    torch.testing.assert_close(table.cos, expected_cos, rtol=1e-6, atol=1e-6)


def test_a_top_level_original_length_has_precedence() -> None:
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    fields = config_json(rope_scaling=scaling, original_max_position_embeddings=256)
    rope = read_rope(ModelConfig(fields, "config.json"), head_dim=HEAD_DIM, max_positions=512)
    assert rope.original_max_positions == 256
    assert rope.longest_context == 1024


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"rope_scaling": {"rope_type": "spiral"}}, "spiral"),
        ({"rope_scaling": {"rope_type": "linear"}}, "factor"),
        ({"rope_scaling": {"rope_type": "linear", "factor": "4"}}, "factor"),
        ({"rope_scaling": {"rope_type": "linear", "factor": float("nan")}}, "factor"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "freq_factor"),
        ({"rope_scaling": {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}}, "short_factor"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}, "partial_rotary_factor": 0.5}, "partial"),
        ({"rope_scaling": 3}, "rope_scaling"),
        ({"rope_theta": 0}, "rope_theta"),
    ],
)
def test_what_cannot_be_honoured_is_named(fields: dict[str, Any], named: str) -> None:
    with pytest.raises(BadValue, match=named):
        read_rope(ModelConfig(config_json(**fields), "config.json"), head_dim=HEAD_DIM, max_positions=512)
