"""The families against `transformers`, on tiny random checkpoints of many shapes, in float32."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, PretrainedConfig, Qwen2Config, Qwen3Config, Qwen3MoeConfig

from quire.models.load import load_model

BLOCK = 16
BLOCKS = list(range(1, 20))

SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "eos_token_id": None,
    "bos_token_id": None,
    "pad_token_id": None,
}


def rope(rope_type: str, **fields: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": rope_type, "rope_theta": 1000.0, **fields}}


LONGROPE = {"short_factor": [1.0 + index / 9 for index in range(8)], "long_factor": [9.0] * 8}
EXPERTS: dict[str, Any] = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 40}
VARIANTS: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**SIZES),
    "llama-heads-of-their-own-size": LlamaConfig(**SIZES | {"head_dim": 40}),
    "llama-odd-sizes": LlamaConfig(**SIZES | {"hidden_size": 60, "head_dim": 20, "intermediate_size": 101}),
    "llama-wide-odd": LlamaConfig(**SIZES | {"hidden_size": 100, "num_attention_heads": 5, "num_key_value_heads": 1}),
    "llama-tied": LlamaConfig(**SIZES, tie_word_embeddings=True),
    "llama-biases": LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True),
    "llama-mha": LlamaConfig(**SIZES | {"num_key_value_heads": 4}),
    "llama-mqa-8": LlamaConfig(**SIZES | {"num_attention_heads": 8, "num_key_value_heads": 1}),
    "llama-rope-linear": LlamaConfig(**SIZES, **rope("linear", factor=3.0)),
    "llama-rope-dynamic": LlamaConfig(**SIZES, **rope("dynamic", factor=2.0)),
    "llama-rope-llama3": LlamaConfig(
        **SIZES,
        **rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64),
    ),
    "llama-rope-yarn": LlamaConfig(**SIZES, **rope("yarn", factor=4.0, original_max_position_embeddings=64)),
    "llama-rope-longrope": LlamaConfig(
        **SIZES | {"max_position_embeddings": 512},
        **rope("longrope", factor=2.0, original_max_position_embeddings=256, **LONGROPE),
    ),
    "qwen2": Qwen2Config(**SIZES),
    "qwen2-tied-gqa-4": Qwen2Config(**SIZES | {"num_key_value_heads": 1}, tie_word_embeddings=True),
    "qwen2-window-not-used": Qwen2Config(**SIZES, use_sliding_window=False, sliding_window=8),
    "qwen3": Qwen3Config(**SIZES | {"head_dim": 24}),
    "qwen3-default-head-dim": Qwen3Config(**SIZES),
    "qwen3-tied-gqa-8": Qwen3Config(
        **SIZES | {"num_attention_heads": 8, "num_key_value_heads": 1, "head_dim": 16}, tie_word_embeddings=True
    ),
    "qwen3-bias-yarn": Qwen3Config(
        **SIZES | {"head_dim": 16, "attention_bias": True},
        **rope("yarn", factor=4.0, original_max_position_embeddings=64),
    ),
    "qwen3-moe": Qwen3MoeConfig(**SIZES, **EXPERTS, norm_topk_prob=True),
    "qwen3-moe-some-dense": Qwen3MoeConfig(
        **SIZES | {"num_hidden_layers": 4, "head_dim": 24}, **EXPERTS, mlp_only_layers=[2], decoder_sparse_step=2
    ),
    "qwen3-moe-all-experts": Qwen3MoeConfig(**SIZES, **EXPERTS | {"num_experts_per_tok": 6}),
}  # fmt: skip


@pytest.mark.parametrize("name", VARIANTS)
def test_logits_and_greedy_tokens_are_those_of_transformers(name: str, save_random: Any, lay_out: Any) -> None:
    theirs, directory = save_random(VARIANTS[name])
    ours = load_model(directory, dtype="float32")
    assert ours.unexpected_tensors == ()
    length, chunks = 150, (0, 1, 70, 71, 72, 150)
    tokens = torch.randint(0, 97, (length,), generator=torch.Generator().manual_seed(5)).tolist()
    with torch.inference_mode():
        expected = theirs(torch.tensor([tokens])).logits[0]
        generated = theirs.generate(torch.tensor([tokens]), max_new_tokens=20, do_sample=False)[0].tolist()

    def forward(known: list[int], start: int, stop: int) -> torch.Tensor:
        return ours.decoder.logits(ours.decoder.forward(lay_out([(known, start, stop, BLOCKS)], BLOCK), kv))

    kv = ours.new_kv_cache(len(BLOCKS) + 1, BLOCK)
    scale = expected.abs().max()
    torch.testing.assert_close(forward(tokens, 0, length) / scale, expected / scale, rtol=1e-4, atol=2e-5)
    kv = ours.new_kv_cache(len(BLOCKS) + 1, BLOCK)
    parts = [forward(tokens, start, stop) for start, stop in itertools.pairwise(chunks)]
    torch.testing.assert_close(torch.cat(parts) / scale, expected / scale, rtol=1e-4, atol=2e-5)
    known, logits = list(tokens), parts[-1]
    for _ in range(20):
        known.append(int(logits[-1].argmax()))
        logits = forward(known, len(known) - 1, len(known))
    assert known == generated


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "qwen3-moe"])
def test_bfloat16_stays_as_close_as_transformers_own(family: str, save_random: Any, lay_out: Any) -> None:
    """Both round; ours may not be much further from float32 than theirs is."""
    theirs, directory = save_random(VARIANTS[family], dtype=torch.bfloat16)
    ours = load_model(directory)
    assert ours.dtype == torch.bfloat16
    tokens = torch.randint(0, 97, (60,), generator=torch.Generator().manual_seed(5)).tolist()
    with torch.inference_mode():
        rounded = theirs(torch.tensor([tokens])).logits[0].float()
        exact = theirs.float()(torch.tensor([tokens])).logits[0]
    batch = lay_out([(tokens, 0, 60, BLOCKS)], BLOCK)
    found = ours.decoder.logits(ours.decoder.forward(batch, ours.new_kv_cache(20, BLOCK)))
    assert found.dtype == torch.float32
    assert (found - exact).square().mean() < 1.5 * (rounded - exact).square().mean()
