"""Sizing and wiring: what an engine is told about its model, and what it says of it."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from quire.cache.ledger import GIB, KERNELS_BYTES, KVLedger
from quire.config.engine import EngineConfig
from quire.core.errors import ConfigError, NotEnoughMemory
from quire.core.request import EngineRequest, FinishReason
from quire.core.sampling import SamplingParams
from quire.engine.build import build_engine, size_cache
from quire.models.fit import build_ledger
from quire.models.load import load_model
from quire.models.shapes import shapes_of


@pytest.fixture
def checkpoint(checkpoints, tmp_path) -> Path:
    """A copy to change."""
    return Path(shutil.copytree(checkpoints["llama-float32"], tmp_path / "checkpoint"))


def outputs_of(engine, prompt: list[int], **sampling):
    request = EngineRequest(
        request_id="r",
        prompt_token_ids=prompt,
        sampling=SamplingParams(**{"seed": 0, "temperature": 0, **sampling}),
        arrival_time=0.0,
    )
    refused = engine.submit(request)
    found = [refused] if refused else []
    while engine.has_work:
        found += engine.step()
    engine.check_integrity()
    return found


def test_tensors_without_a_place_are_told_once(checkpoint, capfd):
    file = checkpoint / "model.safetensors"
    save_file(load_file(file) | {f"extra.{i}": torch.ones(1) for i in range(12)}, file)
    build_engine(EngineConfig(model=str(checkpoint), num_kv_blocks=8))
    [line] = [line for line in capfd.readouterr().err.splitlines() if "extra" in line]
    assert "12 tensors" in line
    assert "LlamaForCausalLM" in line
    assert len(line) < 400


def test_an_eos_beyond_the_vocabulary_is_left_out(checkpoint):
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "generation_config.json").unlink(missing_ok=True)
    (checkpoint / "config.json").write_text(json.dumps(config | {"eos_token_id": [2, 128009]}))
    engine = build_engine(EngineConfig(model=str(checkpoint), num_kv_blocks=8))
    assert engine.info.eos_token_ids == (2,)
    assert outputs_of(engine, [5, 6, 7], min_tokens=3, max_tokens=4)[-1].finish_reason is not None


def test_weights_that_were_converted_are_not_counted_twice(checkpoints):
    """The same memory is left for the KV cache, whether weights are pages of the file or copies."""
    config = EngineConfig(model=str(checkpoints["llama-float32"]), kv_cache_memory=0.01)
    same = load_model(checkpoints["llama-float32"], dtype="float32")
    other = load_model(checkpoints["llama-float32"], dtype="bfloat16")
    assert same.converted_bytes == 0
    assert other.converted_bytes == other.weight_bytes == same.weight_bytes // 2
    assert size_cache(config, other).weight_bytes == other.weight_bytes


def test_on_a_gpu_the_pool_leaves_room_for_captured_steps(checkpoints):
    model = load_model(checkpoints["llama-float32"], dtype="float32")
    sizes = {"memory_utilization": 0.5, "max_num_seqs": 8, "max_num_batched_tokens": 512, "swap_space": 0}

    def ledger(gpu: bool, **more: bool) -> KVLedger:
        config = EngineConfig(model=str(checkpoints["llama-float32"]), **sizes, **more)
        shapes = shapes_of(model.arch)
        return build_ledger(config, shapes, weight_bytes=100, dtype="float32", available=2 * GIB, gpu=gpu)

    plain, captured, eager = ledger(False), ledger(True), ledger(True, enforce_eager=True)
    assert plain.captured_bytes == 0
    assert eager.captured_bytes == KERNELS_BYTES
    assert captured.captured_bytes == KERNELS_BYTES + captured.activation_bytes, "the largest step is captured, too"
    assert plain.memory_left - captured.memory_left == captured.captured_bytes


def test_a_pool_by_number_of_blocks_needs_no_memory_for_more(checkpoints):
    model = str(checkpoints["llama-float32"])
    config = EngineConfig(model=model, num_kv_blocks=5, block_size=8, memory_utilization=1e-9)
    assert build_engine(config).info.max_model_len == 32
    with pytest.raises(ConfigError, match="num_kv_blocks is 1"):
        build_engine(EngineConfig(model=model, num_kv_blocks=1))
    with pytest.raises(NotEnoughMemory, match="KV cache"):
        build_engine(EngineConfig(model=model, kv_cache_memory=1e6))


def test_a_prompt_as_long_as_the_context_less_one_gets_its_one_token(checkpoints):
    config = EngineConfig(model=str(checkpoints["llama-float32"]), num_kv_blocks=5, block_size=8)
    engine = build_engine(config)
    assert engine.info.max_model_len == 32
    prompt = [3 + i % 300 for i in range(32)]
    [output] = outputs_of(engine, prompt[:31], ignore_eos=True, max_tokens=9)
    assert (len(output.token_ids), output.finish_reason) == (1, FinishReason.LENGTH)
    [refused] = outputs_of(engine, prompt, ignore_eos=True)
    assert refused.error is not None
    assert refused.error.code == "context_length_exceeded"
    whole = outputs_of(engine, prompt[:1], ignore_eos=True, max_tokens=99)
    assert sum(len(output.token_ids) for output in whole) == 31
    assert whole[-1].finish_reason is FinishReason.LENGTH
