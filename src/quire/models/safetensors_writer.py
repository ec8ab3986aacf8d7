"""Writes a safetensors file tensor by tensor, in any order, with none of them in memory but the one that is written.

The format is that of `safetensors_header`: all types, shapes and places stand at the beginning, and so have to be known
before the first tensor is.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import torch
from torch import Tensor

from quire.models.safetensors_header import DTYPE_BITS

_NAMES = {
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int32: "I32",
    torch.int64: "I64",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float32: "F32",
    torch.float64: "F64",
}
_ALIGNMENT = 8


class SafetensorsWriter:
    """Used as a context: the file has its name when all is written, and there is none if anything went wrong.

    `entries` are (dtype, shape) by name, dtypes by the format's names. The widest types come first, so that every
    tensor lies at a multiple of its element's size.
    """

    def __init__(self, path: Path, entries: Mapping[str, tuple[str, tuple[int, ...]]]) -> None:
        self._path = path
        self._partial = path.with_name(path.name + ".partial")
        self._entries = entries
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        begin = 0
        for name in sorted(entries, key=lambda name: (-DTYPE_BITS[entries[name][0]], name)):
            dtype, shape = entries[name]
            end = begin + math.prod(shape) * DTYPE_BITS[dtype] // 8
            header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
            begin = end
        text = json.dumps(header, separators=(",", ":")).encode()
        self._header = text + b" " * (-len(text) % _ALIGNMENT)
        self._places: Mapping[str, dict[str, list[int]]] = {name: header[name] for name in entries}  # type: ignore[misc]
        self._left = set(entries)
        self._file: BinaryIO | None = None

    def __enter__(self) -> SafetensorsWriter:
        self._file = self._partial.open("wb")
        self._file.write(len(self._header).to_bytes(8, "little") + self._header)
        return self

    def put(self, name: str, tensor: Tensor) -> None:
        """Writes a tensor, once, of the type and shape that was announced."""
        assert self._file is not None
        assert (_NAMES[tensor.dtype], tuple(tensor.shape)) == self._entries[name], name
        self._left.remove(name)
        self._file.seek(8 + len(self._header) + self._places[name]["data_offsets"][0])
        if tensor.numel():
            self._file.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        assert self._file is not None
        self._file.close()
        if kind is not None:
            self._partial.unlink(missing_ok=True)
            return
        assert not self._left, f"never written: {sorted(self._left)[:3]}"
        os.replace(self._partial, self._path)
