"""The engine on the device: the same tokens however steps are launched and whoever else is there; and its refusals."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu.hollow import write_hollow
from quire.cli.bench.device_limits import measure_device
from quire.config.engine import EngineConfig
from quire.core.errors import ConfigError, NotEnoughMemory
from quire.core.request import EngineRequest, FinishReason
from quire.core.sampling import SamplingParams
from quire.engine.build import build_engine
from quire.engine.device import device_fault, resolve_device
from quire.engine.loop import Engine
from quire.ops.kernels import select
from quire.ops.target import Target
from quire.ops.triton.library import is_installed
from tools.make_checkpoint import SHAPES, make_checkpoint

VOCAB = 512
SMALL = {
    "dense": replace(SHAPES["tiny"], hidden=256, intermediate=512, head_dim=128, heads=4, kv_heads=2),
    "narrow": SHAPES["tiny"],
    "experts": replace(
        SHAPES["qwen3-30b-a3b"], vocab_size=VOCAB, hidden=256, intermediate=128, layers=2, heads=4, kv_heads=2,
        experts=16, experts_per_token=4, dense_intermediate=512,
    ),
}  # fmt: skip
SIZES: dict[str, Any] = {"num_kv_blocks": 200, "max_model_len": 512, "enable_prefix_caching": False}
WAYS: dict[str, dict[str, Any]] = {
    "graphs": {},
    "eager": {"enforce_eager": True},
    "one step at a time": {"async_scheduling": False},
    "small steps": {"max_num_batched_tokens": 40},
    "few at once": {"max_num_seqs": 3},
    "prefix cache": {"enable_prefix_caching": True},
    "recompute": {"num_kv_blocks": 26, "max_model_len": 300, "preemption": "recompute"},
    "swap": {"num_kv_blocks": 26, "max_model_len": 300, "preemption": "swap", "swap_space": 0.05},
}
FORMATS: dict[str, dict[str, Any]] = {
    "bf16": {},
    "fp16": {"dtype": "float16"},
    "fp32": {"dtype": "float32"},
    "int8": {"quantization": "int8"},
    "int4": {"quantization": "int4"},
    "fp8": {"quantization": "fp8"},
    "int8 cache": {"kv_cache_dtype": "int8"},
    "fp8 cache": {"kv_cache_dtype": "fp8"},
}


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    directory = tmp_path_factory.mktemp("checkpoints")
    for name, shape in SMALL.items():
        make_checkpoint(directory / name, shape, dtype="bfloat16", seed=1)
    return {name: directory / name for name in SMALL}


def requests(count: int = 21) -> list[EngineRequest]:
    """Of different lengths, greedy and not, some with a common beginning; one tells log-probabilities."""
    generator = torch.Generator().manual_seed(5)
    made = []
    for number in range(count):
        length = int(torch.randint(1, 160, (1,), generator=generator))
        prompt = torch.randint(3, VOCAB, (length,), generator=generator).tolist()
        sampling = SamplingParams(
            temperature=(0.0, 0.8, 1.2)[number % 3],
            top_p=(1.0, 0.9)[number % 2],
            top_k=(0, 0, 0, 30)[number % 4],
            seed=number,
            max_tokens=20 + 5 * (number % 7),
            ignore_eos=True,
            logprobs=2 if number == 10 else None,
        )
        made.append(
            EngineRequest(
                request_id=str(number),
                prompt_token_ids=[7] * 70 + prompt if number % 5 == 0 else prompt,
                sampling=sampling,
                arrival_time=0.0,
            )
        )
    return made


def engine(model: Path, **options: Any) -> Engine:
    return build_engine(EngineConfig(**{"model": str(model), "device": "cuda", **SIZES, **options}))


def tokens(running: Engine, work: list[EngineRequest]) -> dict[str, list[int]]:
    """Of each request, all of which have to end well."""
    found: dict[str, list[int]] = {request.request_id: [] for request in work}
    for request in work:
        assert running.submit(request) is None
    ends = []
    while running.has_work:
        for output in running.step():
            assert output.error is None, output.error
            found[output.request_id] += output.token_ids
            ends += [output.finish_reason] if output.finish_reason else []
    running.check_integrity()
    assert ends == [FinishReason.LENGTH] * len(work)
    assert {key: len(value) for key, value in found.items()} == {r.request_id: r.sampling.max_tokens for r in work}
    return found


@pytest.mark.parametrize("shape", SMALL)
def test_the_same_tokens_however_steps_are_launched(checkpoints: dict[str, Path], shape: str) -> None:
    expected = tokens(engine(checkpoints[shape], **WAYS["graphs"]), requests())
    assert len({tuple(value[:5]) for value in expected.values()}) > 3
    for way, options in WAYS.items():
        assert tokens(engine(checkpoints[shape], **options), requests()) == expected, way


@pytest.mark.parametrize("preemption", ["recompute", "swap"])
def test_the_small_pools_do_preempt(checkpoints: dict[str, Path], preemption: str) -> None:
    """Guards the test above against passing because nothing ever happened."""
    running = engine(checkpoints["dense"], **WAYS[preemption])
    tokens(running, requests())
    stats = running.stats()
    assert stats.num_preemptions > 0
    assert (stats.num_swaps > 0) == (preemption == "swap")


@pytest.mark.parametrize("formats", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("shape", SMALL)
def test_alone_or_among_others_the_same_tokens(
    checkpoints: dict[str, Path], shape: str, formats: dict[str, Any]
) -> None:
    running = engine(checkpoints[shape], **formats)
    together = tokens(running, requests(40))
    for request in requests(40)[::3]:
        assert tokens(running, [request])[request.request_id] == together[request.request_id]


@pytest.mark.parametrize("shape", SMALL)
def test_what_it_computes_is_what_the_cpu_computes(checkpoints: dict[str, Path], shape: str) -> None:
    """Log-probabilities of a prompt, in float32 on both: what is left is the order of sums."""
    request = EngineRequest(
        request_id="prompt",
        prompt_token_ids=list(range(3, 150)),
        sampling=SamplingParams(max_tokens=1, prompt_logprobs=1, temperature=0.0, seed=0),
        arrival_time=0.0,
    )

    def logprobs(**options: Any) -> torch.Tensor:
        running = engine(checkpoints[shape], dtype="float32", **options)
        assert running.submit(request) is None
        told = []
        while running.has_work:
            told += [output.prompt_logprobs for output in running.step() if output.prompt_logprobs]
        return torch.tensor([entry.logprob for entry in told[0] if entry is not None])

    gpu, cpu = logprobs(), logprobs(device="cpu", isa="reference", threads=1)
    assert len(gpu) == 146
    # TF32 would be off by a hundred times as much.
    torch.testing.assert_close(gpu, cpu, rtol=0, atol=2e-4)


def test_weights_that_do_not_fit_are_refused_before_they_are_read(tmp_path: Path) -> None:
    _, total = torch.cuda.mem_get_info()
    layers = total // (400 * 2**20) + 1  # of 8B's 386 MiB each
    model = write_hollow(tmp_path, replace(SHAPES["qwen3-8b"], layers=layers))
    with pytest.raises(NotEnoughMemory, match="The weights take") as caught:
        engine(model)
    assert "--quantization" in (caught.value.remedy or "")


def test_a_cache_that_does_not_fit_is_refused_with_the_ledger(checkpoints: dict[str, Path]) -> None:
    with pytest.raises(NotEnoughMemory, match="does not fit") as caught:
        engine(checkpoints["dense"], num_kv_blocks=None, kv_cache_memory=100_000.0)
    assert "weights" in caught.value.message


def test_running_out_of_memory_is_put_into_words(device: torch.device) -> None:
    with pytest.raises(torch.OutOfMemoryError) as caught:
        torch.empty(1 << 45, device=device)
    assert "--memory-utilization" in (device_fault(caught.value) or "")


def test_a_gpu_that_is_not_there_is_refused() -> None:
    count = torch.cuda.device_count()
    with pytest.raises(ConfigError, match=f"torch sees {count}"):
        resolve_device(f"cuda:{count}")
    assert resolve_device("auto") == torch.device("cuda", 0)


def test_triton_serves_here(device: torch.device) -> None:
    served = {op: (backend, why) for op, backend, why in select(Target(device, torch.bfloat16)).report()}
    assert is_installed()
    for op in ("add_rms_norm", "attention", "linear"):
        assert served[op][0] == "triton", served[op]


def test_the_limits_of_the_device_are_measured(device: torch.device) -> None:
    found = measure_device(device, seconds=0.01, matmul_size=1024)
    figures = [*found["memory_gb_per_s"].values(), *found["host_gb_per_s"].values(), *found["kernel_gap_us"].values()]
    assert all(figure > 0 for figure in figures)
    assert found["matmul_gflop_per_s"]["bf16"] > 0
    assert found["kernel_gap_us"]["within_graph"] < found["kernel_gap_us"]["graph_replay"]
    assert found["memory_gb_per_s"]["copy"] > found["host_gb_per_s"]["to_device"]
