"""A checkpoint's tensors as torch tensors: views of a private memory map, so that weights are in memory once."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from quire.core.errors import CheckpointError, MissingTensor
from quire.core.json_file import shorten
from quire.models.checkpoint import Checkpoint, TensorInfo
from quire.models.mapped_files import MappedFiles

_TORCH_DTYPES = {
    "BOOL": torch.bool,
    "F4": torch.float4_e2m1fn_x2,  # two elements in one byte: the last dimension is halved
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "I64": torch.int64,
    "U64": torch.uint64,
    "F64": torch.float64,
    "C64": torch.complex64,
}


class CheckpointTensors:
    """Gives tensors by name without copying them: views of `MappedFiles`."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._infos = checkpoint.tensors
        self._files = MappedFiles()

    def __contains__(self, name: object) -> bool:
        return name in self._infos

    def __iter__(self) -> Iterator[str]:
        return iter(self._infos)

    def __len__(self) -> int:
        return len(self._infos)

    def info(self, name: str) -> TensorInfo:
        """Type, shape and place of a tensor; raises MissingTensor."""
        info = self._infos.get(name)
        if info is None:
            raise MissingTensor(f"The checkpoint has no tensor '{shorten(name)}'.", param="model")
        return info

    def get(self, name: str) -> Tensor:
        """The tensor, as a view of the mapped file.

        One whose bytes do not start at a multiple of its element size is copied instead: such a view would be slow
        everywhere and wrong on some machines. Raises MissingTensor, and CheckpointError for a type torch has not.
        """
        info = self.info(name)
        dtype = _TORCH_DTYPES.get(info.dtype)
        if dtype is None:
            raise CheckpointError(
                f"{info.file}: tensor '{shorten(name)}' is of type {info.dtype}, which torch does not have.",
                param="model",
            )
        shape = info.shape if info.dtype != "F4" else _halved(info)
        if info.nbytes == 0:
            return torch.empty(shape, dtype=dtype)
        file_map = self._files.file_of(info)
        bytes_n = torch.frombuffer(file_map, dtype=torch.uint8, count=info.nbytes, offset=info.offset)
        if info.offset % dtype.itemsize:  # the map itself starts at a page
            bytes_n = bytes_n.clone()
        return bytes_n.view(dtype).view(shape)

    def drop(self, name: str) -> None:
        """As `MappedFiles.drop`."""
        self._files.drop(self.info(name))


def _halved(info: TensorInfo) -> tuple[int, ...]:
    if not info.shape or info.shape[-1] % 2:
        raise CheckpointError(
            f"{info.file}: tensor '{shorten(info.name)}' of type F4 has an odd last dimension: {info.shape}.",
            param="model",
        )
    return (*info.shape[:-1], info.shape[-1] // 2)
