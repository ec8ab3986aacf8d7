"""Keys and values in 8 bits: smaller by the ledger, and good enough that the built-in model says the same."""

from __future__ import annotations

import pytest

from quire import LLM, SamplingParams
from quire.core.kv_format import kv_block_bytes

QUESTIONS = [
    *(f"What is {a} + {b}?" for a in range(11, 60, 7) for b in (5, 48)),
    *(f"Spell the word {word}." for word in ("garden", "window", "yellow")),
]
PARAMS = SamplingParams(temperature=0.0, max_tokens=24)


def answers(kv_cache_dtype: str) -> tuple[list[str], int]:
    """And bytes per token, as the engine tells them."""
    llm = LLM("quire-tiny", kv_cache_dtype=kv_cache_dtype, num_kv_blocks=400, max_num_seqs=16, threads=1)
    asked = [[{"role": "user", "content": question}] for question in QUESTIONS]
    return [each.outputs[0].text for each in llm.chat(asked, PARAMS, progress=False)], llm.info.kv_bytes_per_token


@pytest.fixture(scope="module")
def plain() -> tuple[list[str], int]:
    return answers("auto")


@pytest.mark.parametrize("kv_cache_dtype", ["int8", "fp8"])
def test_eight_bits_change_few_answers(kv_cache_dtype: str, plain: tuple[list[str], int]) -> None:
    texts, token_bytes = answers(kv_cache_dtype)
    same = sum(text == other for text, other in zip(texts, plain[0], strict=True))
    assert same >= len(QUESTIONS) - 1
    sizes = [kv_block_bytes(name, block_size=1, head_dim=64) for name in (kv_cache_dtype, "bfloat16")]
    assert token_bytes / plain[1] == pytest.approx(sizes[0] / sizes[1], abs=0.1)
