"""A file of packed weights: written once, and read back straight into the memory that the kernels read.

    magic, 8 bytes | SHA-256 of the header, 32 bytes | the header's length, 8 bytes | header, JSON | the weights' bytes

The header has the key of what was packed, and of each weight its path, layout, place and the checksums of its blocks of
1 MiB. Data only; whatever is wrong with a file is a `PackedFileFault`, and nothing of it is used. No torch: a process
reads this while it imports torch.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
from array import array
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

from quire.ops.cpu.library import kernels_module

MAX_HEADER_BYTES = 256 << 20
BLOCK_BYTES = 1 << 20

_MAGIC = b"quirepw1"
_PREFIX_BYTES = len(_MAGIC) + 32 + 8
_ALIGNMENT = 4096
_FORMATS, _INT4 = 4, 2
_LARGEST = 2**63 - 1


class PackedFileFault(Exception):
    """What is wrong with a file of packed weights."""


Shapes = Mapping[str, tuple[int, ...]]


def write_packed(file: BinaryIO, key: str, weights: Mapping[str, Any], backend: Any) -> None:
    """`weights` by path, as `LinearKernel.pack` of these kernels gave them. Raises OSError."""
    module: Any = kernels_module()
    # As they lie in memory: they come back in the same order.
    ordered = sorted(weights.items(), key=lambda item: item[1].address)
    blocks, entries, offset = array("Q"), [], 0
    for path, weight in ordered:
        first = len(blocks) // 4
        _add_blocks(blocks, offset, weight.address, weight.nbytes)
        entries.append([path, list(weight.layout), offset, weight.nbytes, first])
        offset += _aligned(weight.nbytes, 64)
    module.set_checksums(backend, blocks.buffer_info()[0], len(blocks) // 4)
    checksums = blocks[3::4].tolist()
    ends = [*(entry[4] for entry in entries[1:]), len(checksums)]
    described = [[*entry[:4], checksums[entry[4] : end]] for entry, end in zip(entries, ends, strict=True)]
    header = json.dumps({"key": key, "weights": described}, separators=(",", ":")).encode()
    file.write(_MAGIC + hashlib.sha256(header).digest() + len(header).to_bytes(8, "little") + header)
    begin = _aligned(_PREFIX_BYTES + len(header), _ALIGNMENT)
    for (_, weight), entry in zip(ordered, entries, strict=True):
        file.seek(begin + entry[2])
        file.write(memoryview((ctypes.c_char * weight.nbytes).from_address(weight.address)))


def packed_bytes(weights: Mapping[str, Any]) -> int:
    """About what `write_packed` writes."""
    return sum(_aligned(weight.nbytes, 64) for weight in weights.values()) + (1 << 20)


def read_packed(file: BinaryIO, key: str, shapes: Shapes, backend: Any) -> dict[str, Any]:
    """The weights by path, which are exactly those of `shapes`, verified. Raises PackedFileFault and OSError."""
    entries, begin = _read_header(file, key)
    if {entry[0] for entry in entries} != shapes.keys() or len(entries) != len(shapes):
        raise PackedFileFault("it has not the weights of this model")
    module: Any = kernels_module()
    file_bytes = os.fstat(file.fileno()).st_size
    weights: dict[str, Any] = {}
    blocks = array("Q")
    for path, layout, offset, nbytes, checksums in entries:
        _check_layout(path, layout, shapes[path])
        if begin + offset + nbytes > file_bytes:
            raise PackedFileFault(f"it is cut off in {path!r}")
        weight = module.unfilled_weight(backend, *layout)
        if weight.nbytes != nbytes or len(checksums) != -(-nbytes // BLOCK_BYTES):
            raise PackedFileFault(f"{path!r} has another size than its layout")
        _add_blocks(blocks, begin + offset, weight.address, nbytes, checksums)
        weights[path] = weight
    if not module.read_blocks(backend, file.fileno(), blocks.buffer_info()[0], len(blocks) // 4):
        raise PackedFileFault("a checksum does not match")
    return weights


def _read_header(file: BinaryIO, key: str) -> tuple[list[tuple[str, list[int], int, int, list[int]]], int]:
    prefix = file.read(_PREFIX_BYTES)
    length = int.from_bytes(prefix[-8:], "little")
    if len(prefix) < _PREFIX_BYTES or not prefix.startswith(_MAGIC) or length > MAX_HEADER_BYTES:
        raise PackedFileFault("it is not a file of packed weights")
    header = file.read(length)
    if hashlib.sha256(header).digest() != prefix[len(_MAGIC) : len(_MAGIC) + 32]:
        raise PackedFileFault("its header is damaged")
    try:
        content = json.loads(header)
        if content["key"] != key:
            raise PackedFileFault("it was made of another checkpoint, for other settings or by another version")
        entries = [_entry(*entry) for entry in content["weights"]]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise PackedFileFault("its header is not as it should be") from error
    return entries, _aligned(_PREFIX_BYTES + length, _ALIGNMENT)


def _entry(
    path: object, layout: object, offset: object, nbytes: object, checksums: object
) -> tuple[str, list[int], int, int, list[int]]:
    good = isinstance(path, str) and isinstance(offset, int) and isinstance(nbytes, int)
    good = good and isinstance(layout, list) and isinstance(checksums, list)
    if not good or not all(isinstance(number, int) and number >= 0 for number in (offset, nbytes, *layout, *checksums)):  # type: ignore[misc]
        raise ValueError("entry")
    if max(offset, nbytes, *layout) > _LARGEST >> 8 or max(checksums, default=0) >= 2**64:  # type: ignore[type-var,misc]
        raise ValueError("entry")
    return path, layout, offset, nbytes, checksums  # type: ignore[return-value]


def _check_layout(path: str, layout: list[int], shape: tuple[int, ...]) -> None:
    """Memory is made by these numbers: they must be of a weight that there can be."""
    if len(layout) != 6 or layout[0] >= _FORMATS or tuple(layout[1:3]) != shape:
        raise PackedFileFault(f"{path!r} has another layout than the model")
    group_size = layout[3]
    possible = group_size in (32, 64, 128) and shape[1] % group_size == 0
    if not (possible if layout[0] == _INT4 else group_size == 0):
        raise PackedFileFault(f"{path!r} has groups of {group_size}")


def _add_blocks(blocks: array[int], offset: int, address: int, nbytes: int, checksums: list[int] | None = None) -> None:
    for index, at in enumerate(range(0, nbytes, BLOCK_BYTES)):
        size = min(BLOCK_BYTES, nbytes - at)
        blocks.extend((offset + at, address + at, size, 0 if checksums is None else checksums[index]))


def _aligned(number: int, alignment: int) -> int:
    return -(-number // alignment) * alignment
