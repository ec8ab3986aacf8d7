"""Checkpoint headers: what is read is what was written; whatever is broken gives a CheckpointError that names it."""

import json
import os
import re
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from quire.core.errors import CheckpointError, MissingFile, MissingTensor, TruncatedFile
from quire.core.json_file import MAX_JSON_BYTES, MAX_JSON_DEPTH
from quire.models.checkpoint import Checkpoint
from quire.models.safetensors_header import MAX_HEADER_BYTES, read_header

TENSORS = {
    "embed": np.arange(24, dtype=np.float32).reshape(6, 4),
    "norm": np.ones(4, dtype=np.float16),
    "codes": np.arange(5, dtype=np.int8),
    "empty": np.zeros((0, 3), dtype=np.float32),
    "scalar": np.array(2.5, dtype=np.float64),
}


def write_config(directory: Path, **config: object) -> None:
    (directory / "config.json").write_text(json.dumps({"architectures": ["X"], **config}))


def write_shards(directory: Path, shards: dict[str, dict[str, np.ndarray]]) -> dict[str, str]:
    for name, tensors in shards.items():
        save_file(tensors, directory / name)
    weight_map = {tensor: name for name, tensors in shards.items() for tensor in tensors}
    write_index(directory, weight_map)
    return weight_map


def write_index(directory: Path, weight_map: object) -> None:
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def write_raw(path: Path, header: object, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def entry(dtype: str = "F32", shape: object = (2,), offsets: object = (0, 8)) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    write_config(tmp_path)
    return tmp_path


def assert_tensors_are(checkpoint: Checkpoint, expected: dict[str, np.ndarray]) -> None:
    assert set(checkpoint.tensors) == set(expected)
    for name, array in expected.items():
        info = checkpoint.tensors[name]
        assert info.shape == array.shape
        assert info.nbytes == array.nbytes
        data = info.file.read_bytes()[info.offset : info.offset + info.nbytes]
        assert data == array.tobytes()


def test_single_file(directory: Path) -> None:
    save_file(TENSORS, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "generation_config.json").write_text('{"temperature": 0.6}')
    checkpoint = Checkpoint.open(directory)
    assert_tensors_are(checkpoint, TENSORS)
    assert checkpoint.config["architectures"] == ["X"]
    assert checkpoint.generation_config == {"temperature": 0.6}
    assert checkpoint.tensors["norm"].dtype == "F16"
    assert checkpoint.weight_bytes == sum(array.nbytes for array in TENSORS.values())


def test_sharded(directory: Path) -> None:
    write_shards(
        directory,
        {
            "model-00001-of-00002.safetensors": {"a": TENSORS["embed"]},
            "model-00002-of-00002.safetensors": {"b": TENSORS["norm"], "c": TENSORS["codes"]},
        },
    )
    save_file({"a": TENSORS["embed"]}, directory / "consolidated.safetensors")  # not in the index: not read
    checkpoint = Checkpoint.open(directory)
    assert_tensors_are(checkpoint, {"a": TENSORS["embed"], "b": TENSORS["norm"], "c": TENSORS["codes"]})
    assert checkpoint.generation_config == {}
    assert [file.name[:11] for file in checkpoint.files] == ["model-00001", "model-00002"]


def test_any_safetensors_without_an_index(directory: Path) -> None:
    save_file({"a": TENSORS["embed"]}, directory / "part-b.safetensors")
    save_file({"b": TENSORS["norm"]}, directory / "part-a.safetensors")
    save_file({"a": TENSORS["embed"]}, directory / "consolidated.00.safetensors")
    assert set(Checkpoint.open(directory).tensors) == {"a", "b"}


def test_only_consolidated_is_read_all_the_same(directory: Path) -> None:
    save_file({"a": TENSORS["embed"]}, directory / "consolidated.safetensors")
    assert set(Checkpoint.open(directory).tensors) == {"a"}


def test_files_may_be_links(directory: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    blob = tmp_path_factory.mktemp("blobs") / "0123"
    save_file(TENSORS, blob)
    (directory / "model.safetensors").symlink_to(blob)
    assert set(Checkpoint.open(directory).tensors) == set(TENSORS)


def test_config_may_hold_infinity(directory: Path) -> None:
    (directory / "config.json").write_text('{"time_step_limit": [0.0, Infinity]}')
    save_file(TENSORS, directory / "model.safetensors")
    assert Checkpoint.open(directory).config["time_step_limit"] == [0.0, float("inf")]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "not valid JSON"),
        (b"\xff\xfe", "not valid JSON"),
        (b"[1]", "expected an object"),
        (b'{"a": 1, "a": 2}', "'a' occurs twice"),
        (b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested"),
        (b'{"a": ' + b"[" * (MAX_JSON_DEPTH + 1) + b"]" * (MAX_JSON_DEPTH + 1) + b"}", "nested deeper"),
        (b'{"a": ' + b"9" * 10_000 + b"}", "not valid JSON"),
        (b" " * (MAX_JSON_BYTES + 1), "larger than"),
    ],
)
def test_bad_config(directory: Path, content: bytes, message: str) -> None:
    (directory / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        Checkpoint.open(directory)
    assert "config.json" in str(caught.value)


def test_missing_files(tmp_path: Path) -> None:
    with pytest.raises(MissingFile, match="not a directory"):
        Checkpoint.open(tmp_path / "absent")
    with pytest.raises(MissingFile, match=r"no config\.json"):
        Checkpoint.open(tmp_path)
    write_config(tmp_path)
    with pytest.raises(MissingFile, match=r"no model\.safetensors"):
        Checkpoint.open(tmp_path)


def test_a_missing_shard_is_named(directory: Path) -> None:
    write_shards(directory, {"model-1.safetensors": {"a": TENSORS["embed"]}})
    write_index(directory, {"a": "model-1.safetensors", "b": "model-2.safetensors"})
    with pytest.raises(MissingFile, match=r"model-2\.safetensors does not exist"):
        Checkpoint.open(directory)


def test_pickles_are_not_read(directory: Path) -> None:
    (directory / "pytorch_model.bin").write_bytes(b"\x80\x02.")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin; only safetensors is read") as caught:
        Checkpoint.open(directory)
    assert caught.value.remedy is not None
    assert "Convert" in caught.value.remedy


@pytest.mark.parametrize(
    "name",
    ["../outside.safetensors", "/etc/x.safetensors", "a/../../b.safetensors", "..\\b.safetensors", "model.bin", "", 3],
)
def test_an_index_cannot_leave_the_directory(directory: Path, name: object) -> None:
    save_file({"a": TENSORS["embed"]}, directory.parent / "outside.safetensors")
    write_index(directory, {"a": name})
    with pytest.raises(CheckpointError, match="same directory"):
        Checkpoint.open(directory)


@pytest.mark.parametrize("weight_map", [None, {}, [], "x"])
def test_bad_weight_map(directory: Path, weight_map: object) -> None:
    write_index(directory, weight_map)
    with pytest.raises(CheckpointError, match="weight_map"):
        Checkpoint.open(directory)


def test_index_and_shards_must_agree(directory: Path) -> None:
    files = {"x-1.safetensors": {"a": TENSORS["embed"]}, "x-2.safetensors": {"b": TENSORS["norm"]}}
    weight_map = write_shards(directory, files)
    write_index(directory, {**weight_map, "c": "x-2.safetensors"})
    with pytest.raises(MissingTensor, match=r"'c' in x-2\.safetensors, found: no file has it"):
        Checkpoint.open(directory)
    write_index(directory, {**weight_map, "a": "x-2.safetensors", "b": "x-1.safetensors"})
    with pytest.raises(MissingTensor, match=r"'a' in x-2\.safetensors, found: it is in x-1\.safetensors"):
        Checkpoint.open(directory)


def test_a_tensor_in_two_shards(directory: Path) -> None:
    write_shards(directory, {"x-1.safetensors": {"a": TENSORS["embed"]}, "x-2.safetensors": {"a": TENSORS["norm"]}})
    write_index(directory, {"a": "x-1.safetensors", "b": "x-2.safetensors"})
    with pytest.raises(CheckpointError, match=r"'a' is both in .*x-1\.safetensors and in .*x-2\.safetensors"):
        Checkpoint.open(directory)


def test_not_a_regular_file(directory: Path) -> None:
    os.mkfifo(directory / "model.safetensors")  # opening it would wait for a writer
    with pytest.raises(CheckpointError, match="not a regular file"):
        Checkpoint.open(directory)


BAD_HEADERS = [
    (b"not json at all", b"", "does not begin with"),
    (b"{]", b"", "not valid JSON"),
    (b"[]", b"", "does not begin with"),
    ({"a": 3}, b"", "expected an object of dtype"),
    ({"a": {"dtype": "F32", "shape": [1]}}, b"", "expected an object of dtype"),
    ({"a": entry(dtype="F31")}, b"\0" * 8, "unknown dtype 'F31'"),
    ({"a": entry(dtype=["F32"])}, b"\0" * 8, "unknown dtype"),
    ({"a": entry(shape=[3])}, b"\0" * 8, "expected 12 bytes, found 8"),
    ({"a": entry(shape=[-2])}, b"\0" * 8, "is not a list of"),
    ({"a": entry(shape=[True, 2])}, b"\0" * 8, "is not a list of"),
    ({"a": entry(shape=[2.0])}, b"\0" * 8, "is not a list of"),
    ({"a": entry(shape="2")}, b"\0" * 8, "is not a list of"),
    ({"a": entry(shape=[1] * 65)}, b"\0" * 8, "is not a list of"),
    ({"a": entry(shape=[2**63])}, b"\0" * 8, "is not a list of"),
    ({"a": entry(shape=[2**40, 2**40])}, b"\0" * 8, "too large"),
    ({"a": entry(shape=[2**40, 2**40, 0], offsets=[0, 0])}, b"", "too large"),
    ({"a": entry(dtype="F4", shape=[3], offsets=[0, 1])}, b"\0", "whole bytes"),
    ({"a": entry(offsets=[8, 0])}, b"\0" * 8, "begin <= end"),
    ({"a": entry(offsets=[-8, 0])}, b"\0" * 8, "begin <= end"),
    ({"a": entry(offsets=[0])}, b"\0" * 8, "begin <= end"),
    ({"a": entry(offsets=[4, 12])}, b"\0" * 12, "leaves a hole"),
    ({"a": entry(), "b": entry(offsets=[4, 12])}, b"\0" * 12, "overlaps"),
    ({"a": entry()}, b"\0" * 9, "expected .* as the header says, found"),
    ({"__metadata__": {"a": 1}}, b"", "map of strings"),
    (b'{"a": 1, "a": 1}', b"", "occurs twice"),
    (b'{"\\ud800": ' + json.dumps(entry()).encode() + b"}", b"\0" * 8, "not valid Unicode"),
    (b'{"a": ' + b"[" * 200_000 + b"]" * 200_000 + b"}", b"", "nested"),
]


@pytest.mark.parametrize(("header", "data", "message"), BAD_HEADERS, ids=range(len(BAD_HEADERS)))
def test_bad_headers(tmp_path: Path, header: object, data: bytes, message: str) -> None:
    path = write_raw(tmp_path / "model.safetensors", header, data)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_header(path)
    assert "model.safetensors" in str(caught.value)
    assert str(caught.value).isprintable()


def test_absurd_header_lengths(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", 2**64 - 1) + b"{}")
    with pytest.raises(CheckpointError, match=f"more than the allowed {MAX_HEADER_BYTES}"):
        read_header(path)
    path.write_bytes(struct.pack("<Q", 1000) + b"{}")
    with pytest.raises(TruncatedFile, match="header of 1000 bytes, but the file has only 2"):
        read_header(path)
    path.write_bytes(b"1234")
    with pytest.raises(TruncatedFile, match="at least 8 bytes, found 4"):
        read_header(path)


def test_git_lfs_pointer(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(CheckpointError, match="Git LFS pointer"):
        read_header(path)


def test_truncation_names_tensor_and_bytes(directory: Path) -> None:
    path = directory / "model.safetensors"
    save_file({"a": TENSORS["embed"], "b": TENSORS["embed"]}, path)
    size = path.stat().st_size
    os.truncate(path, size - 10)
    with pytest.raises(TruncatedFile, match=r"tensor 'b' is cut off: expected 96 bytes, found 86") as caught:
        Checkpoint.open(directory)
    assert str(path) in str(caught.value)


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_every_truncation_is_noticed(tmp_path: Path, data: st.DataObject) -> None:
    path = tmp_path / "model.safetensors"
    save_file(TENSORS, path)
    os.truncate(path, data.draw(st.integers(0, path.stat().st_size - 1)))
    with pytest.raises(TruncatedFile):
        read_header(path)


SOUND = json.dumps(
    {"__metadata__": {"format": "pt"}, "a": entry(), "b": entry(dtype="BF16", shape=[2, 3], offsets=[8, 20])}
).encode()
SOUND_FILE = struct.pack("<Q", len(SOUND)) + SOUND + bytes(range(20))

EDIT = st.tuples(
    st.integers(0, len(SOUND_FILE) - 1),
    st.integers(0, 6),
    st.binary(max_size=6)
    | st.sampled_from([b'"', b"{", b"}", b"[", b"]", b",", b"-1", b"1e9", b"99999999999999999999", b"null", b"NaN"]),
)


@settings(deadline=None, max_examples=400, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(edits=st.lists(EDIT, max_size=4))
@example(edits=[])
def test_mutated_files_are_read_or_refused(tmp_path: Path, edits: list[tuple[int, int, bytes]]) -> None:
    """Nothing but a CheckpointError; and what we accept, the safetensors library accepts and reads the same."""
    content = SOUND_FILE
    for position, removed, inserted in edits:
        content = content[:position] + inserted + content[position + removed :]
    check_against_library(tmp_path / "model.safetensors", content)


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)
SIZES = st.lists(st.integers(-1, 4) | st.sampled_from([2**31, 2**62, 2**64]), max_size=3) | JSON_VALUES
ENTRIES = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "BF16", "U8", "F8_E4M3", "F4", "X"]) | JSON_VALUES,
        "shape": SIZES,
        "data_offsets": st.tuples(st.integers(0, 24), st.integers(0, 24)) | SIZES,
    }
)


@settings(deadline=None, max_examples=400, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    header=st.dictionaries(st.sampled_from(["a", "b", "__metadata__"]), ENTRIES | JSON_VALUES, max_size=3),
    num_bytes=st.integers(0, 24),
)
def test_invented_headers_are_read_or_refused(tmp_path: Path, header: dict[str, object], num_bytes: int) -> None:
    text = json.dumps(header).encode()
    check_against_library(tmp_path / "model.safetensors", struct.pack("<Q", len(text)) + text + b"\0" * num_bytes)


def check_against_library(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    try:
        ours = read_header(path)
    except CheckpointError:
        return
    with safetensors.safe_open(path, framework="numpy") as library:
        assert set(library.keys()) == set(ours)
        for name, info in ours.items():
            assert tuple(library.get_slice(name).get_shape()) == info.shape
            assert library.get_slice(name).get_dtype() == info.dtype


def test_reading_headers_loads_no_torch() -> None:
    code = "import sys, quire.models.checkpoint; sys.exit(any(m in sys.modules for m in ('torch', 'numpy')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_error_messages_are_bounded(tmp_path: Path) -> None:
    path = write_raw(tmp_path / "model.safetensors", {"x" * 100_000 + "\n": entry(dtype="Y" * 100_000)})
    with pytest.raises(CheckpointError) as caught:
        read_header(path)
    assert len(str(caught.value)) < 2000
    assert re.search(r"tensor 'x+…'", str(caught.value))
