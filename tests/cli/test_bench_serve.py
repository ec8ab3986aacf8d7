"""The load generator against a server that speaks the protocol, well and badly."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from quire.cli.main import main


def bench(fake_server, capsys, *arguments: str):
    code = main(["bench", "serve", "--url", fake_server.url, "--num-prompts", "8", "--input-len", "5", *arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_completions_by_token_ids(fake_server, capsys):
    code, out, _ = bench(fake_server, capsys, "--output-len", "4", "--json", "--slo", "ttft=60000")
    result = json.loads(out)
    assert code == 0
    assert (result["completed"], result["failed"], result["errors"]) == (8, 0, {})
    assert (result["prompt_tokens"], result["output_tokens"], result["cached_tokens"]) == (40, 32, 16)
    assert result["model"] == "fake-model"
    assert result["request_throughput"] * result["duration_s"] == pytest.approx(8, rel=1e-2)
    assert result["goodput"] == pytest.approx(result["request_throughput"], rel=1e-3)
    assert result["ttft_ms"]["count"] == result["e2e_ms"]["count"] == result["tpot_ms"]["count"] == 8
    assert result["itl_ms"]["count"] == 8 * 3
    assert result["request_rate"] == "inf"
    # One for warming up, which is not counted.
    assert len(fake_server.requests) == 9
    for body in fake_server.requests:
        assert body["ignore_eos"] is True
        assert body["max_tokens"] == 4
        assert body["stream_options"] == {"include_usage": True}
        assert len(body["prompt"]) == 5
        assert all(isinstance(token, int) for token in body["prompt"])
    assert len({tuple(body["prompt"]) for body in fake_server.requests}) == 9


def test_chat_sends_words_and_the_key(fake_server, capsys):
    arguments = ["--endpoint", "chat", "--output-len", "2", "--json", "--api-key", "secret", "--no-ignore-eos"]
    code, out, _ = bench(fake_server, capsys, *arguments, "--model", "other")
    result = json.loads(out)
    assert (code, result["completed"], result["output_tokens"]) == (0, 8, 16)
    assert "secret" not in out
    # The event that only names the role is not a token.
    assert result["itl_ms"]["count"] == 8
    for body, headers in zip(fake_server.requests, fake_server.headers, strict=True):
        assert body["model"] == "other"
        assert "ignore_eos" not in body
        assert len(body["messages"][0]["content"].split()) == 5
        assert headers["authorization"] == "Bearer secret"


def test_without_usage_events_count_as_tokens(fake_server, capsys):
    fake_server.usage = False
    _, out, _ = bench(fake_server, capsys, "--output-len", "3", "--json")
    assert json.loads(out)["output_tokens"] == 24


def test_concurrency_is_bounded(fake_server, capsys):
    code, _, _ = bench(fake_server, capsys, "--max-concurrency", "2", "--output-len", "20", "--json")
    assert code == 0
    assert 1 <= fake_server.most_at_once <= 2


def test_a_table_for_people_and_a_picture(fake_server, capsys, tmp_path: Path):
    picture = tmp_path / "out.png"
    code, out, _ = bench(fake_server, capsys, "--plot", str(picture), "--request-rate", "1000", "--slo", "e2e=9999")
    assert code == 0
    assert all(word in out for word in ("TTFT", "TPOT", "ITL", "E2E", "p99", "goodput"))
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("word", "reason"),
    [
        ("refuse", "The server answered 400: I refuse this prompt."),
        ("break off", "The server broke off its answer."),
        ("fail midway", "The server ended the stream with an error: The engine died."),
    ],
)
async def test_a_failed_request_is_counted_with_its_reason(fake_server, word, reason):
    from quire.cli.bench.serve import Load, run_load, summarise_load
    from quire.cli.bench.workload import BenchRequest

    load = Load(
        url=fake_server.url,
        endpoint="completions",
        model=None,
        warmup=[],
        requests=[BenchRequest(prompt="well", output_len=3), BenchRequest(prompt=word, output_len=3)],
        arrivals=[0.0, 0.0],
        max_concurrency=None,
        extra={},
    )
    _, records, duration = await run_load(load, None, show_progress=False)
    result, summaries = summarise_load(records, duration, {"e2e": 1e6})
    assert (result["completed"], result["failed"], result["errors"]) == (1, 1, {reason: 1})
    assert result["output_tokens"] == 3
    assert summaries["E2E"].count == 1
    assert result["goodput"] * duration == pytest.approx(1)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--endpoint", "chat", "--prompt-format", "token-ids"], "--prompt-format"),
        (["--max-concurrency", "0"], "--max-concurrency"),
        (["--request-rate", "0"], "--request-rate"),
        (["--slo", "soon=3"], "--slo"),
        (["--workload", "shared-prefix"], "--prefix-len"),
        (["--plot", "/nowhere/out.png"], "--plot"),
        (["--warmup", "-1"], "--warmup"),
    ],
)
def test_flags_without_meaning_are_refused_before_anything_is_sent(fake_server, capsys, arguments, words):
    code, _, err = bench(fake_server, capsys, *arguments)
    assert code == 2
    assert words in err
    assert fake_server.requests == []


def test_a_server_that_is_not_there(closed_url, capsys):
    assert main(["bench", "serve", "--url", closed_url]) == 1
    assert closed_url in capsys.readouterr().err
