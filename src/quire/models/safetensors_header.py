"""The header of one safetensors file: names, types, shapes and places of its tensors, and nothing of their values.

The format (https://huggingface.co/docs/safetensors): 8 bytes little-endian length N, N bytes of JSON, then the
tensors' bytes without holes. What arrives here may be broken or hostile; every check that fails is a CheckpointError
that names the file and, where there is one, the tensor.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path

from quire.core.errors import CheckpointError, TruncatedFile
from quire.core.json_file import open_regular, parse_json_object, shorten

MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library itself
MAX_RANK = 64
_LARGEST = 2**63 - 1

DTYPE_BITS = {
    "BOOL": 8,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "U8": 8,
    "I8": 8,
    "F8_E5M2": 8,
    "F8_E4M3": 8,
    "F8_E8M0": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "I64": 64,
    "U64": 64,
    "F64": 64,
    "C64": 64,
}
"""Bits per element of each type name of the format."""

_LFS_POINTER = b"version "  # how a Git LFS pointer file begins, where the header's length should be


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where a tensor's bytes are. `dtype` is the format's name ("BF16"); `offset` counts from the file's start."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    offset: int
    nbytes: int

    @property
    def num_elements(self) -> int:
        return math.prod(self.shape)


def read_header(path: Path) -> dict[str, TensorInfo]:
    """The tensors of one file by name, in the order of their bytes.

    Raises MissingFile, TruncatedFile, or CheckpointError for everything else that is wrong with the file.
    """
    with open_regular(path) as file:
        file_size = os.fstat(file.fileno()).st_size
        prefix = file.read(8)
        length = _header_length(path, prefix, file_size)
        text = file.read(length)
    if len(text) != length:
        raise TruncatedFile(f"{path}: expected a header of {length} bytes, found {len(text)}.", param="model")
    if not text.startswith(b"{"):
        raise CheckpointError(f"{path}: the safetensors header does not begin with '{{'.", param="model")
    entries = parse_json_object(text, f"{path}: the safetensors header")
    _check_metadata(path, entries.pop("__metadata__", None))
    data_start = 8 + length
    tensors = [_tensor(path, name, entry, data_start) for name, entry in entries.items()]
    tensors.sort(key=lambda tensor: (tensor.offset, tensor.nbytes))
    _check_layout(path, tensors, data_start, file_size)
    return {tensor.name: tensor for tensor in tensors}


def _header_length(path: Path, prefix: bytes, file_size: int) -> int:
    if len(prefix) < 8:
        raise TruncatedFile(
            f"{path}: expected at least 8 bytes, found {len(prefix)}.", param="model", remedy="Download it again."
        )
    if prefix == _LFS_POINTER:
        raise CheckpointError(
            f"{path} is a Git LFS pointer, not the weights themselves.",
            param="model",
            remedy="Fetch the weights with 'git lfs pull', or name the model by its Hugging Face id.",
        )
    length = int.from_bytes(prefix, "little")
    if length > MAX_HEADER_BYTES:
        raise CheckpointError(
            f"{path}: the safetensors header claims {length} bytes, more than the allowed {MAX_HEADER_BYTES}.",
            param="model",
            remedy="Is this a safetensors file?",
        )
    if 8 + length > file_size:
        raise TruncatedFile(
            f"{path}: expected a header of {length} bytes, but the file has only {file_size - 8} after its first 8.",
            param="model",
            remedy="Download it again.",
        )
    return length


def _check_metadata(path: Path, metadata: object) -> None:
    if metadata is None:
        return
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"{path}: __metadata__ in the header is not a map of strings.", param="model")


def _tensor(path: Path, name: str, entry: object, data_start: int) -> TensorInfo:
    def refuse(problem: str) -> CheckpointError:
        return CheckpointError(f"{path}: tensor '{shorten(name)}': {problem}.", param="model")

    if not _is_unicode(name):
        raise refuse("the name is not valid Unicode")
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise refuse("expected an object of dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise refuse(f"unknown dtype {shorten(repr(dtype))}, expected one of {', '.join(DTYPE_BITS)}")
    if not _is_sizes(shape) or len(shape) > MAX_RANK:
        raise refuse(f"shape {shorten(repr(shape))} is not a list of at most {MAX_RANK} sizes from 0 to {_LARGEST}")
    if not _is_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise refuse(f"data_offsets {shorten(repr(offsets))} are not [begin, end] with 0 <= begin <= end")
    begin, end = offsets
    # Zero sizes are left out of this product so that [0, huge] does not hide a shape that no library can hold.
    bits = math.prod(size for size in shape if size) * DTYPE_BITS[dtype]
    if bits > _LARGEST:
        raise refuse(f"shape {shorten(repr(shape))} is too large")
    expected, odd = divmod(0 if 0 in shape else bits, 8)
    if odd:
        raise refuse(f"shape {shorten(repr(shape))} of {dtype} does not fill whole bytes")
    if end - begin != expected:
        raise refuse(
            f"shape {shorten(repr(shape))} of {dtype}: expected {expected} bytes, found {end - begin} in data_offsets"
        )
    return TensorInfo(name, dtype, tuple(shape), path, data_start + begin, expected)


def _is_sizes(value: object) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item <= _LARGEST for item in value)


def _is_unicode(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _check_layout(path: Path, tensors: list[TensorInfo], data_start: int, file_size: int) -> None:
    """Tensors must follow each other without overlap or hole and end where the file ends."""
    position = data_start
    for tensor in tensors:
        if tensor.offset != position:
            kind = "overlaps the tensor before it" if tensor.offset < position else "leaves a hole before it"
            raise CheckpointError(
                f"{path}: tensor '{shorten(tensor.name)}' {kind}: expected offset {position - data_start}, "
                f"found {tensor.offset - data_start}.",
                param="model",
            )
        position += tensor.nbytes
        if position > file_size:
            raise TruncatedFile(
                f"{path}: tensor '{shorten(tensor.name)}' is cut off: expected {tensor.nbytes} bytes, "
                f"found {max(0, file_size - tensor.offset)} (the file has {file_size} bytes).",
                param="model",
                remedy="Download or copy the file again.",
            )
    if position != file_size:
        raise CheckpointError(
            f"{path}: expected {position} bytes as the header says, found {file_size}.",
            param="model",
            remedy="Download or copy the file again.",
        )
