"""The tool that makes benchmark checkpoints: what it writes is what transformers and tokenizers read."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from tokenizers import Tokenizer

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("make_checkpoint", REPOSITORY / "tools" / "make_checkpoint.py")
    module = importlib.util.module_from_spec(spec)
    import sys

    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "qwen3_moe"])
@pytest.mark.parametrize("tied", [True, False])
def test_transformers_takes_every_weight_and_wants_no_other(tool, tmp_path, family, tied):
    import torch
    from transformers import AutoModelForCausalLM

    scaling = tool.LLAMA3_SCALING if family == "llama" else None
    shape = replace(tool.SHAPES["tiny"], family=family, tied=tied, rope_scaling=scaling)
    if family == "qwen3_moe":
        shape = replace(shape, experts=4, experts_per_token=2, dense_intermediate=256)
    tool.make_checkpoint(tmp_path, shape, dtype="bfloat16", seed=1, shard_bytes=100_000)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    model, report = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert not report["mismatched_keys"]
    assert model.dtype == torch.bfloat16
    logits = model(torch.tensor([[1, 2, 3]])).logits
    assert logits.shape == (1, 3, shape.vocab_size)
    assert logits.isfinite().all()


def test_a_shape_can_be_cut_to_fewer_layers(tool, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["make_checkpoint", str(tmp_path), "--shape", "tiny", "--layers", "1"])
    tool.main()
    with safe_open(tmp_path / "model.safetensors", framework="numpy") as file:
        layers = {name.split(".")[2] for name in file.keys() if name.startswith("model.layers.")}  # noqa: SIM118
    assert layers == {"0"}
    assert json.loads((tmp_path / "config.json").read_text())["num_hidden_layers"] == 1
    monkeypatch.setattr("sys.argv", ["make_checkpoint", str(tmp_path), "--shape", "tiny", "--layers", "3"])
    with pytest.raises(SystemExit):
        tool.main()


def test_the_same_seed_gives_the_same_weights_however_they_are_sharded(tool, tmp_path):
    shape = tool.SHAPES["tiny"]
    for name, seed, shard_bytes in (("one", 0, 10**9), ("two", 0, 50_000), ("three", 1, 10**9)):
        tool.make_checkpoint(tmp_path / name, shape, dtype="float32", seed=seed, shard_bytes=shard_bytes)

    def weights(name: str) -> dict[str, np.ndarray]:
        found = {}
        for path in sorted((tmp_path / name).glob("*.safetensors")):
            with safe_open(path, framework="numpy") as file:
                found.update({key: file.get_tensor(key) for key in file.keys()})  # noqa: SIM118
        return found

    one, two, three = weights("one"), weights("two"), weights("three")
    assert one.keys() == two.keys() == three.keys()
    assert all((one[name] == two[name]).all() for name in one)
    embedding = "model.embed_tokens.weight"
    assert (one[embedding] != three[embedding]).any()
    assert one[embedding].std() == pytest.approx(tool.STD, rel=0.05)
    assert (one["model.norm.weight"] == 1).all()


@given(values=st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1))
def test_bfloat16_is_rounded_as_torch_rounds_it(tool, values):
    import torch

    array = np.array(values, dtype=np.float32)
    expected = torch.tensor(array).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
    assert (tool.encode(array.copy(), "bfloat16") == expected).all()


@pytest.mark.parametrize("vocab_size", [300, 5000, 151936])
def test_the_tokenizer_has_the_right_size_and_loses_nothing(tool, tmp_path, vocab_size):
    path = tmp_path / "tokenizer.json"
    tool.write_json(path, tool.tokenizer(vocab_size))
    tokenizer = Tokenizer.from_file(str(path))
    assert tokenizer.get_vocab_size() == vocab_size
    for text in ("Hello the world, 42!", "naïve café – 日本語 🙂\n\n  x", "<|im_start|>user\nhi<|im_end|>"):
        token_ids = tokenizer.encode(text).ids
        assert all(0 <= token < vocab_size for token in token_ids)
        assert tokenizer.decode(token_ids, skip_special_tokens=False) == text
    assert tokenizer.encode("<|im_end|>").ids == [vocab_size - 1]
