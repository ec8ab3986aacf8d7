"""A model's parameters, read from the checkpoint one at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from quire.core.errors import BadValue
from quire.models.checkpoint import Checkpoint, TensorInfo
from quire.models.cut import cut_expert, cut_out, cut_rows, take_rows
from quire.models.parameters import Parameter
from quire.models.quantization.assemble import assemble
from quire.models.quantization.mxfp4 import expand
from quire.models.quantization.rounding import round_weight, scales_of
from quire.models.tensors import CheckpointTensors
from quire.models.upload import Upload
from quire.ops.cpu.rounding import CpuRounding
from quire.ops.weight import PackedWeight, QuantizedWeight, SplitScales, Weight


class WeightStream(Mapping[str, Weight | PackedWeight]):
    """Parameters by path, each of them read, converted or quantised when it is asked for, and then forgotten.

    Whoever packs a parameter before asking for the next one has only one of them in memory in two forms: asking for
    the next gives the file's pages of the last one back to the kernel. A view that is kept is not hurt by that, its
    pages come again with the next look at it.

    `upload` brings tensors to a device that is not the CPU; torch does otherwise.

    `packed`: by path, those that the kernels have packed before. They are handed out as they are, and not read.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        parameters: Sequence[Parameter],
        dtype: torch.dtype,
        device: torch.device,
        *,
        rounding: CpuRounding | None = None,
        upload: Upload | None = None,
        packed: Mapping[str, Any] | None = None,
    ) -> None:
        self._source = CheckpointTensors(checkpoint)
        self._parameters = {parameter.path: parameter for parameter in parameters}
        self._dtype = dtype
        self._device = device
        self._upload = upload or (lambda tensor: tensor.to(device))
        self._rounding = rounding
        self._packed = packed or {}
        self._last: Parameter | None = None

    def __getitem__(self, path: str) -> Weight | PackedWeight:
        """A view of the mapped file where type and layout are right already. Raises BadValue for norms, biases and
        scales that are not finite."""
        if path in self._packed:
            return PackedWeight(value=self._packed[path])
        parameter = self._parameters[path]
        self.drop_pages()
        self._last = parameter
        return self._moved(self._read(parameter))

    def __contains__(self, path: object) -> bool:
        return path in self._parameters or path in self._packed

    def __iter__(self) -> Iterator[str]:
        return iter({**self._parameters, **self._packed})

    def __len__(self) -> int:
        return len({**self._parameters, **self._packed})

    def drop_pages(self) -> None:
        """Of the parameter that was read last."""
        if self._last is not None:
            for name in self._last.stored:
                self._source.drop(name)
            self._last = None

    def is_mapped(self, parameter: Parameter, held: object) -> bool:
        """Whether `held`, what became of a parameter, still is a view of the mapped file."""
        if parameter.mxfp4 or parameter.normed or parameter.storage is not None or parameter.scheme is not None:
            return False
        if not isinstance(held, Tensor):
            return False
        return held.data_ptr() == cut_out(self._source.get(parameter.tensor), parameter.cut).data_ptr()

    def _moved(self, weight: Weight) -> Weight:
        if self._device.type == "cpu":
            return weight
        if isinstance(weight, Tensor):
            return self._upload(weight)
        moved: QuantizedWeight = self._parts_moved(weight)
        return moved

    def _parts_moved(self, parts: Any) -> Any:
        """A dataclass, and those in it, with its tensors on the device."""
        values = {field.name: getattr(parts, field.name) for field in fields(parts)}
        moved: dict[str, Any] = {
            name: self._upload(value) for name, value in values.items() if isinstance(value, Tensor)
        }
        moved |= {name: self._parts_moved(value) for name, value in values.items() if isinstance(value, SplitScales)}
        return replace(parts, **moved)

    def _read(self, parameter: Parameter) -> Weight:
        if parameter.storage is not None:
            return cut_rows(self._stored(parameter), parameter.cut)
        tensor = self._expanded(parameter) if parameter.mxfp4 else self._plain(parameter)
        if parameter.scheme is not None:
            weight = round_weight(tensor, parameter.scheme, self._rounding)
            check_finite(self._source.info(parameter.stored[0]), scales_of(weight), "weights of finite scale")
            return weight
        if tensor.ndim == 1:
            # Small, and one NaN in them spoils every output. The matrices are too large to read for this.
            check_finite(self._source.info(parameter.tensor), tensor, "finite")
        return tensor.to(torch.float32 if parameter.wide else self._dtype)

    def _plain(self, parameter: Parameter) -> Tensor:
        tensor = cut_out(self._source.get(parameter.tensor), parameter.cut)
        if not parameter.normed:
            return tensor
        lengths: Tensor = torch.linalg.vector_norm(tensor, dim=1, keepdim=True, dtype=torch.float32).clamp_min_(1e-12)
        return tensor / lengths.to(tensor.dtype)

    def _expanded(self, parameter: Parameter) -> Tensor:
        """Of one expert at a time: the whole stack would take four times the file."""
        cut = parameter.cut
        assert cut is not None
        blocks, scales = (cut_expert(self._source.get(name), cut) for name in parameter.stored)
        return take_rows(expand(blocks, scales), cut)

    def _stored(self, parameter: Parameter) -> QuantizedWeight:
        assert parameter.storage is not None
        assert parameter.scheme is not None
        module = parameter.tensor.removesuffix("weight")
        parts = {name.removeprefix(module): self._source.get(name) for name in parameter.stored}
        try:
            weight = assemble(parameter.storage, parameter.scheme, parts)
        except BadValue as error:
            file = self._source.info(parameter.stored[0]).file
            raise BadValue(
                f"{file}: layer {module[:-1]!r}: {error.message}", param="model", remedy=error.remedy
            ) from None
        check_finite(self._source.info(parameter.stored[-1]), scales_of(weight), "of finite scales")
        return weight


def check_finite(info: TensorInfo, tensor: Tensor, expected: str) -> None:
    """Raises BadValue for what became of the checkpoint's tensor `info` if not all of it is finite."""
    bad = (~torch.isfinite(tensor.reshape(-1))).nonzero()
    if len(bad):
        index = int(bad[0].item())
        raise BadValue(
            f"{info.file}: tensor {info.name!r} must be {expected}, found "
            f"{tensor.reshape(-1)[index].item()} at index {index} ({len(bad)} such values, in {tensor.dtype}).",
            param="model",
        )


def held_bytes(
    stream: WeightStream, decoder: object, parameters: Sequence[Parameter], dtype: torch.dtype, *, compiled: bool
) -> int:
    """Bytes of the parameters that are in memory of their own, in `decoder`, rather than pages of the files."""
    held = 0
    for parameter in parameters:
        if not stream.is_mapped(parameter, at_path(decoder, parameter.path)):
            held += parameter.nbytes(dtype.itemsize, compiled=compiled)
    return held


def at_path(tree: object, path: str) -> object:
    """What a parameter's path leads to in a decoder."""
    for name in path.split("."):
        tree = tree[int(name)] if isinstance(tree, list) else getattr(tree, name)
    return tree
