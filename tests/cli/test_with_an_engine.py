"""Commands that run an engine of their own, on a toy checkpoint with random weights."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

from quire.cli.main import main

ENGINE = ["--threads", "1", "--num-kv-blocks", "64", "--max-num-seqs", "4"]


@pytest.fixture
def quire(tiny_checkpoint: Path, capsys):
    """Runs a command on the toy, and returns what it wrote to stdout."""

    def run(*arguments: str) -> str:
        command = [str(tiny_checkpoint) if argument == "MODEL" else argument for argument in arguments]
        assert main(command) == 0, capsys.readouterr().err
        return capsys.readouterr().out

    return run


def test_throughput_beside_transformers(quire):
    sizes = ["--num-prompts", "3", "--input-len", "6", "--output-len", "5"]
    result = json.loads(quire("bench", "throughput", "MODEL", *sizes, "--backend", "both", "--json", *ENGINE))
    for backend in ("quire", "transformers"):
        assert (result[backend]["prompt_tokens"], result[backend]["output_tokens"]) == (18, 15)
        rate, duration = result[backend]["output_token_throughput"], result[backend]["duration_s"]
        assert rate * duration == pytest.approx(15, rel=1e-2)
    rates = [result[backend]["output_token_throughput"] for backend in ("quire", "transformers")]
    assert result["ratio"] == pytest.approx(rates[0] / rates[1], rel=1e-2)


def test_latency_counts_the_measured_batches_only(quire):
    sizes = [
        "--batch-size",
        "2",
        "--input-len",
        "4",
        "--output-len",
        "3",
        "--num-iters",
        "3",
        "--num-warmup-iters",
        "1",
    ]
    result = json.loads(quire("bench", "latency", "MODEL", *sizes, "--json", *ENGINE))
    assert result["batch_ms"]["count"] == 3
    assert 0 < result["batch_ms"]["p50"] <= result["batch_ms"]["p99"]


def test_startup_goes_through_its_phases_in_order(quire):
    result = json.loads(quire("bench", "startup", "MODEL", "--repeat", "1", "--json", *ENGINE))
    (times,) = result["runs_s"]
    assert 0 < times["listening"] <= times["ready"] <= times["first_token"]
    assert result["median_s"]["first_token"] == pytest.approx(times["first_token"], rel=1e-3)


def test_a_server_that_does_not_come_up_is_told_with_its_last_words(tmp_path: Path, capsys):
    (tmp_path / "config.json").write_text("{}")
    assert main(["bench", "startup", str(tmp_path), "--repeat", "1"]) == 1
    err = capsys.readouterr().err
    assert "ended with exit code" in err
    assert "tokenizer.json is missing" in err


def test_complete_gives_what_the_python_api_gives(quire, tiny_checkpoint: Path):
    from quire import LLM, SamplingParams

    out = quire("complete", "hello", "--model", "MODEL", "--max-tokens", "6", "--temperature", "0", *ENGINE)
    llm = LLM(str(tiny_checkpoint), threads=1, num_kv_blocks=64, max_num_seqs=4)
    params = SamplingParams(temperature=0.0, max_tokens=6)
    assert out == llm.generate("hello", params, progress=False)[0].outputs[0].text + "\n"


def test_chat_in_process(quire, monkeypatch):
    answers = []
    for lines in ("hello\n", "hello\n/reset\nhello\n"):
        monkeypatch.setattr("sys.stdin", io.StringIO(lines))
        answers.append(quire("chat", "MODEL", "--max-tokens", "4", "--temperature", "0", *ENGINE))
    assert answers[0]
    # A conversation that was reset answers as a new one does.
    assert answers[1] == 2 * answers[0]


def test_plan_is_told_as_a_table_and_as_json(quire):
    plan = json.loads(quire("plan", "MODEL", "--json", *ENGINE))
    assert plan["fits"] is True
    assert plan["weight_bytes"] > 0
    assert "weights" in quire("plan", "MODEL", *ENGINE)


def test_a_plan_for_a_gpu_that_is_elsewhere(quire):
    figures = ["--device", "cuda", "--memory", "80", "--bandwidth", "3000", "--tflops", "600"]
    here, there = (json.loads(quire("plan", "MODEL", "--json", *more)) for more in ([], figures))
    assert (here["device"], there["device"]) == ("cpu", "gpu")
    assert (there["memory_available"], there["bandwidth"], there["flops"]) == (80 * 2**30, 3e12, 6e14)
    assert here["captured_bytes"] == 0 < there["captured_bytes"]
    assert "256" in there["decode_tokens_per_s"], "requests at once, as a GPU's default is"
    assert "captured steps" in quire("plan", "MODEL", *figures)
