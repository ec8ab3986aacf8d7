"""A file of packed weights: written once, and read back straight into the memory that the kernels read.

    magic, 8 bytes | SHA-256 of the header, 32 bytes | the header's length, 8 bytes | header, JSON | the weights' bytes

The header has the key of what was packed, and of each weight its path, layout, place and the checksums of its blocks of
1 MiB. Data only; whatever is wrong with a file is a `PackedFileFault`, and nothing of it is used. No torch: a process
reads this while it imports torch.
"""

from __future__ import annotations

import ctypes
import hashlib
import itertools
import os
from array import array
from collections.abc import Mapping
from typing import Annotated, Any, BinaryIO

import msgspec

from quire.ops.cpu.library import kernels_module

MAX_HEADER_BYTES = 256 << 20
BLOCK_BYTES = 1 << 20

_MAGIC = b"quirepw1"
_PREFIX_BYTES = len(_MAGIC) + 32 + 8
_ALIGNMENT = 4096
_FORMATS, _INT4 = 4, 2


class PackedFileFault(Exception):
    """What is wrong with a file of packed weights."""


Shapes = Mapping[str, tuple[int, ...]]
_Place = Annotated[int, msgspec.Meta(ge=0, lt=1 << 56)]


class _Entry(msgspec.Struct, array_like=True, forbid_unknown_fields=True):
    """`layout`: a packed weight's own, see `csrc/linear/bind.cpp`. `offset` counts from where the weights begin."""

    path: str
    layout: tuple[int, int, int, int, int, bool, bool]
    offset: _Place
    nbytes: _Place
    checksums: list[Annotated[int, msgspec.Meta(ge=0)]]


class _Header(msgspec.Struct, forbid_unknown_fields=True):
    key: str
    weights: list[_Entry]


def write_packed(file: BinaryIO, key: str, weights: Mapping[str, Any], backend: Any) -> None:
    """`weights` by path, as `LinearKernel.pack` of these kernels gave them. Raises OSError."""
    module: Any = kernels_module()
    # As they lie in memory: they come back in the same order.
    ordered = sorted(weights.items(), key=lambda item: item[1].address)
    blocks, entries, offset = array("Q"), [], 0
    for path, weight in ordered:
        entries.append(_Entry(path, tuple(weight.layout), offset, weight.nbytes, []))
        _add_blocks(blocks, offset, weight.address, weight.nbytes)
        offset += _aligned(weight.nbytes, 64)
    module.set_checksums(backend, blocks.buffer_info()[0], len(blocks) // 4)
    checksums = iter(blocks[3::4])
    for entry in entries:
        entry.checksums.extend(itertools.islice(checksums, _num_blocks(entry.nbytes)))
    header = msgspec.json.encode(_Header(key, entries))
    file.write(_MAGIC + hashlib.sha256(header).digest() + len(header).to_bytes(8, "little") + header)
    begin = _aligned(_PREFIX_BYTES + len(header), _ALIGNMENT)
    for (_, weight), entry in zip(ordered, entries, strict=True):
        file.seek(begin + entry.offset)
        file.write(memoryview((ctypes.c_char * weight.nbytes).from_address(weight.address)))


def packed_bytes(weights: Mapping[str, Any]) -> int:
    """What `write_packed` writes, or a little more."""
    header = sum(256 + len(path) + 24 * _num_blocks(weight.nbytes) for path, weight in weights.items())
    return int(_ALIGNMENT + header + sum(_aligned(weight.nbytes, 64) for weight in weights.values()))


def read_packed(file: BinaryIO, key: str, shapes: Shapes, backend: Any) -> dict[str, Any]:
    """The weights by path, which are exactly those of `shapes`, verified. Raises PackedFileFault and OSError."""
    entries, begin = _read_header(file, key)
    if {entry.path for entry in entries} != shapes.keys() or len(entries) != len(shapes):
        raise PackedFileFault("it has not the weights of this model")
    module: Any = kernels_module()
    file_bytes = os.fstat(file.fileno()).st_size
    weights: dict[str, Any] = {}
    blocks = array("Q")
    for entry in entries:
        _check_layout(entry, shapes[entry.path])
        if begin + entry.offset + entry.nbytes > file_bytes:
            raise PackedFileFault(f"it is cut off in {entry.path!r}")
        weight = module.unfilled_weight(backend, *entry.layout)
        if weight.nbytes != entry.nbytes or len(entry.checksums) != _num_blocks(entry.nbytes):
            raise PackedFileFault(f"{entry.path!r} has another size than its layout")
        _add_blocks(blocks, begin + entry.offset, weight.address, entry.nbytes, entry.checksums)
        weights[entry.path] = weight
    if not module.read_blocks(backend, file.fileno(), blocks.buffer_info()[0], len(blocks) // 4):
        raise PackedFileFault("a checksum does not match")
    return weights


def _read_header(file: BinaryIO, key: str) -> tuple[list[_Entry], int]:
    prefix = file.read(_PREFIX_BYTES)
    length = int.from_bytes(prefix[-8:], "little")
    if len(prefix) < _PREFIX_BYTES or not prefix.startswith(_MAGIC) or length > MAX_HEADER_BYTES:
        raise PackedFileFault("it is not a file of packed weights")
    header = file.read(length)
    if hashlib.sha256(header).digest() != prefix[len(_MAGIC) : len(_MAGIC) + 32]:
        raise PackedFileFault("its header is damaged")
    try:
        content = msgspec.json.decode(header, type=_Header)
    except msgspec.DecodeError as error:
        raise PackedFileFault(f"its header is not as it should be ({error})") from error
    if content.key != key:
        raise PackedFileFault("it was made of another checkpoint, for other settings or by another version")
    return content.weights, _aligned(_PREFIX_BYTES + length, _ALIGNMENT)


def _check_layout(entry: _Entry, shape: tuple[int, ...]) -> None:
    """Memory is made by these numbers: they must be of a weight that there can be."""
    fmt, n, k, group_size, sub_size, *_ = entry.layout
    sizes = (32, 64, 128, 256)
    grouped = sub_size in sizes and group_size in sizes and group_size % sub_size == 0 and k % group_size == 0
    if (n, k) != shape or fmt not in range(_FORMATS) or not (grouped if fmt == _INT4 else group_size == sub_size == 0):
        raise PackedFileFault(f"{entry.path!r} has another layout than the model")


def _num_blocks(nbytes: int) -> int:
    return (nbytes + BLOCK_BYTES - 1) // BLOCK_BYTES


def _add_blocks(blocks: array[int], offset: int, address: int, nbytes: int, checksums: list[int] | None = None) -> None:
    for index, at in enumerate(range(0, nbytes, BLOCK_BYTES)):
        size = min(BLOCK_BYTES, nbytes - at)
        blocks.extend((offset + at, address + at, size, 0 if checksums is None else checksums[index]))


def _aligned(number: int, alignment: int) -> int:
    return -(-number // alignment) * alignment
