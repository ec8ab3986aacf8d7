"""`quire bench quality`: figures that are right where they can be worked out, and the built-in model's own."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM

from quire.cli.main import main
from quire.engine.heldout import as_texts, read_questions
from quire.models.divergence import TokenText, compare
from quire.models.load import LoadedModel, load_model
from quire.models.quantization.scheme import Format
from quire.models.sequences import BLOCK_SIZE, lay_out, num_blocks
from quire.models.source import builtin_model

THREADS = ["--threads", "1"]


def test_a_model_does_not_differ_from_itself_and_figures_are_those_of_transformers(tiny_checkpoint: Path) -> None:
    model = load_model(tiny_checkpoint, dtype="float32", isa="reference")
    texts = [
        TokenText(token_ids=[5, 6, 7, 8, 9, 1, 2, 3], start=4),
        TokenText(token_ids=list(range(3, 40))),
        TokenText(token_ids=[9, 9]),
    ]
    own = compare(model, model, texts)
    assert own.positions == 4 + 36 + 1
    assert own.top1_agreement == 1.0
    assert own.kl_mean == own.kl_p99 == 0.0
    theirs = AutoModelForCausalLM.from_pretrained(tiny_checkpoint, dtype=torch.float32)
    losses = []
    for text in texts:
        ids = torch.tensor([text.token_ids])
        with torch.no_grad():
            log_p = theirs(ids).logits[0].log_softmax(-1)
        losses += [-float(log_p[at - 1, ids[0, at]]) for at in range(text.start, len(text.token_ids))]
    assert (
        own.perplexity == own.reference_perplexity == pytest.approx(float(torch.tensor(losses).mean().exp()), rel=1e-4)
    )


def test_divergence_is_the_formula(tiny_checkpoint: Path) -> None:
    """Text by text and in float64, where `compare` reads all in one batch."""
    reference = load_model(tiny_checkpoint, dtype="float32", isa="reference")
    model = load_model(tiny_checkpoint, dtype="float32", quantization="int4", isa="reference")
    texts = [TokenText(token_ids=[5, 6, 7, 8, 9, 1], start=3), TokenText(token_ids=list(range(60, 20, -1)))]
    divergences, same = [], []
    for text in texts:
        rows = slice(text.start - 1, len(text.token_ids) - 1)
        p, q = (log_probabilities(each, text.token_ids)[rows] for each in (reference, model))
        divergences += functional.kl_div(q, p, log_target=True, reduction="none").sum(1).tolist()
        same += (p.argmax(1) == q.argmax(1)).tolist()
    found = compare(model, reference, texts)
    assert found.positions == len(same)
    assert found.kl_mean == pytest.approx(sum(divergences) / len(same), rel=1e-3)
    assert min(divergences) <= found.kl_p99 <= max(divergences) * 1.001
    assert found.top1_agreement == pytest.approx(sum(same) / len(same))


def log_probabilities(model: LoadedModel, token_ids: Sequence[int]) -> torch.Tensor:
    kv = model.new_kv_cache(num_blocks([token_ids]), BLOCK_SIZE)
    return model.decoder.logits(model.decoder.forward(lay_out([token_ids]), kv)).double().log_softmax(-1)


def test_held_out_answers_are_what_is_predicted() -> None:
    from quire.text.tokenizer import Tokenizer

    directory = builtin_model()
    questions = read_questions(directory, 2)
    tokenizer = Tokenizer.load(directory)
    assert len({question["skill"] for question in questions}) == len(questions) // 2
    for question, text in zip(questions, as_texts(questions, directory), strict=True):
        assert text.token_ids[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(text.token_ids[text.start : -1]) == question["answer"]
        assert question["messages"][-1]["content"] in tokenizer.decode(text.token_ids[: text.start])


@pytest.mark.parametrize("quantization", ["int8", "int4", "fp8"])
def test_the_built_in_model_predicts_what_it_does_in_bfloat16(quantization: Format) -> None:
    directory = builtin_model()
    texts = as_texts(read_questions(directory, 10), directory)
    model, reference = load_model(directory, quantization=quantization), load_model(directory)
    found = compare(model, reference, texts)
    assert found.top1_agreement >= 0.995
    assert 0 < found.kl_mean < {"int8": 0.0002, "int4": 0.003, "fp8": 0.0004}[quantization]
    assert found.perplexity < 1.01 * found.reference_perplexity


def test_the_built_in_model_answers_as_well_in_int8(capsys: pytest.CaptureFixture[str]) -> None:
    """Some questions of each skill; the allowance for accuracy is for the sample's size."""
    command = ["bench", "quality", "--quantization", "int8", "--questions-per-skill", "3", "--json", *THREADS]
    assert main(command) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["questions"] == 14 * 3
    assert result["weight_bytes"] < 0.7 * result["reference_weight_bytes"]
    assert result["accuracy"]["all"] >= result["reference_accuracy"]["all"] - 0.05
    shares = [share for skill, share in result["accuracy"].items() if skill != "all"]
    assert result["accuracy"]["all"] == pytest.approx(sum(shares) / 14, abs=1e-3)


def test_a_text_is_read_in_windows(tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text.txt"
    text.write_text("hello there " * 500)
    command = ["bench", "quality", str(tiny_checkpoint), "--text", str(text), "--max-text-tokens", "1030", "--json"]
    assert main([*command, "--quantization", "int8", *THREADS]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["positions"] == 511 + 511 + 5
    assert "accuracy" not in result
    text.write_text("")
    assert main([*command, *THREADS]) == 2
    assert main(["bench", "quality", str(tiny_checkpoint), *THREADS]) == 2
    assert "--text" in capsys.readouterr().err
