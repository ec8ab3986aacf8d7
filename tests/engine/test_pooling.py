"""Pooling requests in the engine: the same bits under any schedule, beside one another, and refusals."""

import json
import shutil
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from quire.config.engine import EngineConfig
from quire.core.errors import ConfigError
from quire.core.pooling import PoolingParams, PoolingTask
from quire.core.request import EngineRequest, FinishReason
from quire.core.sampling import SamplingParams
from quire.engine.build import build_engine
from quire.sched.apply import apply
from quire.sched.decide import Decision, Preemption

VOCAB = 384
MAX_PROMPT = 70
STEMS = [list(range(10, 58)), list(range(200, 232)), [7] * 40, []]
EMBED = PoolingParams(task=PoolingTask.EMBED)
TOKEN_EMBED = PoolingParams(task=PoolingTask.TOKEN_EMBED)
METHODS = ("mean", "cls", "max", "lasttoken", "weightedmean", "mean_sqrt_len_tokens")


@pytest.fixture(scope="module")
def embedders(checkpoints, tmp_path_factory) -> dict[str, Path]:
    """The checkpoints, with each way of pooling in files of sentence-transformers beside them."""
    found = {}
    for name, source in checkpoints.items():
        for method in METHODS:
            directory = tmp_path_factory.mktemp(f"{name}-{method}") / "model"
            shutil.copytree(source, directory)
            modules = [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize")]
            content = [{"path": path, "type": f"sentence_transformers.models.{kind}"} for path, kind in modules]
            (directory / "modules.json").write_text(json.dumps(content))
            (directory / "1_Pooling").mkdir()
            (directory / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode": method}))
            found[f"{name}-{method}"] = directory
    return found


@dataclass(frozen=True)
class Job:
    prompt: tuple[int, ...]
    task: PoolingTask
    arrives_at_step: int
    cancelled_after: int | None
    salt: str


@st.composite
def jobs(draw) -> Job:
    stem = draw(st.sampled_from(STEMS))
    cut = draw(st.integers(0, len(stem)))
    tail = draw(st.lists(st.integers(3, VOCAB - 1), min_size=0 if cut else 1, max_size=MAX_PROMPT - cut))
    return Job(
        prompt=tuple(stem[:cut] + tail),
        task=draw(st.sampled_from([PoolingTask.EMBED, PoolingTask.EMBED, PoolingTask.TOKEN_EMBED])),
        arrives_at_step=draw(st.integers(0, 6)),
        cancelled_after=draw(st.sampled_from([None, None, None, None, 0, 2])),
        salt=draw(st.sampled_from(["", "", "s"])),
    )


@st.composite
def schedules(draw) -> dict[str, object]:
    """Engine settings that force chunking, cache hits, evictions, and preemptions of both kinds."""
    return {
        "max_num_batched_tokens": draw(st.sampled_from([5, 16, 33, 512])),
        "max_num_seqs": draw(st.sampled_from([2, 5, 32])),
        "num_kv_blocks": draw(st.sampled_from([11, 13, 40])),
        "enable_prefix_caching": draw(st.booleans()),
        "swap_space": draw(st.sampled_from([0.0, 0.001])),
        "preemption": draw(st.sampled_from(["recompute", "swap"])),
        "threads": draw(st.sampled_from([1, 2])),
    }


def engine_of(directory: Path | str, **config):
    defaults = {"num_kv_blocks": 64, "block_size": 8, "max_model_len": 80, "threads": 1}
    return build_engine(EngineConfig(model=str(directory), **{**defaults, **config}))


def request(name: str, prompt, params: PoolingParams | None, salt: str = "") -> EngineRequest:
    return EngineRequest(
        request_id=name,
        prompt_token_ids=list(prompt),
        sampling=SamplingParams(seed=0),
        arrival_time=0.0,
        cache_salt=salt,
        pooling=params,
    )


def run(engine, *requests: EngineRequest):
    """The last output of each."""
    for each in requests:
        assert engine.submit(each) is None
    last = {}
    while engine.has_work:
        for output in engine.step():
            assert output.request_id not in last, "a pooling request has one output"
            last[output.request_id] = output
    engine.check_integrity()
    return [last[each.request_id] for each in requests]


def array(output):
    assert output.finish_reason is FinishReason.STOP
    assert not output.token_ids
    assert output.error is None
    pooled = output.pooled
    return np.frombuffer(pooled.data, "<f4").reshape(pooled.num_rows, pooled.num_columns)


@cache
def lone_engine(directory: str):
    return engine_of(directory, enable_prefix_caching=False)


@cache
def alone(directory: str, prompt: tuple[int, ...], task: PoolingTask) -> bytes:
    torch.set_num_threads(1)
    (output,) = run(lone_engine(directory), request("alone", prompt, PoolingParams(task=task)))
    return output.pooled.data


@pytest.mark.parametrize(
    "name", ["llama-float32-mean", "llama-float32-cls", "qwen3-bfloat16-mean", "qwen3-bfloat16-lasttoken"]
)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(work=st.lists(jobs(), min_size=1, max_size=8), schedule=schedules())
def test_a_vector_has_the_same_bits_under_any_schedule(embedders, name, work, schedule):
    if schedule["preemption"] == "swap" and not schedule["swap_space"]:
        schedule = {**schedule, "preemption": "recompute"}
    engine = engine_of(embedders[name], **schedule)
    outputs, cancelled = {}, set()
    for turn in range(2000):
        for index, job in enumerate(work):
            if job.arrives_at_step == turn:
                asked = request(f"r{index}", job.prompt, PoolingParams(task=job.task), job.salt)
                assert engine.submit(asked) is None
        for output in engine.step():
            assert output.request_id not in outputs
            outputs[output.request_id] = output
        for index, job in enumerate(work):
            late = job.cancelled_after is not None and turn == job.arrives_at_step + job.cancelled_after
            if late and engine.cancel(f"r{index}") is not None:
                cancelled.add(f"r{index}")
        if turn > 6 and not engine.has_work:
            break
    assert not engine.has_work
    engine.check_integrity()
    assert set(outputs) | cancelled == {f"r{index}" for index in range(len(work))}
    for index, job in enumerate(work):
        if f"r{index}" in outputs:
            found = outputs[f"r{index}"]
            array(found)
            assert found.pooled.data == alone(str(embedders[name]), job.prompt, job.task), (job, schedule)


@pytest.mark.parametrize("swap_out", [False, True])
@pytest.mark.parametrize("method", ["mean", "lasttoken"])
def test_a_preempted_request_is_pooled_to_the_same_bits(embedders, swap_out, method):
    """Forced, as the scheduler lets no prompt in that lacks blocks, and has no other reason to."""
    directory = embedders[f"llama-float32-{method}"]
    engine = engine_of(directory, max_num_batched_tokens=16, swap_space=0.001, enable_prefix_caching=False)
    prompt = tuple(range(20, 80))
    tasks = (PoolingTask.EMBED, PoolingTask.TOKEN_EMBED)
    last = {}
    for task in tasks:
        assert engine.submit(request(task, prompt, PoolingParams(task=task))) is None
        for _ in range(2):
            engine.step()
        state = engine._state
        victim = state.requests[task]
        assert victim.num_computed_tokens == 32
        engine._runner.launch(apply(state, Decision(0.0, preempted=[Preemption(victim, swap_out)]), 0.0))
        assert victim.num_computed_tokens == (32 if swap_out else 0)
        while engine.has_work:
            last.update({output.request_id: output for output in engine.step()})
        engine.check_integrity()
        assert last[task].num_preemptions == 1
        assert last[task].pooled.data == alone(str(directory), prompt, task)


def test_only_poolings_of_the_last_token_read_the_prefix_cache(embedders):
    prompt = tuple(range(30, 70))
    for method in METHODS:
        engine = engine_of(embedders[f"llama-float32-{method}"])
        first, again = (run(engine, request(name, prompt, EMBED))[0] for name in ("a", "b"))
        assert first.pooled == again.pooled
        assert again.num_cached_tokens == (39 if method == "lasttoken" else 0)
        (rows,) = run(engine, request("c", prompt, TOKEN_EMBED))
        assert rows.num_cached_tokens == 0
        assert rows.pooled.num_rows == len(prompt)


@pytest.mark.parametrize("method", METHODS)
def test_every_way_of_pooling_is_what_its_name_says(checkpoints, embedders, method):
    prompt = torch.randint(3, VOCAB, (60,), generator=torch.Generator().manual_seed(1))
    theirs = AutoModelForCausalLM.from_pretrained(checkpoints["llama-float32"], attn_implementation="eager").eval()
    with torch.inference_mode():
        rows = theirs.model(prompt[None]).last_hidden_state[0]
    weights = torch.arange(1.0, 61.0)[:, None]
    expected = {
        "mean": rows.mean(0),
        "cls": rows[0],
        "max": rows.max(0).values,
        "lasttoken": rows[-1],
        "weightedmean": (rows * weights).sum(0) / weights.sum(),
        "mean_sqrt_len_tokens": rows.sum(0) / 60**0.5,
    }[method]
    engine = engine_of(embedders[f"llama-float32-{method}"], max_num_batched_tokens=17)
    normal, plain, per_token = run(
        engine,
        request("a", prompt.tolist(), EMBED),
        request("b", prompt.tolist(), PoolingParams(task=PoolingTask.EMBED, normalize=False)),
        request("c", prompt.tolist(), TOKEN_EMBED),
    )
    unit = torch.nn.functional.normalize(expected, dim=0)
    torch.testing.assert_close(torch.from_numpy(array(normal)[0].copy()), unit, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.from_numpy(array(plain)[0].copy()), expected, rtol=1e-4, atol=1e-4)
    all_units = torch.nn.functional.normalize(rows, dim=1)
    torch.testing.assert_close(torch.from_numpy(array(per_token).copy()), all_units, rtol=1e-4, atol=1e-5)


def refusal(engine, asked: EngineRequest):
    output = engine.submit(asked)
    assert output.finish_reason is FinishReason.ERROR
    assert not engine.has_work
    return output.error


def test_an_engine_refuses_what_its_model_is_not_for(checkpoints, embedders):
    pooling, generating = engine_of(embedders["llama-float32-mean"]), engine_of(checkpoints["llama-float32"])
    assert generating.info.pooling is None
    for engine, params, code, words in (
        (generating, EMBED, "unsupported_task", "generates text"),
        (pooling, None, "unsupported_task", "generates no text"),
        (pooling, PoolingParams(task=PoolingTask.CLASSIFY), "unsupported_task", "'classify'"),
        (pooling, PoolingParams(task=PoolingTask.EMBED, dimensions=32), "invalid_parameter", "not made to be cut"),
        (pooling, PoolingParams(task=PoolingTask.EMBED, activation=True), "invalid_parameter", "no meaning"),
    ):
        error = refusal(engine, request("r", [5, 6, 7], params))
        assert error.code == code
        assert words in error.message
        assert error.remedy
    # All of the context may be prompt, as nothing is generated; not one token more.
    assert array(run(pooling, request("r", [5] * 80, EMBED))[0]).shape == (1, 64)
    assert refusal(pooling, request("r", [5] * 81, EMBED)).code == "context_length_exceeded"


def test_the_operator_decides_between_the_two(checkpoints, embedders):
    vectors = engine_of(checkpoints["llama-float32"], runner="pooling")
    assert vectors.info.pooling.tasks == (PoolingTask.EMBED, PoolingTask.TOKEN_EMBED)
    text = engine_of(embedders["llama-float32-mean"], runner="generate")
    assert text.info.pooling is None
    assert text.submit(request("r", [5, 6, 7], None)) is None


def test_a_pooling_architecture_generates_nothing(checkpoints, tmp_path):
    shutil.copytree(checkpoints["llama-float32"], tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "architectures": ["LlamaModel"]}))
    assert engine_of(tmp_path / "model").info.pooling is not None
    with pytest.raises(ConfigError, match="generates no text") as caught:
        engine_of(tmp_path / "model", runner="generate")
    assert caught.value.param == "runner"


def test_numbers_that_are_not_finite_fail_one_request_alone(embedders):
    engine = engine_of(embedders["llama-float32-lasttoken"])
    embedding = engine._runner._decoder.embedding
    row = embedding.weight[9].clone()
    bad = torch.full_like(row, float("nan"))
    with torch.inference_mode():
        embedding.weight[9].copy_(bad)
    broken, sound = run(engine, request("a", [9, 10], EMBED), request("b", [11, 10], EMBED))
    assert broken.finish_reason is FinishReason.ERROR
    assert broken.error.code == "engine_error"
    assert np.isfinite(array(sound)).all()
