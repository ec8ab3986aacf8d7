"""From config.json to flags: what is read, and how each fault is named."""

from __future__ import annotations

from typing import Any

import pytest

from quire.core.errors import BadValue, UnknownArchitecture
from quire.models.registry import identify

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
}


def read(**changes: Any) -> Any:
    fields = {name: value for name, value in (CONFIG | changes).items() if value != "absent"}
    return identify(fields, "dir/config.json")[1]


def test_what_is_not_said_has_the_default_of_the_family() -> None:
    llama = read(num_key_value_heads="absent", max_position_embeddings="absent", rms_norm_eps="absent")
    assert (llama.num_kv_heads, llama.head_dim, llama.max_positions) == (4, 16, 2048)
    assert (llama.norm.eps, llama.ropes[0].theta, llama.tie_word_embeddings) == (1e-6, 10_000.0, False)
    assert read(architectures=["Qwen3ForCausalLM"]).head_dim == 128
    assert read(head_dim=None).head_dim == 16


def test_families_differ_in_flags() -> None:
    names = ("LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "Qwen3MoeForCausalLM")
    flags = {
        name: (arch.qkv_bias, arch.o_bias, arch.mlp_bias, arch.qk_norm is not None)
        for name in names
        for arch in [read(architectures=[name], attention_bias=True, mlp_bias=True)]
    }
    assert flags == {
        "LlamaForCausalLM": (True, True, True, False),
        "Qwen2ForCausalLM": (True, False, False, False),
        "Qwen3ForCausalLM": (True, True, False, True),
        "Qwen3MoeForCausalLM": (True, True, False, True),
    }


def test_an_unknown_architecture_is_named_beside_the_known_ones() -> None:
    with pytest.raises(UnknownArchitecture) as caught:
        read(architectures=["MambaForCausalLM"])
    assert "MambaForCausalLM" in caught.value.message
    assert "Qwen3ForCausalLM" in str(caught.value)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("architectures", None),
        ("architectures", "LlamaForCausalLM"),
        ("architectures", [3]),
        *((field, value) for field in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
                                        "num_attention_heads") for value in (None, 0, -1, 2.5, "64", True, [64])),
        ("num_key_value_heads", 3),
        ("num_key_value_heads", 0),
        ("hidden_size", 66),
        ("head_dim", 0),
        ("head_dim", 7),
        ("max_position_embeddings", 0),
        ("rms_norm_eps", 0),
        ("rms_norm_eps", "1e-6"),
        ("rms_norm_eps", float("inf")),
        ("hidden_act", "softmax"),
        ("hidden_act", 3),
        ("attention_bias", "yes"),
        ("tie_word_embeddings", 1),
    ],
)  # fmt: skip
def test_a_field_that_cannot_be_used_is_named_with_its_file_and_value(field: str, value: Any) -> None:
    with pytest.raises(BadValue) as caught:
        read(**{field: value})
    assert "dir/config.json" in caught.value.message
    assert f"'{field}'" in caught.value.message


@pytest.mark.parametrize("name", ["Qwen2ForCausalLM", "Qwen3ForCausalLM"])
def test_a_sliding_window_is_in_the_layers_that_use_it(name: str) -> None:
    def windows(**changes: Any) -> list[int | None]:
        arch = read(architectures=[name], sliding_window=64, **changes)
        return [kind.window for kind in arch.layer_kinds]

    assert windows(use_sliding_window=False) == [None, None]
    assert windows(use_sliding_window=True, max_window_layers=2) == [None, None]
    assert windows(use_sliding_window=True, max_window_layers=1) == [None, 64]
    assert windows(use_sliding_window=True, layer_types=["sliding_attention", "full_attention"]) == [64, None]
    for wrong in (["full_attention"], ["full_attention", "linear_attention"], "full_attention"):
        with pytest.raises(BadValue, match="layer_types"):
            windows(use_sliding_window=True, layer_types=wrong)
