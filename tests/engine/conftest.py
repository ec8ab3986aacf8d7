"""Tiny random checkpoints, made once per session by transformers, which quire then loads from disk."""

import json
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

SHAPE = {
    "vocab_size": 384,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "eos_token_id": 2,
    "bos_token_id": 1,
    "initializer_range": 0.15,
}


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory) -> dict[str, Path]:
    """One Qwen3 in bfloat16, one Llama in float32."""
    directory = tmp_path_factory.mktemp("checkpoints")
    torch.manual_seed(1)
    found = {}
    for name, model, dtype in (
        ("qwen3-bfloat16", Qwen3ForCausalLM(Qwen3Config(**SHAPE)), torch.bfloat16),
        ("llama-float32", LlamaForCausalLM(LlamaConfig(**SHAPE)), torch.float32),
    ):
        found[name] = directory / name
        model.to(dtype).save_pretrained(found[name])
        config = json.loads((found[name] / "config.json").read_text())
        assert config["vocab_size"] == SHAPE["vocab_size"]
    return found
