"""The benchmark of one GPU, as far as it goes without one: what it counts, what it asks for, and a turn on the CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.gpu.counts import Limits, count
from benchmarks.gpu.engines import Quire, Settings
from benchmarks.gpu.hollow import random_weights, write_hollow
from benchmarks.gpu.report import lines, medians, rows, table
from benchmarks.gpu.workloads import Prompts, Work, decode_seconds, measure, nano_vllm, shortened
from quire.models.load import load_model
from tools.make_checkpoint import SHAPES

ROOT = Path(__file__).parents[2]
H200 = Limits(bandwidth=4.3e12, flops=788e12)
# Worked out by hand from the published shapes: ms of a decode step of 1, 64 and 256 requests with 1024 tokens each, of
# a prefill of 1024 and of 8192 tokens, and tokens a second of nano-vllm's bench.
BY_HAND = {
    "qwen3-0.6b": (0.305, 2.03, 7.27, 1.3, 18.9, 36_400),
    "qwen3-4b": (1.91, 4.12, 10.9, 9.8, 101, 18_100),
    "qwen3-8b": (3.56, 5.77, 12.5, 18.4, 170, 13_000),
    "llama-3.1-8b": (3.52, 5.49, 11.5, 18.5, 167, None),
    "qwen3-30b-a3b": (1.44, 15.3, 20.0, None, 90, None),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_the_roofline_is_the_one_worked_out_by_hand(tmp_path, name):
    counts = count(write_hollow(tmp_path / name, SHAPES[name]))
    work = nano_vllm()
    found = [counts.decode(batch, 1024).seconds(H200) * 1e3 for batch in (1, 64, 256)]
    found += [counts.prefill([length]).seconds(H200) * 1e3 for length in (1024, 8192)]
    found.append(sum(work.output_lens) / counts.whole([len(p) for p in work.prompts], work.output_lens, H200))
    for one, other in zip(found, BY_HAND[name], strict=True):
        assert other is None or one == pytest.approx(other, rel=0.03)


def test_weights_in_fewer_bits_are_fewer_bytes(tmp_path):
    model = write_hollow(tmp_path, SHAPES["qwen3-8b"])
    plain, fp8, int4 = (count(model, quantization=each) for each in (None, "fp8", "int4"))
    assert fp8.layers_bytes == pytest.approx(plain.layers_bytes / 2, rel=0.01)
    assert fp8.layers_bytes > 1.5 * int4.layers_bytes
    assert count(model, kv_cache_dtype="int8").kv_bytes_per_token < 0.6 * plain.kv_bytes_per_token
    assert plain.layers_elements == fp8.layers_elements


@pytest.fixture(scope="module")
def counts(tmp_path_factory):
    return count(write_hollow(tmp_path_factory.mktemp("experts"), SHAPES["qwen3-30b-a3b"]))


@given(batch=st.integers(1, 512), context=st.integers(1, 5000))
def test_a_larger_step_never_takes_less(counts, batch, context):
    step = counts.decode(batch, context)
    assert counts.decode(batch + 1, context).seconds(H200) > step.seconds(H200)
    assert counts.decode(batch, context + 1).seconds(H200) > step.seconds(H200)
    assert step.bound(H200) in ("memory", "arithmetic")
    assert counts.experts_bytes * counts.expert_share <= step.bytes - counts.layers_bytes
    assert step.bytes <= counts.weight_bytes + (batch * context + batch) * counts.kv_bytes_per_token


def test_nano_vllms_bench_has_the_tokens_that_it_is_known_by():
    work = nano_vllm()
    assert (len(work.prompts), sum(map(len, work.prompts)), sum(work.output_lens)) == (256, 142_827, 133_966)
    assert shortened(work, 10**6, 10**6) == work
    small = shortened(work, 3, 7)
    assert [len(prompt) for prompt in small.prompts] == small.output_lens == [3, 3, 3]
    assert max(map(max, small.prompts)) < 7


class Clock:
    """An engine whose steps take a second per request that runs in them, and whose prompts a second per token."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, list[int]]] = []

    def room(self) -> int:
        return 1000

    def generate(self, prompts, output_lens, *, temperature=0.0):
        self.asked.append((len(prompts[0]), list(output_lens)))
        steps = sum(sum(length > step for length in output_lens) for step in range(max(output_lens)))
        return float(sum(map(len, prompts)) + steps)


def test_what_two_runs_have_in_common_cancels_out():
    engine = Clock()
    assert decode_seconds(engine, Prompts(0, 100), 5, steps=(4, 20), context=50) == 5
    assert engine.asked == [(38, [4] * 5), (38, [20] * 5)]


def test_what_has_no_room_is_told_and_left_out(capsys):
    asked = {"batches": [2, 64], "prefills": [10], "steps": (4, 20), "context": 50, "nano": None}
    assert dict(measure(Clock(), Prompts(0, 100), **asked)) == {"decode 2": 2, "prefill 10": 11}
    assert "64 requests" in capsys.readouterr().err


def test_a_turn_on_the_cpu_and_its_table(tmp_path):
    model = write_hollow(tmp_path, SHAPES["tiny"])
    options = {"max_model_len": 128, "kv_cache_memory": 0.01, "threads": 1}
    engine = Quire(model, Settings(batch=4, device="cpu", memory_utilization=0.5, options=options))
    nano = Work(prompts=[[1, 2], [3]], output_lens=[3, 5])
    asked = {"batches": [2], "prefills": [16], "context": 16, "nano": nano}
    found = dict(measure(engine, Prompts(0, 512), steps=(2, 6), **asked))
    assert set(found) == {"decode 2", "prefill 16", "nano"}
    turns = {"quire": [{"seconds": found}], "vllm": [{"seconds": {"nano": 2 * found["nano"]}}], "transformers": []}
    wanted = lines(count(model), H200, **asked)
    assert wanted[-1].tokens == 8
    drawn = table(rows(wanted, turns), list(turns))
    assert "2.00" in drawn.splitlines()[-1]
    assert all(name in drawn for name in found)


def test_medians_are_of_the_turns_that_have_the_figure():
    turns = [{"seconds": {"a": value}} for value in (3.0, 1.0, 2.0)] + [{"seconds": {}}]
    assert medians(turns, "a") == 2.0
    assert medians(turns, "b") is None


def test_random_weights_are_the_same_each_time_and_no_two_alike(tmp_path):
    model = write_hollow(tmp_path, SHAPES["tiny"])

    def load(**options):
        with random_weights():
            return load_model(model, threads=1, isa="reference", **options).decoder

    one, other = load(), load()
    weights = [layer.mlp.down.weight for decoder in (one, other) for layer in decoder.layers]
    assert torch.equal(weights[0], weights[2])
    assert torch.equal(weights[1], weights[3])
    assert not torch.equal(weights[0], weights[1])
    assert 0.015 < weights[0].float().std() < 0.025
    assert torch.equal(one.norm.weight, torch.ones_like(one.norm.weight))
    load(quantization="int8")
    assert load_model(model, threads=1, isa="reference").decoder.layers[0].mlp.down.weight.count_nonzero() == 0


WITH_LITTLE = """
import sys

BLOCKED = {"cyclopts", "rich", "obstore", "aiohttp", "uvicorn", "structlog", "yaml"}

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in BLOCKED or name == "quire.ops.cpu._kernels":
            raise ModuleNotFoundError(f"blocked: {name}")
sys.meta_path.insert(0, Blocked())
import benchmarks.gpu.worker
benchmarks.gpu.worker.main()
import quire.cli.bench.device_limits
"""


def test_little_need_be_installed(tmp_path):
    """The GPU machines that this is for have torch, and not all of our dependencies."""
    task = {
        "engine": "quire",
        "model": str(write_hollow(tmp_path, SHAPES["tiny"])),
        "turn": 0,
        "vocab_size": 512,
        "settings": {
            "batch": 2,
            "device": "cpu",
            "memory_utilization": 0.5,
            "options": {"max_model_len": 64, "kv_cache_memory": 0.01, "isa": "reference", "threads": 1},
        },
        "batches": [],
        "prefills": [8],
        "steps": [2, 4],
        "context": 16,
        "nano": 0,
        "out": str(tmp_path / "out.json"),
    }
    command = [sys.executable, "-c", WITH_LITTLE, json.dumps(task)]
    paths = [str(ROOT), *(path for path in sys.path if path)]
    ran = subprocess.run(
        command,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["seconds"]["prefill 8"] > 0
    assert found["kernels"]["linear"]


def test_a_dry_run_prints_the_roofline_of_the_limits_that_are_given():
    command = [sys.executable, "-m", "benchmarks.gpu", "qwen3-8b", "--dry-run", "--bandwidth", "2e12"]
    paths = [str(ROOT / "src"), *(path for path in sys.path if path)]
    ran = subprocess.run(
        command,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert "copy 2,000 GB/s, bf16 788 TFLOP/s" in ran.stdout
    assert "| decode 1 | 7.6" in ran.stdout
