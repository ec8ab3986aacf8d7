"""A whole engine over Triton's kernels, interpreted, whose decode steps run from what stands on the device."""

from __future__ import annotations

import time

import pytest
import torch
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    Glm4MoeConfig,
    Glm4MoeForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from quire.config.engine import EngineConfig
from quire.core.request import EngineRequest
from quire.core.sampling import SamplingParams
from quire.engine.build import build_engine
from quire.engine.graphs import Direct
from quire.engine.loop import Engine
from quire.engine.padded import PaddedSteps
from quire.engine.warm_up import LargestStep

SHAPE = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "eos_token_id": 2,
    "bos_token_id": 1,
    "initializer_range": 0.15,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "decoder_sparse_step": 1}
# Sigmoids, corrected, in groups; beside an expert that all share.
ROUTED = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "first_k_dense_replace": 1,
    "n_group": 2,
    "topk_group": 1,
    "routed_scaling_factor": 1.5,
}
LATENT = ROUTED | {
    "num_key_value_heads": 4,
    "q_lora_rank": 12,
    "kv_lora_rank": 20,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    torch.manual_seed(1)
    directory = tmp_path_factory.mktemp("checkpoints")
    for name, model in (
        ("dense", Qwen3ForCausalLM(Qwen3Config(**SHAPE))),
        ("sparse", Qwen3MoeForCausalLM(Qwen3MoeConfig(**SHAPE, **EXPERTS))),
        ("latent", DeepseekV3ForCausalLM(DeepseekV3Config(**(SHAPE | LATENT)))),
        ("routed", Glm4MoeForCausalLM(Glm4MoeConfig(**SHAPE, **ROUTED))),
    ):
        model.to(torch.float32).save_pretrained(directory / name)
    return directory


def engine_of(directory, **settings) -> Engine:
    config = EngineConfig(
        model=str(directory),
        device="cpu",
        max_model_len=64,
        num_kv_blocks=24,
        block_size=8,
        max_num_seqs=4,
        max_num_batched_tokens=16,
        **settings,
    )
    return build_engine(config)


def tokens_of(engine: Engine, samplings: list[SamplingParams]) -> list[list[int]]:
    for number, sampling in enumerate(samplings):
        prompt = list(range(5 + number, 11 + 4 * number))
        request = EngineRequest(request_id=str(number), prompt_token_ids=prompt, sampling=sampling, arrival_time=0.0)
        assert engine.submit(request) is None
    told: list[list[int]] = [[] for _ in samplings]
    while engine.has_work:
        for output in engine.step():
            told[int(output.request_id)] += output.token_ids
    engine.check_integrity()
    return told


SAMPLINGS = [
    SamplingParams(temperature=0.0, max_tokens=5, ignore_eos=True, seed=0),
    SamplingParams(temperature=0.8, max_tokens=4, ignore_eos=True, seed=1),
    SamplingParams(temperature=0.7, top_k=5, max_tokens=3, ignore_eos=True, seed=2),
]


@pytest.mark.parametrize("name", ["dense", "latent", "sparse", "routed"])
def test_tokens_are_those_of_the_reference(checkpoints, name):
    """In float32, where two kernels' logits differ too little to matter. One's steps with prompts are padded."""
    ahead = engine_of(checkpoints / name, isa="triton", dtype="float32", async_scheduling=True)
    runner = ahead._runner
    if name == "dense":
        runner._padded = PaddedSteps(runner._decoder, runner._kv, Direct(), tokens=32, requests=4, longest=64)
        runner.warm_up(LargestStep(tokens=10, longest=8, rows=4), time.monotonic)
    assert ahead._runner._decode is not None
    assert (ahead._runner._decoder.stack is not None) == (name == "dense")
    assert {choice.implementation for choice in ahead._runner._kernels.choices} == {"triton", "reference"}
    reference = engine_of(checkpoints / name, isa="reference", dtype="float32")
    assert tokens_of(ahead, SAMPLINGS) == tokens_of(reference, SAMPLINGS)


@pytest.mark.parametrize("name", ["dense", "sparse"])
def test_with_rows_in_8_bit_floats_tokens_are_those_of_the_reference(checkpoints, name):
    """In the stack, and in experts."""
    settings = {"dtype": "float32", "quantization": "fp8_dynamic"}
    ahead = engine_of(checkpoints / name, isa="triton", async_scheduling=True, **settings)
    assert ahead._runner._decode is not None
    assert (ahead._runner._decoder.stack is not None) == (name == "dense")
    assert ahead._runner._decoder.layers[0].attention.q.weight.rounds_rows
    reference = engine_of(checkpoints / name, isa="reference", **settings)
    assert tokens_of(ahead, SAMPLINGS[:2]) == tokens_of(reference, SAMPLINGS[:2])


def test_in_few_launches_layers_have_the_bits_of_the_ops(checkpoints):
    """Greedily, with log-probabilities to the last bit, in bfloat16 and with an 8-bit cache."""
    sampling = [SamplingParams(temperature=0.0, max_tokens=3, ignore_eos=True, seed=0, logprobs=2)]
    found = []
    for whole in (True, False):
        engine = engine_of(checkpoints / "dense", isa="triton", dtype="bfloat16", kv_cache_dtype="int8")
        if not whole:
            engine._runner._decoder.stack = None
        outputs = []
        assert (
            engine.submit(
                EngineRequest(
                    request_id="0", prompt_token_ids=list(range(5, 30)), sampling=sampling[0], arrival_time=0.0
                )
            )
            is None
        )
        while engine.has_work:
            outputs += [(output.token_ids, output.logprobs) for output in engine.step()]
        found.append(outputs)
    assert found[0] == found[1]
