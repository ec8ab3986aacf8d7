"""The cache of packed weights: the same bits with it as without, and nothing of a file that is not right."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, Qwen2Config, Qwen3Config, Qwen3MoeConfig

from quire.models.load import LoadedModel, load_model
from quire.models.packed_weights import SUFFIX, CacheSettings, EarlyPacked, pack_early
from quire.models.quantization.write import Source, rounded, write_checkpoint
from quire.ops.cpu.library import usable_isas

pytestmark = pytest.mark.skipif(not usable_isas(), reason="this installation has no compiled kernels")

SIZES: dict[str, Any] = {
    "vocab_size": 90,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
EXPERTS: dict[str, Any] = {"moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2}
MODELS = {
    "untied": LlamaConfig(**SIZES),
    "tied": Qwen3Config(**SIZES, tie_word_embeddings=True),
    "biases": Qwen2Config(**SIZES),
    "experts": Qwen3MoeConfig(**SIZES, **EXPERTS, mlp_only_layers=[1]),
}
FORMATS = (None, "int8", "int4", "fp8")
Logits = Callable[[LoadedModel], torch.Tensor]


@pytest.fixture(scope="module")
def checkpoints(save_random: Any) -> dict[str, Path]:
    return {name: save_random(config, torch.bfloat16)[1] for name, config in MODELS.items()}


@pytest.fixture(scope="module")
def logits(lay_out: Any) -> Logits:
    def run(model: LoadedModel) -> torch.Tensor:
        kv = model.new_kv_cache(4, 16)
        return model.decoder.logits(model.decoder.forward(lay_out([(list(range(3, 40)), 0, 37, [1, 2, 3])], 16), kv))

    return run


def early_of(directory: Path, cache: Path, quantization: Any = None, **changes: Any) -> EarlyPacked:
    arguments: dict[str, Any] = {"dtype": "auto", "quantization": quantization, "threads": 2, "isa": None} | changes
    size = arguments.pop("max_bytes", 1 << 30)
    early = pack_early(CacheSettings(directory=cache, max_bytes=size), directory, **arguments)
    assert early is not None
    return early


def path_of(directory: Path, cache: Path, quantization: Any = None) -> Path:
    """Of a file that is not there yet."""
    early = early_of(directory, cache, quantization)
    assert early.kept is not None
    return early.kept.path


def load(directory: Path, cache: Path, quantization: Any = None, **changes: Any) -> tuple[LoadedModel, bool]:
    """(the model, whether its weights came from the cache)."""
    early = early_of(directory, cache, quantization, **changes)
    return load_model(directory, quantization=quantization, threads=2, early=early), early.kept is None


def bytes_of(kept: EarlyPacked) -> dict[str, bytes]:
    return {path: ctypes.string_at(weight.address, weight.nbytes) for path, weight in kept.packed.items()}


def files_in(cache: Path) -> list[Path]:
    return sorted(cache.iterdir())


@pytest.mark.parametrize("quantization", FORMATS)
@pytest.mark.parametrize("name", MODELS)
def test_the_same_bits(
    name: str, quantization: Any, checkpoints: dict[str, Path], tmp_path: Path, logits: Logits
) -> None:
    directory = checkpoints[name]
    plain = load_model(directory, quantization=quantization, threads=2)
    first, found = load(directory, tmp_path, quantization)
    assert not found
    second, found = load(directory, tmp_path, quantization)
    assert found
    assert torch.equal(logits(first), logits(plain))
    assert torch.equal(logits(second), logits(plain))
    assert (second.weight_bytes, second.converted_bytes) == (plain.weight_bytes, plain.converted_bytes)
    assert [path.suffix for path in files_in(tmp_path)] == [SUFFIX]


@pytest.mark.parametrize("form", ["int8", "int4", "fp8"])
def test_of_a_checkpoint_that_is_quantised(
    form: Any, checkpoints: dict[str, Path], tmp_path: Path, logits: Logits
) -> None:
    source = Source.open(checkpoints["experts"], form, 32)
    write_checkpoint(source, tmp_path / "written", rounded(source, source.quantized))
    load(tmp_path / "written", tmp_path / "cache")
    model, found = load(tmp_path / "written", tmp_path / "cache")
    assert found
    assert torch.equal(logits(model), logits(load_model(tmp_path / "written", threads=2)))


def test_each_way_of_loading_has_a_file_of_its_own(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    for quantization in FORMATS:
        assert not load(checkpoints["tied"], tmp_path, quantization)[1]
    assert not load(checkpoints["untied"], tmp_path)[1]
    assert len(files_in(tmp_path)) == 5


def test_it_is_for_compiled_kernels_alone(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    cache = CacheSettings(directory=tmp_path, max_bytes=1 << 30)
    for changes in ({"dtype": "float32"}, {"isa": "reference"}):
        arguments: dict[str, Any] = {"dtype": "auto", "isa": None, "quantization": None, "threads": 1, **changes}
        assert pack_early(cache, checkpoints["tied"], **arguments) is None


@pytest.fixture
def copy(checkpoints: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(checkpoints["untied"], tmp_path / "copy"))


def test_other_weights_in_a_file_of_the_same_name_and_time(copy: Path, tmp_path: Path, logits: Logits) -> None:
    load(copy, tmp_path / "cache")
    file = copy / "model.safetensors"
    times = file.stat().st_atime_ns, file.stat().st_mtime_ns
    changed = {name: tensor * 2 for name, tensor in load_file(file).items()}
    save_file(changed, file)
    os.utime(file, ns=times)
    model, found = load(copy, tmp_path / "cache")
    assert not found
    assert torch.equal(logits(model), logits(load_model(copy, threads=2)))


def test_another_time_or_configuration_is_another_checkpoint(copy: Path, tmp_path: Path) -> None:
    load(copy, tmp_path / "cache")
    os.utime(copy / "model.safetensors", ns=(0, 0))
    assert not load(copy, tmp_path / "cache")[1]
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"note": 1}))
    assert not load(copy, tmp_path / "cache")[1]


def test_a_checkpoint_that_changes_while_it_loads_is_not_kept(
    copy: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    kept = early_of(copy, tmp_path / "cache")
    os.utime(copy / "model.safetensors", ns=(0, 0))
    load_model(copy, threads=2, early=kept)
    assert "changed while it was loaded" in capfd.readouterr().err
    assert not (tmp_path / "cache").exists()


@pytest.fixture(scope="module")
def kept_file(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    cache = tmp_path_factory.mktemp("cache")
    load(checkpoints["experts"], cache, "int4")
    return files_in(cache)[0]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damage_anywhere_is_noticed(
    data: st.DataObject, checkpoints: dict[str, Path], kept_file: Path, tmp_path: Path
) -> None:
    """A byte changed, or the end cut off: nothing is read of the file, or, where the byte is padding, what was kept."""
    good = kept_file.read_bytes()
    at = data.draw(st.integers(0, len(good) - 1))
    at = data.draw(st.sampled_from([at, at % 5000]))  # the header is small, and has the most to get wrong
    cut = data.draw(st.booleans())
    bad = good[:at] if cut else good[:at] + bytes([good[at] ^ data.draw(st.integers(1, 255))]) + good[at + 1 :]
    (tmp_path / kept_file.name).write_bytes(bad)
    kept = early_of(checkpoints["experts"], tmp_path, "int4")
    assert kept.kept is None or kept.kept.path == tmp_path / kept_file.name
    assert bytes_of(kept) in ({}, bytes_of(early_of(checkpoints["experts"], kept_file.parent, "int4")))


def test_a_damaged_file_is_told_and_made_anew(
    checkpoints: dict[str, Path], kept_file: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / kept_file.name).write_bytes(kept_file.read_bytes()[:-100])
    assert not load(checkpoints["experts"], tmp_path, "int4")[1]
    told = capfd.readouterr().err
    assert "not used, and made anew: it is cut off" in told
    assert "are kept in" in told
    assert load(checkpoints["experts"], tmp_path, "int4")[1]


def test_a_file_of_another_model_under_this_name(
    checkpoints: dict[str, Path], kept_file: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(kept_file, path_of(checkpoints["tied"], tmp_path))
    assert early_of(checkpoints["tied"], tmp_path).kept is not None
    assert "another checkpoint" in capfd.readouterr().err


@pytest.mark.parametrize("what", ["directory", "fifo"])
def test_something_else_in_the_place_of_the_file(what: str, checkpoints: dict[str, Path], tmp_path: Path) -> None:
    path = path_of(checkpoints["tied"], tmp_path)
    if what == "directory":
        path.mkdir()
    else:
        os.mkfifo(path)
    model, found = load(checkpoints["tied"], tmp_path)
    assert not found
    assert model.num_parameters > 0


def test_a_place_that_cannot_be_written_to_is_a_warning(
    checkpoints: dict[str, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    model, found = load(checkpoints["tied"], tmp_path / "file" / "cache")
    assert not found
    assert model.num_parameters > 0
    assert "cannot be kept" in capfd.readouterr().err


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_disk_that_fills_up(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    """By a limit of this process's files, which a write meets as it meets the disk's."""
    program = f"""
import resource, signal, sys
from pathlib import Path
from quire.models.load import load_model
from quire.models.packed_weights import CacheSettings, pack_early
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
where, cache = Path({str(checkpoints["tied"])!r}), Path({str(tmp_path)!r})
settings = CacheSettings(directory=cache, max_bytes=1 << 30)
kept = pack_early(settings, where, dtype="auto", quantization=None, threads=1, isa=None)
resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))
assert load_model(where, threads=1, early=kept).num_parameters
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "cannot be kept" in done.stderr
    assert files_in(tmp_path) == []


def test_the_files_that_were_not_used_for_longest_go(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    ways: tuple[Any, ...] = ("int8", None)
    used, unused = (path_of(checkpoints["tied"], tmp_path, quantization) for quantization in ways)
    for quantization in ways:
        load(checkpoints["tied"], tmp_path, quantization)
    os.utime(used, (1, 1))
    os.utime(unused, (2, 2))
    load(checkpoints["tied"], tmp_path, "int8")  # which makes it the newer one
    (tmp_path / "mine.txt").write_text("not the cache's")
    (tmp_path / "left.partial").write_text("of a process that was killed")
    os.utime(tmp_path / "left.partial", (1, 1))
    room = sum(path.stat().st_size for path in files_in(tmp_path))
    load(checkpoints["tied"], tmp_path, "fp8", max_bytes=room)
    names = {path.name for path in files_in(tmp_path)}
    assert used.name in names
    assert unused.name not in names
    assert sum(path.stat().st_size for path in files_in(tmp_path)) <= room
    assert "mine.txt" in names
    assert "left.partial" not in names


def test_more_than_the_cache_may_hold_is_told(
    checkpoints: dict[str, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    load(checkpoints["tied"], tmp_path, max_bytes=1000)
    assert "packed_weights_cache_size" in capfd.readouterr().err
    assert files_in(tmp_path) == []


def test_two_at_once(checkpoints: dict[str, Path], tmp_path: Path, logits: Logits) -> None:
    first, second = (early_of(checkpoints["experts"], tmp_path, "int4") for _ in range(2))
    for kept in (first, second):
        load_model(checkpoints["experts"], quantization="int4", threads=2, early=kept)
    assert len(files_in(tmp_path)) == 1
    assert load(checkpoints["experts"], tmp_path, "int4")[1]
