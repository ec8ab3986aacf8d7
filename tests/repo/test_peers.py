"""What the peers' harness computes: prompts, ratios, spreads, tables. The engines are measured by hand, not here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from argparse import ArgumentTypeError
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.peers.__main__ import contestant_name
from benchmarks.peers.measure import Contest, Contestant
from benchmarks.peers.peer import Settings
from benchmarks.peers.quire import Quire
from benchmarks.peers.registry import PEERS
from benchmarks.peers.report import METRICS, draw, markdown, ratios, rivals, spread
from benchmarks.peers.worker import measure
from benchmarks.peers.workloads import OFFLINE, ONLINE, WORKLOADS, common_prefix_len

BUILT_IN = Path(__file__).parents[2] / "src" / "quire" / "assets" / "quire_tiny"

positive = st.floats(min_value=1e-3, max_value=1e3)


@given(
    name=st.sampled_from(sorted(WORKLOADS)),
    turn=st.integers(-1000, 1000),
    limits=st.tuples(st.integers(1, 40), st.integers(1, 300), st.integers(1, 100)),
)
def test_prompts_have_the_lengths_asked_for_and_share_only_what_they_should(name, turn, limits):
    num_prompts, length, output_len = limits
    workload = WORKLOADS[name].shortened(num_prompts=num_prompts, length=length, output_len=output_len)
    prompts = workload.prompts(turn, 100_000)
    assert prompts == workload.prompts(turn, 100_000)
    assert len(prompts) == workload.num_prompts <= num_prompts
    assert {len(prompt) for prompt in prompts} == {workload.prompt_len}
    assert all(0 <= token < 100_000 for prompt in prompts for token in prompt)
    assert all(prompt[: workload.shared_len] == prompts[0][: workload.shared_len] for prompt in prompts)
    assert workload.shortened(num_prompts=10**6, length=10**6, output_len=10**6) == workload


@pytest.mark.parametrize("workload", [*OFFLINE, *ONLINE], ids=lambda workload: workload.name)
def test_another_turn_has_nothing_that_a_prefix_cache_could_know(workload):
    one, other = (workload.prompts(turn, 100_000) for turn in (0, 1))
    assert common_prefix_len([one[0], other[0]]) < 16
    if workload.num_prompts > 1:
        assert common_prefix_len([one[0], one[1]]) in range(workload.shared_len, workload.shared_len + 16)


@given(st.lists(st.lists(st.integers(0, 2), max_size=6), min_size=1, max_size=4))
def test_a_common_prefix_is_as_long_as_that_of_texts(sequences):
    texts = ["".join(map(str, sequence)) for sequence in sequences]
    assert common_prefix_len(sequences) == len(os.path.commonprefix(texts))  # noqa: RUF071


@given(st.dictionaries(st.integers(0, 9), positive, min_size=1), st.dictionaries(st.integers(0, 9), positive))
def test_ratios_pair_the_turns_that_both_took_and_favour_the_better(ours, theirs):
    both = ours.keys() & theirs.keys()
    more, less = ratios(ours, theirs, True), ratios(ours, theirs, False)
    assert len(more) == len(less) == len(both)
    for turn, as_rate, as_time in zip(sorted(both), more, less, strict=True):
        assert (as_rate > 1) == (ours[turn] > theirs[turn])
        assert as_rate * as_time == pytest.approx(1)


def test_a_spread_tells_median_least_and_most():
    assert spread([3.0, 1.0, 2.0]) == "2.00 [1.00–3.00]"
    assert spread([412.4]) == "412"
    assert spread([10.0, 20.0]) == "15.0 [10.0–20.0]"


def test_quire_is_compared_at_the_same_bits_or_with_the_only_ones_a_peer_has():
    others = [("quire", "int8"), ("vllm", "bf16"), ("llama.cpp", "bf16"), ("llama.cpp", "int8"), ("openvino", "int4")]
    assert rivals(("quire", "int8"), others) == [("vllm", "bf16"), ("llama.cpp", "int8")]
    assert rivals(("quire", "bf16"), others) == [("vllm", "bf16"), ("llama.cpp", "bf16")]


def record(peer: str, workload: str, turn: int, **fields: float) -> dict:
    memory = {"weight_bytes": 2**29, "loaded_bytes": 2**30, "resident_bytes": 2**31, "read_gb_per_s": 20.0}
    return {"peer": peer, "precision": "bf16", "workload": workload, "turn": turn, **memory, **fields}


@pytest.fixture
def figures() -> dict:
    fields = {"num_prompts": 1, "shared_len": 0, "input_len": 128, "output_len": 11}
    return {
        "checkpoint": "toy",
        "date": "today",
        "machine": {"cpu": "a processor", "threads": 2, "memory_gib": 8.0},
        "workloads": {"W1": fields, "W2": fields | {"output_len": 1}},
        "records": [
            record("quire", "W1", 0, seconds=1.5, first_token_s=0.5, others_cpu=0.25),
            record("quire", "W1", 1, seconds=2.5, first_token_s=0.5),
            record("vllm", "W1", 0, seconds=2.5, first_token_s=0.25),
            record("vllm", "W2", 0, seconds=0.5, first_token_s=None),
            record("vllm", "W6", 0, seconds=7.0),
        ],
    }


def test_the_tables_hold_medians_and_paired_ratios(figures):
    lines = markdown(figures).splitlines()
    assert "20.0 [20.0–20.0] GB/s" in lines[0]
    assert "25% of the cores" in lines[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    table = [dict(zip(rows[0], row, strict=True)) for row in rows[2:4]]
    assert [row["engine"] for row in table] == ["quire bf16", "vllm bf16"]
    assert [row["W1 decode tok/s"] for row in table] == ["7.50 [5.00–10.00]", "4.44"]
    assert [row["W2 prompt tok/s"] for row in table] == ["", "256"]
    assert [row["W6 first token s"] for row in table] == ["", "7.00"]
    assert [row["W7 of it above weights"] for row in table] == ["0.50 [0.50–0.50]", "0.50"]
    assert [row["W7 RSS GiB at most"] for row in table] == ["2.00 [2.00–2.00]", "2.00"]
    (ratio,) = [dict(zip(rows[4], row, strict=True)) for row in rows[6:]]
    assert ratio["quire / peer"] == "quire bf16 / vllm bf16"
    assert ratio["W1 decode tok/s"] == "2.25"  # the first turn's 10 over 4.44; vLLM took no second
    assert ratio["W1 first token s"] == "0.50"


def test_a_picture_is_drawn_of_what_was_measured(figures, tmp_path):
    draw(figures, tmp_path / "chart.png")
    assert (tmp_path / "chart.png").read_bytes().startswith(b"\x89PNG")


def test_weights_in_memory_are_those_of_the_files_or_as_quire_packs_them(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(bytes(300))
    (tmp_path / "config.json").write_bytes(bytes(30))
    assert PEERS["vllm"](tmp_path).weight_bytes(tmp_path, "bf16") == 300
    assert PEERS["llama.cpp"](tmp_path).weight_bytes(tmp_path / "model.safetensors", "int4") == 300
    ours = Quire(tmp_path)
    bf16, int8, int4 = (ours.weight_bytes(BUILT_IN, precision) for precision in ours.precisions)
    assert bf16 > int8 > int4 > 0


def test_every_workload_has_a_figure():
    assert {metric.workload for metric in METRICS} - {""} == {*WORKLOADS, "W6"}


def test_engines_are_named_by_peer_and_precision():
    assert contestant_name("llama.cpp:int4") == ("llama.cpp", "int4")
    assert contestant_name("vllm") == ("vllm", "bf16")
    for text in ("nobody", "vllm:int4"):
        with pytest.raises(ArgumentTypeError, match=text):
            contestant_name(text)
    assert set(PEERS) == {"quire", "vllm", "llama.cpp", "openvino", "transformers"}


def test_a_stream_is_timed_with_another_prompts_first_token():
    calls = []

    def generate(prompts, output_len):
        calls.append((prompts, output_len))
        return [[7] * output_len for _ in prompts]

    workload = OFFLINE[0]
    result = measure(generate, workload, 3, 1000)
    (first, one), (prompts, all_of_them) = calls
    assert (one, all_of_them) == (1, workload.output_len)
    assert common_prefix_len([first[0], prompts[0]]) < 16
    assert result["seconds"] >= 0
    assert result["first_token_s"] >= 0
    assert result["first_tokens"] == [7] * 16
    assert measure(generate, OFFLINE[2], 0, 1000)["first_token_s"] is None
    with pytest.raises(AssertionError, match="64 tokens asked for"):
        measure(lambda prompts, _: [[1]] * len(prompts), OFFLINE[2], 0, 1000)


def test_quire_takes_its_turns_offline_and_through_its_server(tmp_path):
    tool = Path(__file__).parents[2] / "tools" / "make_checkpoint.py"
    subprocess.run([sys.executable, str(tool), str(tmp_path / "tiny"), "--shape", "tiny"], check=True)
    small = {"num_prompts": 2, "length": 16, "output_len": 3}
    contest = Contest(
        [Contestant(Quire(tmp_path), "bf16")],
        tmp_path / "tiny",
        Settings(precision="bf16", threads=1, kv_gib=0.05),
        directory=tmp_path / "out",
        timeout=120,
    )
    contest.offline([workload.shortened(**small) for workload in OFFLINE], turns=2)
    contest.starts([ONLINE[0].shortened(**small)], turns=1)
    figures = json.loads((tmp_path / "out" / "figures.json").read_text())
    found = {(record["workload"], record["turn"]) for record in figures["records"]}
    assert found == {(name, turn) for name in ("W1", "W2", "W3", "W4") for turn in (0, 1)} | {("W6", 0), ("W5", 0)}
    served = next(record for record in figures["records"] if record["workload"] == "W5")
    assert (served["completed"], served["failed"], served["output_tokens"]) == (2, 0, 6)
    assert all(record["resident_bytes"] > 50e6 and record["read_gb_per_s"] > 0 for record in figures["records"])
    assert "| quire bf16 |" in markdown(figures)
