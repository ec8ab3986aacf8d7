"""Loading: each fault names file, tensor, expected and found; what is right is not copied."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, Qwen3Config

from quire.core.errors import BadValue, ConfigError, MissingTensor, ShapeMismatch
from quire.models.load import load_model

SIZES: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


@pytest.fixture
def checkpoint(save_random: Any) -> Path:
    directory: Path = save_random(LlamaConfig(**SIZES))[1]
    return directory


def edit(directory: Path, **changes: torch.Tensor | None) -> None:
    """Replaces tensors (`__` stands for a dot), or takes them away where the value is None."""
    file = directory / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    for name, tensor in changes.items():
        tensors.pop(name.replace("__", "."), None)
        if tensor is not None:
            tensors[name.replace("__", ".")] = tensor
    save_file(tensors, file)


def configure(directory: Path, **fields: Any) -> None:
    file = directory / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def test_a_missing_tensor(checkpoint: Path) -> None:
    edit(checkpoint, model__layers__1__mlp__up_proj__weight=None)
    with pytest.raises(MissingTensor, match=r"model\.layers\.1\.mlp\.up_proj\.weight.*\[48, 32\]"):
        load_model(checkpoint)


def test_a_wrong_shape(checkpoint: Path) -> None:
    edit(checkpoint, model__norm__weight=torch.ones(33))
    with pytest.raises(ShapeMismatch, match=r"model\.safetensors.*model\.norm\.weight.*\[32\].*\[33\]"):
        load_model(checkpoint)


def test_shapes_that_config_json_promises_otherwise(checkpoint: Path) -> None:
    configure(checkpoint, head_dim=16)
    with pytest.raises(ShapeMismatch, match=r"q_proj.*\[64, 32\].*\[32, 32\]"):
        load_model(checkpoint)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_norm_that_is_not_finite(checkpoint: Path, bad: float) -> None:
    scale = torch.ones(32)
    scale[7] = bad
    edit(checkpoint, model__layers__0__input_layernorm__weight=scale)
    with pytest.raises(BadValue, match=r"model\.safetensors.*input_layernorm\.weight.*(nan|inf) at index 7"):
        load_model(checkpoint)


def test_a_type_that_is_not_a_weight(checkpoint: Path) -> None:
    edit(checkpoint, lm_head__weight=torch.zeros(50, 32, dtype=torch.int8))
    with pytest.raises(BadValue, match=r"lm_head\.weight.*I8"):
        load_model(checkpoint)


def test_tensors_without_a_place_are_reported_and_old_tables_are_not(checkpoint: Path) -> None:
    edit(
        checkpoint,
        model__layers__0__self_attn__rotary_emb__inv_freq=torch.ones(4),
        model__layers__0__self_attn__q_proj__bias=torch.ones(32),
    )
    assert load_model(checkpoint).unexpected_tensors == ("model.layers.0.self_attn.q_proj.bias",)


def test_a_tied_head_is_the_embedding_even_if_one_was_saved(save_random: Any) -> None:
    _, directory = save_random(Qwen3Config(**SIZES, tie_word_embeddings=True))
    edit(directory, lm_head__weight=torch.zeros(50, 32))
    model = load_model(directory)
    assert model.decoder.head.weight is model.decoder.embedding.weight
    assert model.unexpected_tensors == ()


def test_weights_of_the_right_dtype_are_views_of_the_file_and_others_are_converted(checkpoint: Path) -> None:
    same, other = load_model(checkpoint, dtype="float32"), load_model(checkpoint, dtype="bfloat16")
    stored = load_file(checkpoint / "model.safetensors")["model.embed_tokens.weight"]
    assert torch.equal(same.decoder.embedding.weight, stored)
    assert torch.equal(other.decoder.embedding.weight, stored.bfloat16())
    assert same.weight_bytes == 2 * other.weight_bytes
    embedding, head = same.decoder.embedding.weight, same.decoder.head.weight
    assert embedding.untyped_storage().nbytes() == embedding.nbytes or (
        embedding.untyped_storage().data_ptr() <= head.data_ptr()
    )


def test_auto_takes_the_dtype_of_the_checkpoint(checkpoint: Path, save_random: Any) -> None:
    assert load_model(checkpoint).dtype == torch.float32
    configure(checkpoint, dtype=None, torch_dtype="float16")
    assert load_model(checkpoint).dtype == torch.bfloat16
    configure(checkpoint, torch_dtype=None)
    assert load_model(checkpoint).dtype == torch.float32
    with pytest.raises(ConfigError, match="int8"):
        load_model(checkpoint, dtype="int8")


def test_lengths_and_block_sizes_that_cannot_be_served_are_refused(checkpoint: Path) -> None:
    model = load_model(checkpoint)
    assert model.max_model_len == 64
    assert load_model(checkpoint, max_model_len=20).max_model_len == 20
    with pytest.raises(ConfigError, match="65"):
        load_model(checkpoint, max_model_len=65)
    with pytest.raises(ConfigError, match="24"):
        model.new_kv_cache(4, 24)
    configure(checkpoint, rope_parameters={"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0})
    with pytest.raises(ConfigError, match="dynamic"):
        load_model(checkpoint, max_model_len=65)


def test_a_block_takes_as_many_bytes_as_is_said(checkpoint: Path) -> None:
    model = load_model(checkpoint)
    assert model.new_kv_cache(7, 16).data.nbytes == 7 * model.kv_bytes_per_block(16)
