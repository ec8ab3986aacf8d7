"""Tensors of a checkpoint: every type bit for bit, as views of the file, with the weights in memory once."""

import gc
import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from safetensors.numpy import save_file

from quire.core.errors import CheckpointError, MissingTensor, TruncatedFile
from quire.models.checkpoint import Checkpoint
from quire.models.tensors import CheckpointTensors

DTYPES = [
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.float8_e5m2,
    torch.float8_e4m3fn,
    torch.float8_e8m0fnu,
    torch.int16,
    torch.uint16,
    torch.float16,
    torch.bfloat16,
    torch.int32,
    torch.uint32,
    torch.float32,
    torch.int64,
    torch.uint64,
    torch.float64,
    torch.complex64,
]


def open_tensors(directory: Path) -> CheckpointTensors:
    (directory / "config.json").write_text("{}")
    return CheckpointTensors(Checkpoint.open(directory))


def write_raw(path: Path, header: dict[str, object], data: bytes) -> None:
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def as_bytes(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def test_every_dtype_matches_the_library(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for dtype in DTYPES:
        raw = torch.randint(0, 2 if dtype is torch.bool else 256, (6 * dtype.itemsize,), generator=generator)
        tensors[str(dtype)] = raw.to(torch.uint8).view(dtype).view(2, 3)
    tensors["scalar"] = torch.tensor(3.5)
    tensors["empty"] = torch.empty((0, 4), dtype=torch.bfloat16)
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_file(tensors, path)
    ours = open_tensors(tmp_path)
    assert set(ours) == set(tensors)
    assert len(ours) == len(tensors)
    for name, expected in safetensors.torch.load_file(path).items():
        found = ours.get(name)
        assert found.dtype == expected.dtype
        assert found.shape == expected.shape
        assert as_bytes(found) == as_bytes(expected)


def test_four_bit_floats_are_pairs(tmp_path: Path) -> None:
    header = {"a": {"dtype": "F4", "shape": [2, 4], "data_offsets": [0, 4]}}
    write_raw(tmp_path / "model.safetensors", header, b"\x12\x34\x56\x78")
    tensor = open_tensors(tmp_path).get("a")
    assert tensor.dtype is torch.float4_e2m1fn_x2
    assert tensor.shape == (2, 2)
    assert tensor.view(torch.uint8).tolist() == [[0x12, 0x34], [0x56, 0x78]]


@pytest.mark.parametrize(
    ("dtype", "shape", "num_bytes", "message"),
    [("F6_E2M3", [4], 3, "F6_E2M3, which torch does not have"), ("F4", [2, 1], 1, "odd last dimension")],
)
def test_types_torch_cannot_hold(tmp_path: Path, dtype: str, shape: list[int], num_bytes: int, message: str) -> None:
    header = {"a": {"dtype": dtype, "shape": shape, "data_offsets": [0, num_bytes]}}
    write_raw(tmp_path / "model.safetensors", header, bytes(num_bytes))
    with pytest.raises(CheckpointError, match=message):
        open_tensors(tmp_path).get("a")


def test_a_view_is_not_a_copy(tmp_path: Path) -> None:
    """Two views share memory; the memory is the map's, at the tensor's offset."""
    save_file({"a": np.arange(8, dtype=np.float32), "b": np.ones(3, dtype=np.float32)}, tmp_path / "model.safetensors")
    tensors = open_tensors(tmp_path)
    a, b = tensors.get("a"), tensors.get("b")
    assert a.data_ptr() == tensors.get("a").data_ptr()
    assert b.data_ptr() - a.data_ptr() == tensors.info("b").offset - tensors.info("a").offset


def test_writing_to_a_view_leaves_the_file_alone(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"a": np.arange(8, dtype=np.float32)}, path)
    before = path.read_bytes()
    tensor = open_tensors(tmp_path).get("a")
    tensor.mul_(2)
    assert tensor.tolist() == [0.0, 2.0, 4.0, 6.0, 8.0, 10.0, 12.0, 14.0]
    assert path.read_bytes() == before


def test_unaligned_tensors_are_copied_and_only_they(tmp_path: Path) -> None:
    header = {
        "bytes": {"dtype": "U8", "shape": [3], "data_offsets": [0, 3]},
        "floats": {"dtype": "F32", "shape": [2], "data_offsets": [3, 11]},
    }
    header["pad"] = {"dtype": "U8", "shape": [5], "data_offsets": [11, 16]}
    data = b"abc" + np.array([1.5, -2.5], dtype="<f4").tobytes() + b"defgh"
    write_raw(tmp_path / "model.safetensors", header, data)
    tensors = open_tensors(tmp_path)
    assert tensors.info("floats").offset % 4 != 0
    floats = tensors.get("floats")
    assert floats.tolist() == [1.5, -2.5]
    assert floats.data_ptr() % 4 == 0
    assert floats.data_ptr() != tensors.get("floats").data_ptr()
    assert bytes(tensors.get("bytes").tolist()) == b"abc"
    assert tensors.get("pad").data_ptr() - tensors.get("bytes").data_ptr() == 11


def test_a_tensor_keeps_its_map_alive(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"a": np.arange(100_000, dtype=np.int64)}, path)
    tensors = open_tensors(tmp_path)
    tensor = tensors.get("a")
    del tensors
    gc.collect()
    assert any(str(path) in line for line in Path("/proc/self/maps").read_text().splitlines())
    assert int(tensor.sum()) == 100_000 * 99_999 // 2
    del tensor
    gc.collect()
    assert not any(str(path) in line for line in Path("/proc/self/maps").read_text().splitlines())


def test_drop_spares_neighbours_and_can_be_read_again(tmp_path: Path) -> None:
    arrays = {name: np.full(5000, value, dtype=np.float32) for value, name in enumerate(["a", "b", "c"])}
    save_file(arrays, tmp_path / "model.safetensors")
    tensors = open_tensors(tmp_path)
    neighbours = [tensors.get("a"), tensors.get("c")]
    for neighbour in neighbours:
        neighbour.add_(10)
    tensors.get("b")
    tensors.drop("b")
    assert all((neighbours[0] == 10).tolist())
    assert all((neighbours[1] == 12).tolist())
    assert all((tensors.get("b") == 1).tolist())


def test_missing_tensor(tmp_path: Path) -> None:
    save_file({"a": np.ones(1, dtype=np.float32)}, tmp_path / "model.safetensors")
    tensors = open_tensors(tmp_path)
    assert "a" in tensors
    assert "b" not in tensors
    with pytest.raises(MissingTensor, match="'b'"):
        tensors.get("b")


def test_a_file_that_shrank_after_its_header_was_read(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"a": np.ones(100, dtype=np.float32)}, path)
    tensors = open_tensors(tmp_path)
    os.truncate(path, path.stat().st_size - 4)
    with pytest.raises(TruncatedFile, match="expected 400 bytes, found 396"):
        tensors.get("a")


MEASURE = """
import sys
from pathlib import Path
import torch
from quire.models.checkpoint import Checkpoint
from quire.models.tensors import CheckpointTensors

torch.set_num_threads(1)
mode = sys.argv[2]


def status(field):
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def total(tensor):  # reads every page, allocates nothing to speak of
    return int(tensor.view(torch.int16).max())


warm = torch.ones(8, dtype=torch.bfloat16)
warm.to(torch.float32), total(warm)
before = status("VmRSS")
tensors = CheckpointTensors(Checkpoint.open(Path(sys.argv[1])))
kept = []
for name in tensors:
    view = tensors.get(name)
    if mode == "view":
        total(view)
        kept.append(view)
    else:
        kept.append(view.to(torch.float32))
        if mode == "drop":
            tensors.drop(name)
print(status("VmHWM") - before)
"""


@pytest.fixture(scope="module")
def large_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("large")
    (directory / "config.json").write_text("{}")
    block = np.random.default_rng(0).integers(0, 2**15, (8 << 20,), dtype=np.int16)  # 16 MiB
    names = [f"layers.{i}.weight" for i in range(18)]
    header = {
        name: {"dtype": "BF16", "shape": [2048, 4096], "data_offsets": [i * block.nbytes, (i + 1) * block.nbytes]}
        for i, name in enumerate(names)
    }
    write_raw(directory / "model.safetensors", header, b"")
    with (directory / "model.safetensors").open("ab") as file:
        for _ in names:
            file.write(block)
    return directory


def test_weights_are_in_memory_once(large_checkpoint: Path) -> None:
    """Peak resident memory above the interpreter's own: weights + 32 MiB, whether kept as views or converted."""
    weights = 18 * (16 << 20)
    margin = 32 << 20

    def peak(mode: str) -> int:
        command = [sys.executable, "-c", MEASURE, str(large_checkpoint), mode]
        return int(subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout)

    assert weights * 0.9 < peak("view") < weights + margin
    assert peak("drop") < 2 * weights + margin  # float32: twice the bytes, and no trace of the bfloat16
    assert peak("keep") > 3 * weights - margin  # the measure does see a second copy
