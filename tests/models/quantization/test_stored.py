"""Checkpoints that are quantised already: every layout against a packer written from its tool's documentation."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig

from quire.config.engine import EngineConfig
from quire.core.errors import BadValue, CheckpointError, ConfigError, MissingTensor, ShapeMismatch
from quire.models.checkpoint import Checkpoint
from quire.models.load import load_model
from quire.models.model_config import ModelConfig
from quire.models.plan import plan_model
from quire.models.quantization.config import read_quantization
from quire.ops.weight import Fp8Weight, Int4Weight, Int8Weight, QuantizedWeight, dequantize

SIZES: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
LAYERS = ("self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "mlp.gate", "mlp.up", "mlp.down")

Layer = tuple[dict[str, Tensor], Tensor]
"""Stored tensors by suffix, and the values that they stand for."""
Pack = Callable[[int, int, torch.Generator], Layer]


def words(nibbles: Tensor, order: tuple[int, ...] = tuple(range(8))) -> Tensor:
    """int32 `[r, c / 8]`: place i of a word, four bits each, holds neighbour order[i]."""
    grouped = nibbles.long().view(len(nibbles), -1, 8)
    packed = sum((grouped[:, :, neighbour] << (4 * place)) for place, neighbour in enumerate(order))
    assert isinstance(packed, Tensor)
    return (packed - (packed >= 2**31).long() * 2**32).to(torch.int32)


def random_values(n: int, k: int, generator: torch.Generator, low: int, high: int) -> Tensor:
    return torch.randint(low, high + 1, (n, k), generator=generator)


def random_scales(n: int, g: int, generator: torch.Generator, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return (torch.rand(n, g, generator=generator) * 0.01 + 0.001).to(dtype)


def int_quantized(n: int, k: int, generator: torch.Generator) -> Layer:
    values, scale = random_values(n, k, generator, -127, 127), random_scales(n, 1, generator)
    return {"weight": values.to(torch.int8), "weight_scale": scale}, values * scale.float()


def int_quantized_whole(n: int, k: int, generator: torch.Generator) -> Layer:
    values, scale = random_values(n, k, generator, -127, 127), random_scales(1, 1, generator)[0]
    return {"weight": values.to(torch.int8), "weight_scale": scale}, values * scale.float()


def float_quantized(n: int, k: int, generator: torch.Generator) -> Layer:
    values = torch.randn(n, k, generator=generator).mul_(100).to(torch.float8_e4m3fn)
    scale = random_scales(n, 1, generator, torch.float32)
    tensors = {"weight": values, "weight_scale": scale, "input_scale": torch.ones(1)}
    return tensors, values.float() * scale


def packed_symmetric(group_size: int) -> Pack:
    def pack(n: int, k: int, generator: torch.Generator) -> Layer:
        values, scale = random_values(n, k, generator, -8, 7), random_scales(n, k // (group_size or k), generator)
        tensors = {"weight_packed": words(values + 8), "weight_scale": scale, "weight_shape": torch.tensor([n, k])}
        return tensors, values * scale.float().repeat_interleave(group_size or k, 1)

    return pack


def packed_with_zeros(group_size: int) -> Pack:
    def pack(n: int, k: int, generator: torch.Generator) -> Layer:
        size = group_size or k
        values, scale = random_values(n, k, generator, -8, 7), random_scales(n, k // size, generator)
        zeros = random_values(n, k // size, generator, -8, 7)
        tensors = {
            "weight_packed": words(values + 8),
            "weight_scale": scale,
            "weight_zero_point": words((zeros + 8).t()).t().contiguous(),
            "weight_shape": torch.tensor([n, k]),
        }
        return tensors, (values - zeros.repeat_interleave(size, 1)) * scale.float().repeat_interleave(size, 1)

    return pack


def packed_bytes(n: int, k: int, generator: torch.Generator) -> Layer:
    values, scale = random_values(n, k, generator, -128, 127), random_scales(n, 1, generator)
    grouped = (values + 128).view(n, -1, 4)
    packed = sum(grouped[:, :, place] << (8 * place) for place in range(4))
    assert isinstance(packed, Tensor)
    signed = (packed - (packed >= 2**31).long() * 2**32).to(torch.int32)
    return {"weight_packed": signed, "weight_scale": scale}, values * scale.float()


def gptq(group_size: int, symmetric: bool, exact_zero: bool = False) -> Pack:
    def pack(n: int, k: int, generator: torch.Generator) -> Layer:
        size = group_size or k
        values = random_values(n, k, generator, 0, 15)
        scale = random_scales(n, k // size, generator, torch.float16)
        zeros = random_values(n, k // size, generator, 1, 15) if not symmetric else torch.full((n, k // size), 8)
        stored = zeros if exact_zero else zeros - 1
        tensors = {
            "qweight": words(values).t().contiguous(),
            "qzeros": words(stored.t().contiguous()),
            "scales": scale.t().contiguous(),
            "g_idx": (torch.arange(k) // size).to(torch.int32),
        }
        return tensors, (values - zeros.repeat_interleave(size, 1)) * scale.float().repeat_interleave(size, 1)

    return pack


def awq(group_size: int) -> Pack:
    def pack(n: int, k: int, generator: torch.Generator) -> Layer:
        values = random_values(n, k, generator, 0, 15)
        scale = random_scales(n, k // group_size, generator, torch.float16)
        zeros = random_values(n, k // group_size, generator, 0, 15)
        order = (0, 2, 4, 6, 1, 3, 5, 7)
        tensors = {
            "qweight": words(values.t().contiguous(), order),
            "qzeros": words(zeros.t().contiguous(), order),
            "scales": scale.t().contiguous(),
        }
        repeated = scale.float().repeat_interleave(group_size, 1)
        return tensors, (values - zeros.repeat_interleave(group_size, 1)) * repeated

    return pack


def compressed(form: str, activations: dict[str, Any] | None = None, **weights: Any) -> dict[str, Any]:
    """Of compressed-tensors, for every linear layer but the head."""
    group = {"targets": ["Linear"], "weights": weights, "input_activations": activations, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
    }


INT8 = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}
FP8 = INT8 | {"type": "float"}
INT4 = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 64}
INT4_ROWS = INT4 | {"strategy": "channel", "group_size": None}
PER_TOKEN = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": True}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 64, "zero_point": True, "version": "gemm"}

CASES: dict[str, tuple[dict[str, Any], Pack, type[QuantizedWeight]]] = {
    "int": (compressed("int-quantized", PER_TOKEN, **INT8), int_quantized, Int8Weight),
    "int-tensor": (
        compressed("int-quantized", PER_TOKEN, **INT8 | {"strategy": "tensor"}),
        int_quantized_whole,
        Int8Weight,
    ),
    "naive": (compressed("naive-quantized", PER_TOKEN, **INT8), int_quantized, Int8Weight),
    "float": (compressed("float-quantized", PER_TOKEN | {"type": "float"}, **FP8), float_quantized, Fp8Weight),
    "float-static": (
        compressed("float-quantized", {"type": "float", "num_bits": 8, "dynamic": False}, **FP8),
        float_quantized,
        Fp8Weight,
    ),
    "pack-32": (compressed("pack-quantized", **INT4 | {"group_size": 32}), packed_symmetric(32), Int4Weight),
    "pack-128": (compressed("pack-quantized", **INT4 | {"group_size": 128}), packed_symmetric(128), Int4Weight),
    "pack-zeros": (compressed("pack-quantized", **INT4 | {"symmetric": False}), packed_with_zeros(64), Int4Weight),
    "pack-row": (compressed("pack-quantized", **INT4_ROWS), packed_symmetric(0), Int4Weight),
    "pack-row-zeros": (
        compressed("pack-quantized", **INT4_ROWS | {"symmetric": False}),
        packed_with_zeros(0),
        Int4Weight,
    ),
    "pack-8": (compressed("pack-quantized", **INT8), packed_bytes, Int8Weight),
    "gptq": (GPTQ, gptq(32, True), Int4Weight),
    "gptq-zeros": (GPTQ | {"sym": False, "group_size": 128}, gptq(128, False), Int4Weight),
    "gptq-row": (GPTQ | {"group_size": -1}, gptq(0, True), Int4Weight),
    "gptq-v2": (GPTQ | {"sym": False, "checkpoint_format": "gptq_v2"}, gptq(32, False, True), Int4Weight),
    "awq": (AWQ, awq(64), Int4Weight),
}  # fmt: skip


@pytest.fixture(scope="module")
def plain(save_random: Any) -> Path:
    directory: Path = save_random(LlamaConfig(**SIZES), torch.bfloat16)[1]
    return directory


def store(plain: Path, directory: Path, quantization: dict[str, Any], pack: Pack) -> dict[str, Tensor]:
    """Writes a checkpoint with each linear layer packed; returns their values."""
    generator = torch.Generator().manual_seed(0)
    tensors, values = load_file(plain / "model.safetensors"), {}
    for layer in LAYERS:
        name = f"model.layers.0.{layer}_proj"
        stored, values[layer] = pack(*tensors.pop(f"{name}.weight").shape, generator)
        tensors |= {f"{name}.{suffix}": tensor for suffix, tensor in stored.items()}
    save_file(tensors, directory / "model.safetensors")
    config = json.loads((plain / "config.json").read_text()) | {"quantization_config": quantization}
    (directory / "config.json").write_text(json.dumps(config))
    return values


@pytest.mark.parametrize("name", CASES)
def test_values_are_those_that_were_packed(name: str, plain: Path, tmp_path: Path) -> None:
    quantization, pack, kind = CASES[name]
    values = store(plain, tmp_path, quantization, pack)
    model = load_model(tmp_path, isa="reference")
    assert model.unexpected_tensors == ()
    layer = model.decoder.layers[0]
    for path, expected in values.items():
        block, part = path.split(".")
        weight = getattr(layer.attention if block == "self_attn" else layer.mlp, part).weight
        assert type(weight) is kind
        assert torch.equal(dequantize(weight), expected.float())
    assert model.decoder.head.weight.dtype == torch.bfloat16
    plan = plan_model(tmp_path, EngineConfig(), memory_available=2**30, bandwidth=1e9, flops=1e9)
    assert plan.weight_bytes == model.weight_bytes


@pytest.mark.parametrize("name", ["float", "float-static"])
def test_rows_of_an_fp8_checkpoint_are_rounded_if_one_asks(name: str, plain: Path, tmp_path: Path) -> None:
    quantization, pack, _ = CASES[name]
    values = store(plain, tmp_path, quantization, pack)
    model = load_model(tmp_path, isa="reference", quantization="fp8_dynamic")
    weight = model.decoder.layers[0].mlp.down.weight
    assert weight.rounds_rows
    assert torch.equal(dequantize(weight), values["mlp.down"].float())
    assert model.decoder.head.weight.dtype == torch.bfloat16
    assert model.weight_bytes == load_model(tmp_path, isa="reference").weight_bytes
    assert not load_model(tmp_path, isa="reference").decoder.layers[0].mlp.down.weight.rounds_rows


def test_rows_are_rounded_to_8_bit_floats_of_fp8_weights_and_on_a_gpu_alone(plain: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="needs a GPU") as caught:
        load_model(plain, quantization="fp8_dynamic")
    assert caught.value.param == "quantization"
    quantization, pack, _ = CASES["int"]
    store(plain, tmp_path, quantization, pack)
    with pytest.raises(ConfigError, match="of the checkpoint is int8"):
        load_model(tmp_path, isa="reference", quantization="fp8_dynamic")


def test_zero_points_that_are_all_in_the_middle_are_left_out(plain: Path, tmp_path: Path) -> None:
    store(plain, tmp_path, GPTQ | {"sym": False}, gptq(32, True))
    assert load_model(tmp_path, isa="reference").decoder.layers[0].mlp.down.weight.zero_ng is None


def test_layers_are_chosen_by_name_before_pattern_before_class(plain: Path) -> None:
    config = compressed("pack-quantized", **INT4)
    config["config_groups"] |= {
        "group_1": {"targets": ["re:.*\\.mlp\\.(gate|up)_proj$"], "weights": INT8, "format": "int-quantized"},
        "group_2": {"targets": ["model.layers.0.mlp.up_proj"], "weights": FP8, "format": "float-quantized"},
    }
    config["ignore"] = ["lm_head", "re:.*v_proj", "model.layers.0.self_attn.o_proj"]
    stored = read_quantization(ModelConfig({"quantization_config": config}, "config.json"))
    assert stored is not None
    found = {
        layer: stored.storage_of(layer) for layer in ("lm_head", *(f"model.layers.0.{each}_proj" for each in LAYERS))
    }

    def scheme(layer: str) -> str | None:
        storage = found[layer]
        return None if storage is None else storage.scheme((256, 128), "").format

    assert scheme("lm_head") is scheme("model.layers.0.self_attn.v_proj") is None
    assert scheme("model.layers.0.self_attn.o_proj") is None
    assert scheme("model.layers.0.self_attn.q_proj") == scheme("model.layers.0.mlp.down_proj") == "int4"
    assert scheme("model.layers.0.mlp.gate_proj") == "int8"
    assert scheme("model.layers.0.mlp.up_proj") == "fp8"


def changed(config: dict[str, Any], part: str, **fields: Any) -> dict[str, Any]:
    copy = json.loads(json.dumps(config))
    at = copy if part == "" else copy["config_groups"]["group_0"][part]
    at.update(fields)
    return copy  # type: ignore[no-any-return]


W8, W4 = CASES["int"][0], CASES["pack-128"][0]
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "method": ({"quant_method": "bitsandbytes"}, "quant_method.*compressed-tensors, gptq, awq"),
    "no method": ({}, "quant_method"),
    "format": (changed(W8, "", format="marlin-24"), "format.*int-quantized"),
    "mixed without formats": (changed(W8, "", format="mixed-precision"), "format.*mixed-precision"),
    "no groups": (changed(W8, "", config_groups={}), "config_groups"),
    "sparse": (changed(W8, "", sparsity_config={"format": "sparse-24-bitmask"}), "sparsity_config"),
    "transform": (changed(W8, "", transform_config={"config_groups": {"a": 1}}), "transform_config"),
    "static activations": (changed(W8, "input_activations", dynamic=False), "dynamic.*static"),
    "4-bit activations": (changed(W8, "input_activations", num_bits=4), "num_bits.*4 of type int"),
    "8 bits with zeros": (changed(W8, "weights", symmetric=False), "symmetric"),
    "8 bits in groups": (changed(W8, "weights", strategy="group", group_size=128), "strategy.*group"),
    "blocks": (changed(CASES["float"][0], "weights", strategy="block"), "strategy.*block"),
    "type": (changed(W8, "weights", type="float"), "num_bits"),
    "3 bits": (changed(W4, "weights", num_bits=3), "num_bits.*3"),
    "group size": (changed(W4, "weights", group_size=16), "group_size.*16"),
    "group size of no type": (changed(W4, "weights", group_size="128"), "group_size"),
    "act order": (changed(W4, "weights", actorder="group"), "actorder"),
    "targets": (changed(W4, "", config_groups={"a": {"targets": "Linear", "weights": INT4}}), "targets"),
    "ignore": (changed(W4, "", ignore=[1]), "ignore"),
    "pattern": (changed(W4, "", ignore=["re:("]), "ignore.*valid patterns"),
    "slow pattern": (changed(W4, "", ignore=["re:(a+)+$"]), "ignore.*none of them of a group"),
    "slower pattern": (changed(W4, "", ignore=["re:.*.*.*.*.*x"]), "ignore.*at most 4 repeats"),
    "gptq 8 bits": (GPTQ | {"bits": 8}, "bits.*4"),
    "gptq act order": (GPTQ | {"desc_act": True}, "desc_act.*false"),
    "gptq by layer": (GPTQ | {"dynamic": {"x": {}}}, "dynamic"),
    "gptq layout": (GPTQ | {"checkpoint_format": "marlin"}, "checkpoint_format"),
    "gptq group": (GPTQ | {"group_size": 1024}, "group_size"),
    "awq layout": (AWQ | {"version": "gemv"}, "version.*gemm"),
    "awq without zeros": (AWQ | {"zero_point": False}, "zero_point"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_supported_is_refused_by_name(name: str, plain: Path, tmp_path: Path) -> None:
    quantization, message = REFUSED[name]
    config = json.loads((plain / "config.json").read_text()) | {"quantization_config": quantization}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes((plain / "model.safetensors").read_bytes())
    with pytest.raises(BadValue, match=message):
        load_model(tmp_path)
    # The plan still tells what it can.
    assert "It cannot be run" in plan_model(tmp_path, EngineConfig(), bandwidth=1e9, flops=1e9).notes[0]


def broken(directory: Path, **changes: Tensor | None) -> None:
    file = directory / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    for name, tensor in changes.items():
        tensors.pop(f"model.layers.0.mlp.up_proj.{name}", None)
        if tensor is not None:
            tensors[f"model.layers.0.mlp.up_proj.{name}"] = tensor
    save_file(tensors, file)


BROKEN: dict[str, tuple[str, dict[str, Tensor | None], type[CheckpointError], str]] = {
    "no scale": ("int", {"weight_scale": None}, MissingTensor, "up_proj.weight_scale"),
    "scale of a wrong shape": ("int", {"weight_scale": torch.ones(255, 1)}, ShapeMismatch, r"\[256, 1\].*\[255, 1\]"),
    "scale of a wrong type": ("int", {"weight_scale": torch.ones(256, 1, dtype=torch.int32)}, BadValue, "I32"),
    "scale not a number": ("int", {"weight_scale": torch.full((256, 1), float("nan"))}, BadValue, "finite scales"),
    "plain weight": ("int", {"weight": torch.ones(256, 128)}, BadValue, "I8.*F32"),
    "short words": ("pack-32", {"weight_packed": torch.ones(256, 15, dtype=torch.int32)}, ShapeMismatch, "_packed"),
    "no zeros": ("pack-zeros", {"weight_zero_point": None}, MissingTensor, "weight_zero_point"),
    "order": ("pack-32", {"weight_g_idx": torch.zeros(128, dtype=torch.int32)}, BadValue, "activation order"),
    "gptq order": ("gptq", {"g_idx": torch.zeros(128, dtype=torch.int32)}, BadValue, "up_proj.*act-order"),
    "gptq order of a wrong shape": ("gptq", {"g_idx": torch.zeros(4, dtype=torch.int32)}, ShapeMismatch, "g_idx"),
    "awq turned": ("awq", {"qweight": torch.ones(32, 128, dtype=torch.int32)}, ShapeMismatch, "qweight"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files_are_refused_and_named(name: str, plain: Path, tmp_path: Path) -> None:
    case, changes, error, message = BROKEN[name]
    store(plain, tmp_path, *CASES[case][:2])
    broken(tmp_path, **changes)
    with pytest.raises(error, match=message):
        load_model(tmp_path)


def test_a_quantised_checkpoint_is_not_quantised_again(plain: Path, tmp_path: Path) -> None:
    store(plain, tmp_path, *CASES["awq"][:2])
    with pytest.raises(ConfigError, match=r"int4.*awq"):
        load_model(tmp_path, quantization="int4")


def test_groups_that_do_not_divide_a_row(save_random: Any, tmp_path: Path) -> None:
    directory = save_random(LlamaConfig(**SIZES | {"hidden_size": 160, "head_dim": 40}))[1]
    config = json.loads((directory / "config.json").read_text()) | {"quantization_config": W4}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes((directory / "model.safetensors").read_bytes())
    with pytest.raises(BadValue, match=r"q_proj.*groups of 128 of 160"):
        load_model(tmp_path)
    assert Checkpoint.open(tmp_path).config["quantization_config"] == W4
