"""Quantising while loading: what becomes of each layer, and memory that stays small."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, Qwen3Config

from quire.config.engine import EngineConfig
from quire.core.errors import BadValue
from quire.models.load import LoadedModel, load_model
from quire.models.plan import plan_model
from quire.models.quantization.rounding import round_weight
from quire.models.quantization.scheme import Scheme
from quire.ops.weight import Fp8Weight, Int4Weight, Int8Weight, dequantize

SIZES: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
TYPES = {"int8": Int8Weight, "int4": Int4Weight, "fp8": Fp8Weight}
REFERENCE = {"isa": "reference"}  # whose packed weights are the weights


@pytest.fixture(scope="module")
def untied(save_random: Any) -> Path:
    directory: Path = save_random(LlamaConfig(**SIZES), torch.bfloat16)[1]
    return directory


@pytest.fixture(scope="module")
def tied(save_random: Any) -> Path:
    directory: Path = save_random(Qwen3Config(**SIZES, tie_word_embeddings=True), torch.bfloat16)[1]
    return directory


@pytest.mark.parametrize("quantization", ["int8", "int4", "fp8"])
def test_every_linear_layer_is_rounded_and_nothing_else(untied: Path, quantization: Any) -> None:
    decoder = load_model(untied, quantization=quantization, **REFERENCE).decoder
    stored = load_file(untied / "model.safetensors")
    for index, layer in enumerate(decoder.layers):
        names = {"self_attn": layer.attention, "mlp": layer.mlp}
        for block, part in (("self_attn", "q"), ("self_attn", "k"), ("self_attn", "v"), ("self_attn", "o"),
                            ("mlp", "gate"), ("mlp", "up"), ("mlp", "down")):  # fmt: skip
            weight = getattr(names[block], part).weight
            assert type(weight) is TYPES[quantization]
            scheme = Scheme(format=quantization, group_size=32 if quantization == "int4" else 0)
            plain = stored[f"model.layers.{index}.{block}.{part}_proj.weight"]
            assert torch.equal(dequantize(weight), dequantize(round_weight(plain, scheme)))
        assert layer.mlp_norm.weight.dtype == torch.bfloat16
    assert torch.equal(decoder.embedding.weight, stored["model.embed_tokens.weight"])
    assert type(decoder.head.weight) is (torch.Tensor if quantization == "fp8" else Int8Weight)


def test_a_tied_head_becomes_a_copy_of_its_own(tied: Path) -> None:
    for quantization in ("int8", "int4"):
        decoder = load_model(tied, quantization=quantization, **REFERENCE).decoder  # type: ignore[arg-type]
        assert isinstance(decoder.embedding.weight, torch.Tensor)
        assert type(decoder.head.weight) is Int8Weight
    decoder = load_model(tied, quantization="fp8", **REFERENCE).decoder
    assert decoder.head.weight is decoder.embedding.weight


@pytest.mark.parametrize("name", ["tied", "untied"])
@pytest.mark.parametrize("quantization", [None, "int8", "int4", "fp8"])
def test_plan_tells_what_loading_takes(name: str, quantization: Any, request: pytest.FixtureRequest) -> None:
    directory = request.getfixturevalue(name)
    config = EngineConfig(model=str(directory), quantization=quantization)
    packed = plan_model(directory, config, memory_available=2**30, bandwidth=1e9, flops=1e9)
    assert packed.weight_bytes == load_model(directory, quantization=quantization).weight_bytes
    config = EngineConfig(model=str(directory), quantization=quantization, isa="reference")
    plan = plan_model(directory, config, memory_available=2**30, bandwidth=1e9, flops=1e9)
    loaded = load_model(directory, quantization=quantization, **REFERENCE)
    assert plan.weight_bytes == loaded.weight_bytes == sum(plan.weight_bytes_by_format.values())
    assert (
        set(plan.weight_bytes_by_format)
        == {
            None: {"bfloat16"},
            "int8": {"bfloat16", "int8"},
            "int4": {"bfloat16", "int4", "int8"},
            "fp8": {"bfloat16", "fp8"},
        }[quantization]
    )
    packed = sum(size for format_, size in plan.weight_bytes_by_format.items() if format_ != "bfloat16")
    assert loaded.converted_bytes == packed
    assert loaded.num_parameters >= plan.num_parameters


def test_logits_are_close_to_the_unquantised_ones(untied: Path, lay_out: Any) -> None:
    batch = lay_out([(list(range(1, 30)), 0, 29, [1, 2])], 16)

    def logits(model: LoadedModel) -> torch.Tensor:
        kv = model.new_kv_cache(4, 16)
        return model.decoder.logits(model.decoder.forward(batch, kv))

    expected = logits(load_model(untied, **REFERENCE))
    errors = {}
    for quantization in ("int8", "int4", "fp8"):
        found = logits(load_model(untied, quantization=quantization, **REFERENCE))  # type: ignore[arg-type]
        errors[quantization] = float((found - expected).norm() / expected.norm())
    assert errors["int8"] < 0.1
    assert errors["fp8"] < 0.2
    assert errors["int8"] < errors["int4"] < 0.6


def test_a_weight_that_is_not_finite_is_named(untied: Path, tmp_path: Path) -> None:
    tensors = load_file(untied / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = float("nan")
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((untied / "config.json").read_text())
    with pytest.raises(BadValue, match=r"layers\.1\.mlp\.up_proj\.weight.*finite"):
        load_model(tmp_path, quantization="int8", **REFERENCE)


MEASURE = """
import sys
from pathlib import Path
import torch
from quire.models.load import load_model

torch.set_num_threads(1)


def status(field):
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


load_model(Path(sys.argv[2]), quantization=sys.argv[3], isa="reference")  # whatever is allocated once
before = status("VmRSS")
model = load_model(Path(sys.argv[1]), quantization=sys.argv[3], isa="reference")
print(status("VmHWM") - before, model.converted_bytes)
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty layers, of 4 MiB for the largest tensor."""
    config = LlamaConfig(
        vocab_size=1000, hidden_size=512, intermediate_size=4096, num_hidden_layers=20, num_attention_heads=8
    )
    directory = tmp_path_factory.mktemp("large")
    (directory / "config.json").write_text(json.dumps(config.to_dict() | {"architectures": ["LlamaForCausalLM"]}))
    tensors = {"model.embed_tokens.weight": torch.ones(1000, 512), "model.norm.weight": torch.ones(512)}
    tensors["lm_head.weight"] = torch.ones(1000, 512)
    shapes = {"gate_proj": (4096, 512), "up_proj": (4096, 512), "down_proj": (512, 4096)}
    for index in range(20):
        prefix = f"model.layers.{index}"
        tensors |= {f"{prefix}.self_attn.{name}_proj.weight": torch.randn(512, 512) for name in "qkvo"}
        tensors |= {f"{prefix}.mlp.{name}.weight": torch.randn(shape) for name, shape in shapes.items()}
        tensors |= {f"{prefix}.{name}_layernorm.weight": torch.ones(512) for name in ("input", "post_attention")}
    save_file({name: tensor.bfloat16() for name, tensor in tensors.items()}, directory / "model.safetensors")
    return directory


@pytest.mark.parametrize("quantization", ["int8", "int4", "fp8"])
def test_peak_memory_is_the_result_and_little_more(large: Path, untied: Path, quantization: str) -> None:
    """280 MiB of bfloat16 become 140 or 88: the peak has room for them, one tensor and slices of it, but not for
    a second copy of anything."""
    command = [sys.executable, "-c", MEASURE, str(large), str(untied), quantization]
    # Every tensor in pages of its own: what is measured are tensors, not the heap's holes.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    found = subprocess.run(command, env=environment, check=True, capture_output=True, text=True, timeout=120).stdout
    peak, result = map(int, found.split())
    assert result > 80 << 20
    assert peak < result + (24 << 20)
