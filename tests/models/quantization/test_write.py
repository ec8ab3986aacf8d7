"""Writing a quantised checkpoint: what is read again is what loading the original would have made."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3Config

from quire.core.errors import BadValue, ConfigError
from quire.models.load import load_model
from quire.models.quantization.calibrate import calibrated, windows
from quire.models.quantization.rounding import round_weight
from quire.models.quantization.write import Source, rounded, write_checkpoint
from quire.models.safetensors_writer import SafetensorsWriter
from quire.models.tensors import CheckpointTensors
from quire.ops.weight import Int8Weight, dequantize

SIZES: dict[str, Any] = {
    "vocab_size": 90,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}


@pytest.fixture(scope="module")
def untied(save_random: Any) -> tuple[Any, Path]:
    saved: tuple[Any, Path] = save_random(LlamaConfig(**SIZES), torch.bfloat16)
    return saved


@pytest.fixture(scope="module")
def tied(save_random: Any) -> tuple[Any, Path]:
    saved: tuple[Any, Path] = save_random(Qwen3Config(**SIZES, tie_word_embeddings=True), torch.bfloat16)
    return saved


def weights_of(decoder: Any) -> dict[str, Tensor]:
    """Every parameter's values."""
    found = {
        "embedding": decoder.embedding.weight,
        "norm": decoder.norm.weight,
        "head": dequantize(decoder.head.weight),
    }
    for index, layer in enumerate(decoder.layers):
        linears = {name: getattr(layer.attention, name) for name in "qkvo"}
        linears |= {name: getattr(layer.mlp, name) for name in ("gate", "up", "down")}
        found |= {f"{index}.{name}": dequantize(linear.weight) for name, linear in linears.items()}
        found |= {f"{index}.norm": layer.attention_norm.weight, f"{index}.mlp_norm": layer.mlp_norm.weight}
    return found


@pytest.mark.parametrize("name", ["tied", "untied"])
@pytest.mark.parametrize("form", ["int8", "int4", "fp8"])
def test_what_was_written_is_what_loading_makes(
    name: str, form: Any, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    _, directory = request.getfixturevalue(name)
    source = Source.open(directory, form, 32)
    write_checkpoint(source, tmp_path / "out", rounded(source, source.quantized))
    expected = load_model(directory, quantization=form, isa="reference")
    found = load_model(tmp_path / "out", isa="reference")
    assert found.unexpected_tensors == ()
    assert found.weight_bytes == expected.weight_bytes
    assert found.arch.tie_word_embeddings == (name == "tied" and form == "fp8")
    written, loaded = weights_of(found.decoder), weights_of(expected.decoder)
    assert written.keys() == loaded.keys()
    for path, values in loaded.items():
        assert torch.equal(written[path], values), path


def test_a_row_that_does_not_divide_is_named_in_the_configuration(save_random: Any, tmp_path: Path) -> None:
    directory = save_random(LlamaConfig(**SIZES | {"intermediate_size": 80}), torch.bfloat16)[1]
    source = Source.open(directory, "int4", 32)
    write_checkpoint(source, tmp_path, rounded(source, source.quantized))
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert config["format"] == "mixed-precision"
    int8 = config["config_groups"]["group_1"]["targets"]
    assert sorted(int8) == ["lm_head", *(f"model.layers.{index}.mlp.down_proj" for index in range(3))]
    decoder = load_model(tmp_path, isa="reference").decoder
    assert isinstance(decoder.layers[2].mlp.down.weight, Int8Weight)


def test_group_sizes(untied: tuple[Any, Path], tmp_path: Path) -> None:
    source = Source.open(untied[1], "int4", 64)
    write_checkpoint(source, tmp_path, rounded(source, source.quantized))
    assert load_model(tmp_path, isa="reference").decoder.layers[0].attention.q.weight.group_size == 64


def test_files_are_taken_over_and_config_is_kept(untied: tuple[Any, Path], tmp_path: Path) -> None:
    directory = untied[1]
    (directory / "tokenizer.json").write_text('{"a": 1}')
    (directory / "chat_template.jinja").write_text("hello")
    (directory / "model.bin").write_bytes(b"not this")
    source = Source.open(directory, "int8", 32)
    write_checkpoint(source, tmp_path / "a" / "b", rounded(source, source.quantized))
    assert (tmp_path / "a" / "b" / "tokenizer.json").read_text() == '{"a": 1}'
    assert (tmp_path / "a" / "b" / "chat_template.jinja").read_text() == "hello"
    assert not (tmp_path / "a" / "b" / "model.bin").exists()
    before = json.loads((directory / "config.json").read_text())
    after = json.loads((tmp_path / "a" / "b" / "config.json").read_text())
    assert after.pop("quantization_config")["format"] == "int-quantized"
    assert after == before


def test_a_directory_with_something_in_it_is_left_alone(untied: tuple[Any, Path], tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("mine")
    source = Source.open(untied[1], "int8", 32)
    with pytest.raises(ConfigError, match="not empty"):
        write_checkpoint(source, tmp_path, rounded(source, source.quantized))
    with pytest.raises(ConfigError, match="cannot be made"):
        write_checkpoint(source, tmp_path / "precious", rounded(source, source.quantized))
    assert [path.name for path in tmp_path.iterdir()] == ["precious"]


def test_a_file_is_there_only_when_it_is_whole(untied: tuple[Any, Path], tmp_path: Path) -> None:
    source = Source.open(untied[1], "int8", 32)

    def breaks() -> Any:
        yield from list(rounded(source, source.quantized))[:3]
        raise BadValue("stop")

    with pytest.raises(BadValue, match="stop"):
        write_checkpoint(source, tmp_path, breaks())
    assert list(tmp_path.iterdir()) == []


def test_the_library_reads_what_the_writer_writes(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "bytes": torch.randint(0, 256, (3, 5), generator=generator).to(torch.uint8),
        "odd": torch.randint(-100, 100, (7,), generator=generator).to(torch.int8),
        "float8": torch.randn(3, 3, generator=generator).to(torch.float8_e4m3fn),
        "half": torch.randn(2, 3, generator=generator).bfloat16(),
        "turned": torch.randn(4, 6, generator=generator).t(),
        "long": torch.tensor([2**40, -1]),
        "empty": torch.empty(0, 4),
        "whole": torch.tensor(7, dtype=torch.int32),
    }
    names = {torch.uint8: "U8", torch.int8: "I8", torch.float8_e4m3fn: "F8_E4M3", torch.bfloat16: "BF16"}
    names |= {torch.float32: "F32", torch.int64: "I64", torch.int32: "I32"}
    path = tmp_path / "model.safetensors"
    with SafetensorsWriter(path, {name: (names[t.dtype], tuple(t.shape)) for name, t in tensors.items()}) as file:
        for name, tensor in reversed(tensors.items()):
            file.put(name, tensor)
    found = load_file(path)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name].float(), tensor.float())
    (tmp_path / "config.json").write_text("{}")
    from quire.models.checkpoint import Checkpoint

    ours = CheckpointTensors(Checkpoint.open(tmp_path))
    assert torch.equal(ours.get("turned"), tensors["turned"])


# --- calibration ------------------------------------------------------------------------------------------


def sequences(count: int, length: int, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, SIZES["vocab_size"], (count, length), generator=generator).tolist()


def test_inputs_are_those_of_the_model_itself(untied: tuple[Any, Path]) -> None:
    """What each linear layer of the first decoder layer sees, against transformers with hooks; GPTQ by both is one."""
    from quire.models.quantization.gptq import gptq

    _, directory = untied
    theirs = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager")
    texts = [*sequences(3, 40), *sequences(1, 17, 1)]
    energies: dict[str, Tensor] = {}
    rows = sum(map(len, texts))

    def hook(name: str) -> Any:
        def add(_module: Any, inputs: Any, _output: Any) -> None:
            x_tk = inputs[0].reshape(-1, inputs[0].shape[-1])
            energies[name] = energies.get(name, 0) + x_tk.T @ x_tk / rows

        return add

    modules = {name: module for name, module in theirs.named_modules() if "layers.0" in name and name.endswith("_proj")}
    for name, module in modules.items():
        module.register_forward_hook(hook(name))
    with torch.no_grad():
        for ids in texts:
            theirs(torch.tensor([ids]))
    source = Source.open(directory, "int8", 32)
    assert len(modules) == 7
    checked = 0
    for parameter, weight in calibrated(source, texts):
        name = parameter.tensor.removesuffix(".weight")
        if name in modules:
            expected = gptq(modules[name].weight.detach(), energies[name], parameter.scheme)  # type: ignore[arg-type]
            assert isinstance(weight, Int8Weight)
            assert isinstance(expected, Int8Weight)
            assert torch.equal(weight.scale_n, expected.scale_n)
            # Sums in another order turn a few ties, and what follows them.
            assert (weight.values_nk == expected.values_nk).double().mean() > 0.97
            assert int((weight.values_nk.int() - expected.values_nk.int()).abs().max()) <= 2
            checked += 1
    assert checked == 7


@pytest.mark.parametrize("name", ["tied", "untied"])
def test_calibration_brings_logits_closer(name: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    _, directory = request.getfixturevalue(name)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    texts = sequences(40, 60)

    def logits(checkpoint: Path, **how: Any) -> Tensor:
        from quire.models.sequences import BLOCK_SIZE, lay_out, num_blocks

        loaded = load_model(checkpoint, dtype="float32", isa="reference", **how)
        kv = loaded.new_kv_cache(num_blocks(texts[:8]), BLOCK_SIZE)
        return loaded.decoder.logits(loaded.decoder.forward(lay_out(texts[:8]), kv))

    source = Source.open(directory, "int4", 32)
    write_checkpoint(source, tmp_path, calibrated(source, texts))
    with torch.no_grad():
        exact = torch.cat([model(torch.tensor([ids])).logits[0] for ids in texts[:8]])
    calibrated_error = (logits(tmp_path) - exact).norm()
    assert calibrated_error < 0.9 * (logits(directory, quantization="int4") - exact).norm()


def test_the_head_is_rounded_to_nearest(tied: tuple[Any, Path]) -> None:
    source = Source.open(tied[1], "int4", 32)
    found = {parameter.path: weight for parameter, weight in calibrated(source, sequences(4, 30))}
    assert found.keys() == {parameter.path for parameter in source.quantized}
    embedding = load_file(tied[1] / "model.safetensors")["model.embed_tokens.weight"]
    head = source.quantized[-1].scheme
    assert head is not None
    assert torch.equal(dequantize(found["head.weight"]), dequantize(round_weight(embedding, head)))


def test_windows(untied: tuple[Any, Path]) -> None:
    """As long as the model's context allows."""
    source = Source.open(untied[1], "int4", 32)
    found = windows(source, range(300), 290)
    assert [len(window) for window in found] == [128, 128, 34]
    assert [token for window in found for token in window] == list(range(290))
    assert len(windows(source, range(300), 10**6)) == 3
