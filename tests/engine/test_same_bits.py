"""P1: a request's tokens and logprobs are the same bits under any schedule as when it runs alone."""

from dataclasses import dataclass, replace
from functools import cache

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from quire.config.engine import EngineConfig
from quire.core.request import EngineRequest, FinishReason
from quire.core.sampling import SamplingParams
from quire.engine.build import build_engine
from quire.engine.graphs import Direct
from quire.engine.loop import Engine
from quire.engine.padded import PaddedSteps
from quire.ops.cpu.library import usable_isas

VOCAB = 384
MAX_PROMPT = 70
STEMS = [list(range(10, 58)), list(range(200, 232)), [7] * 40]


@dataclass(frozen=True)
class Job:
    prompt: tuple[int, ...]
    sampling: SamplingParams
    arrives_at_step: int
    cancelled_after: int | None
    salt: str
    tenant: str


@st.composite
def jobs(draw) -> Job:
    stem = draw(st.sampled_from([*STEMS, []]))
    cut = draw(st.integers(0, len(stem)))
    tail = draw(st.lists(st.integers(3, VOCAB - 1), min_size=0 if cut else 1, max_size=MAX_PROMPT - cut))
    sampling = SamplingParams(
        seed=draw(st.integers(0, 5)),
        max_tokens=draw(st.integers(1, 24)),
        ignore_eos=draw(st.booleans()),
        logprobs=draw(st.sampled_from([None, None, 0, 3])),
        prompt_logprobs=draw(st.sampled_from([None, None, None, 2])),
        temperature=draw(st.sampled_from([0.0, 0.0, 0.7, 1.3])),
        top_p=draw(st.sampled_from([1.0, 0.8])),
        top_k=draw(st.sampled_from([0, 20])),
        presence_penalty=draw(st.sampled_from([0.0, 0.0, 0.0, 0.5])),
        repetition_penalty=draw(st.sampled_from([1.0, 1.0, 1.0, 1.2])),
    )
    return Job(
        prompt=tuple(stem[:cut] + tail),
        sampling=sampling,
        arrives_at_step=draw(st.integers(0, 12)),
        cancelled_after=draw(st.sampled_from([None, None, None, None, 0, 3])),
        salt=draw(st.sampled_from(["", "", "s"])),
        tenant=draw(st.sampled_from(["", "", "a", "b"])),
    )


@st.composite
def schedules(draw) -> dict[str, object]:
    """Engine settings that force chunking, cache hits, evictions, and preemptions of both kinds."""
    return {
        "max_num_batched_tokens": draw(st.sampled_from([7, 16, 33, 64, 512])),
        "max_num_seqs": draw(st.sampled_from([2, 5, 32])),
        "num_kv_blocks": draw(st.sampled_from([13, 16, 40])),
        "block_size": 8,
        "enable_prefix_caching": draw(st.booleans()),
        "swap_space": draw(st.sampled_from([0.0, 0.001])),
        "preemption": draw(st.sampled_from(["recompute", "swap"])),
        "scheduling_policy": draw(st.sampled_from([None, "fcfs", "priority", "fair"])),
        "threads": draw(st.sampled_from([1, 2])),
        "async_scheduling": draw(st.booleans()),
    }


def pad(engine: Engine, tokens: int, requests: int) -> None:
    """Steps with prompts in them are padded, as on a GPU, where the model's steps can be captured."""
    runner = engine._runner
    if runner._decode is not None:
        model, kv = runner._decoder, runner._kv
        runner._padded = PaddedSteps(model, kv, Direct(), tokens=tokens, requests=requests, longest=96)


def engine_request(name: str, job: Job) -> EngineRequest:
    return EngineRequest(
        request_id=name,
        prompt_token_ids=list(job.prompt),
        sampling=job.sampling,
        arrival_time=0.0,
        cache_salt=job.salt,
        tenant=job.tenant,
    )


def result_of(outputs):
    """All that P1 promises, with floats as they are: compared by ==, hence to the last bit."""
    prompt_logprobs = [output.prompt_logprobs for output in outputs if output.prompt_logprobs is not None]
    assert len(prompt_logprobs) <= 1
    return (
        [token for output in outputs for token in output.token_ids],
        [entry for output in outputs for entry in output.logprobs or []],
        [list(entries) for entries in prompt_logprobs],
        outputs[-1].finish_reason,
        outputs[-1].stop_reason,
    )


@cache
def alone(directory: str, threads: int, prompt: tuple[int, ...], key: str, sampling_items: tuple, formats: tuple = ()):
    """The request by itself, on so many threads, in an engine with room for everything and no cache."""
    engine = lone_engine(directory, threads, formats)
    torch.set_num_threads(threads)
    job = Job(prompt, SamplingParams(**dict(sampling_items)), 0, None, key, "")
    assert engine.submit(engine_request("alone", job)) is None
    outputs = []
    while engine.has_work:
        outputs.extend(engine.step())
    return result_of(outputs)


@cache
def lone_engine(directory: str, threads: int, formats: tuple):
    return build_engine(
        EngineConfig(
            model=directory,
            num_kv_blocks=64,
            block_size=16,
            enable_prefix_caching=False,
            max_model_len=128,
            threads=threads,
            **dict(formats),
        )
    )


def items(sampling: SamplingParams) -> tuple:
    names = ("seed", "max_tokens", "ignore_eos", "logprobs", "prompt_logprobs", "temperature", "top_p", "top_k")
    return tuple((name, getattr(sampling, name)) for name in (*names, "presence_penalty", "repetition_penalty"))


FORMATS = [
    ("llama-float32", {}),
    ("qwen3-bfloat16", {}),
    ("qwen3-bfloat16", {"isa": "reference"}),
    ("deepseek-bfloat16", {}),
    *(
        ("qwen3-bfloat16", formats)
        for formats in (
            {"isa": "avx2"},
            {"quantization": "int8", "kv_cache_dtype": "int8"},
            {"quantization": "int4", "kv_cache_dtype": "fp8"},
            {"quantization": "fp8"},
        )
        if "avx2" in usable_isas()
    ),
]


@pytest.mark.parametrize(("name", "formats"), FORMATS, ids=str)
@settings(
    max_examples=20,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.data_too_large],
)
@given(
    work=st.lists(jobs(), min_size=2, max_size=10), schedule=schedules(), padded=st.sampled_from([None, None, 32, 96])
)
def test_any_schedule_gives_the_bits_of_each_request_alone(checkpoints, name, formats, work, schedule, padded):
    directory = str(checkpoints[name])
    engine = build_engine(EngineConfig(model=directory, max_model_len=96, **schedule, **formats))
    if padded is not None:
        pad(engine, padded, schedule["max_num_seqs"])
    # Compiled kernels: the same bits on any number of threads.
    threads = 1 if "quantization" in formats or formats.get("isa") == "avx2" else schedule["threads"]
    outputs = {f"r{index}": [] for index in range(len(work))}
    cancelled = set()
    for turn in range(4000):
        for index, job in enumerate(work):
            if job.arrives_at_step == turn:
                assert engine.submit(engine_request(f"r{index}", job)) is None
        for output in engine.step():
            outputs[output.request_id].append(output)
        for index, job in enumerate(work):
            request_id = f"r{index}"
            if job.cancelled_after is not None and turn == job.arrives_at_step + job.cancelled_after:
                output = engine.cancel(request_id)
                if output is not None:
                    cancelled.add(request_id)
        if turn > 12 and not engine.has_work:
            break
    assert not engine.has_work
    engine.check_integrity()
    for index, job in enumerate(work):
        request_id = f"r{index}"
        expected = alone(directory, threads, job.prompt, job.salt, items(job.sampling), tuple(sorted(formats.items())))
        if request_id in cancelled:
            tokens = [token for output in outputs[request_id] for token in output.token_ids]
            assert tokens == expected[0][: len(tokens)]
            continue
        result = result_of(outputs[request_id])
        assert result == expected, (request_id, job, schedule)
        assert result[3] in (FinishReason.STOP, FinishReason.LENGTH)


@pytest.mark.parametrize("preemption", ["recompute", "swap"])
def test_the_schedules_do_force_preemption(checkpoints, preemption):
    """Guards the property above against passing because nothing ever happened."""
    config = EngineConfig(
        model=str(checkpoints["qwen3-bfloat16"]),
        num_kv_blocks=13,
        block_size=8,
        max_model_len=96,
        swap_space=0.001,
        preemption=preemption,
        enable_prefix_caching=False,
        threads=1,
    )
    engine = build_engine(config)
    sampling = SamplingParams(seed=1, max_tokens=40, ignore_eos=True, temperature=0.8, logprobs=1)
    work = [Job(tuple(range(20 + i, 40 + i)), sampling, 0, None, "", "") for i in range(4)]
    for index, job in enumerate(work):
        engine.submit(engine_request(f"r{index}", job))
    outputs = {f"r{index}": [] for index in range(4)}
    while engine.has_work:
        for output in engine.step():
            outputs[output.request_id].append(output)
    stats = engine.stats()
    assert stats.num_preemptions > 0
    assert (stats.num_swaps > 0) == (preemption == "swap")
    for index, job in enumerate(work):
        expected = alone(config.model, 1, job.prompt, "", items(sampling))
        assert result_of(outputs[f"r{index}"]) == expected


def test_a_seed_decides_the_sample(checkpoints):
    """The same seed twice is the same; other seeds differ: sampling is random, and only by its seed."""
    directory = str(checkpoints["qwen3-bfloat16"])
    sampling = SamplingParams(seed=1, max_tokens=24, ignore_eos=True, temperature=1.0)
    tokens = {
        seed: tuple(alone(directory, 1, (5, 6, 7), "", items(replace(sampling, seed=seed)))[0]) for seed in range(6)
    }
    assert len(set(tokens.values())) == 6
