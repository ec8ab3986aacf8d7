"""`quire quantize`, on the built-in model and a toy."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from quire.cli.main import main
from quire.models.load import load_model

THREADS = ["--threads", "1"]


def test_a_checkpoint_that_runs(tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert main(["quantize", str(tiny_checkpoint), str(out), "--format", "int4", "--group-size", "64", *THREADS]) == 0
    assert str(out) in capsys.readouterr().out
    assert load_model(out, isa="reference").decoder.layers[0].attention.q.weight.group_size == 64
    answer = ["complete", "hello", "--model", str(out), "--max-tokens", "3", "--num-kv-blocks", "8", *THREADS]
    assert main([*answer, "--temperature", "0"]) == 0


def test_calibration_improves_the_built_in_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In the chat template's form, from conversations that are not those of the held-out questions."""
    turns = [(f"What is {a} + {a * 7 % 40}?", str(a + a * 7 % 40)) for a in range(100)]
    turns += [(f"What does {word} mean?", f"{word} is a word.") for word in ("TTFT", "prefill", "a KV cache", "decode")]
    text = tmp_path / "text.txt"
    text.write_text(
        "".join(
            f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n{answer}<|im_end|>\n"
            for question, answer in turns
        )
    )
    divergence = {}
    for name, how in (("rtn", []), ("gptq", ["--calibration", str(text)])):
        out = str(tmp_path / name)
        assert main(["quantize", "quire-tiny", out, "--format", "int4", "--group-size", "128", *how, *THREADS]) == 0
        capsys.readouterr()
        compare = ["bench", "quality", out, "--against", "quire-tiny", "--text", str(text), "--json", *THREADS]
        assert main(compare) == 0
        divergence[name] = json.loads(capsys.readouterr().out)["kl_mean"]
    assert divergence["gptq"] < 0.7 * divergence["rtn"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--format", "int4", "--group-size", "48"], "48.*32, 64 or 128"),
        (["--format", "int4", "--method", "gptq"], "--calibration"),
        (["--format", "fp8", "--calibration", "TEXT"], "int8 and int4"),
        (["--format", "int8", "--calibration", "TEXT", "--method", "rtn"], "rtn does not read"),
        (["--format", "int8", "--calibration", "TEXT"], "has 1 tokens|has 2 tokens"),
        (["--format", "int8", "--calibration", "/nowhere/text"], "cannot be read"),
    ],
)
def test_what_cannot_be_done_is_told(
    flags: list[str], message: str, tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import re

    text = tmp_path / "text.txt"
    text.write_text("hi")
    command = ["quantize", str(tiny_checkpoint), str(tmp_path / "out"), *flags, *THREADS]
    assert main([str(text) if part == "TEXT" else part for part in command]) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "out" / "model.safetensors").exists()
