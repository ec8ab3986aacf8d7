"""Blocks of a file with checksums: XXH64 by its published values, and whatever does not match is noticed."""

from __future__ import annotations

import ctypes
from array import array
from pathlib import Path

import pytest

from quire.ops.cpu.library import kernels_module, open_backend, usable_isas

pytestmark = pytest.mark.skipif(not usable_isas(), reason="this installation has no compiled kernels")

# https://github.com/Cyan4973/xxHash/blob/dev/cli/xsum_sanity_check.c and the specification: seed 0.
PUBLISHED = {
    b"": 0xEF46DB3751D8E999,
    b"a": 0xD24EC4F1A98C6E5B,
    b"abc": 0x44BC2CF5AD770999,
    b"Nobody inspects the spammish repetition": 0xFBCEA83C8A378BF1,
}


def table(memory: ctypes.Array[ctypes.c_char], sizes: list[int]) -> array[int]:
    blocks, at = array("Q"), 0
    for size in sizes:
        blocks.extend((at, ctypes.addressof(memory) + at, size, 0))
        at += size
    return blocks


@pytest.mark.parametrize("data", PUBLISHED)
def test_the_checksum_is_xxh64(data: bytes) -> None:
    memory = ctypes.create_string_buffer(data, len(data) + 1)
    blocks = table(memory, [len(data)])
    kernels_module().set_checksums(open_backend(1, None), blocks.buffer_info()[0], 1)
    assert blocks[3] == PUBLISHED[data]


@pytest.mark.parametrize("threads", [1, 3])
def test_blocks_come_back_and_damage_is_noticed(threads: int, tmp_path: Path) -> None:
    module, backend = kernels_module(), open_backend(threads, None)
    sizes = [1000, 0, 1, 31, 32, 33, 4096, 100_000]
    data = bytes(index * 7 % 251 for index in range(sum(sizes)))
    path = tmp_path / "file"
    path.write_bytes(data)
    source = ctypes.create_string_buffer(data, len(data))
    blocks = table(source, sizes)
    module.set_checksums(backend, blocks.buffer_info()[0], len(sizes))
    target = ctypes.create_string_buffer(len(data))
    for index, block in enumerate(table(target, sizes)):
        if index % 4 == 1:
            blocks[index] = block

    def read() -> bool:
        with path.open("rb") as file:
            return bool(module.read_blocks(backend, file.fileno(), blocks.buffer_info()[0], len(sizes)))

    assert read()
    assert target.raw == data
    for at in (0, 1000, 1001, 1040, len(data) - 1):
        path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        assert not read()
    path.write_bytes(data[:-1])
    assert not read()
