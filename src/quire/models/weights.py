"""From a checkpoint's tensors to a decoder's parameters, by a family's table."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from quire.core.errors import BadValue, MissingTensor, ShapeMismatch
from quire.models.arch import Arch
from quire.models.checkpoint import Checkpoint
from quire.models.family import Family
from quire.models.tensors import CheckpointTensors

_FLOATS = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpectedTensor:
    """A parameter's path in the decoder, its tensor's name in the checkpoint, and its shape."""

    parameter: str
    tensor: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedWeights:
    """Parameters by path. `unexpected`: tensors of the checkpoint that the model has no place for.

    `converted_bytes` are of parameters in memory of their own; the others are pages of the mapped files.
    """

    parameters: Mapping[str, Tensor]
    converted_bytes: int
    unexpected: tuple[str, ...]


def expected_tensors(family: Family, arch: Arch) -> Iterator[ExpectedTensor]:
    """The table written out for every layer."""
    for weight in family.weights:
        if weight.when is not None and not getattr(arch, weight.when):
            continue
        shape = tuple(int(getattr(arch, field)) for field in weight.shape)
        layers = range(arch.num_layers) if "{}" in weight.parameter else range(1)
        for layer in layers:
            yield ExpectedTensor(
                parameter=weight.parameter.format(layer), tensor=weight.tensor.format(layer), shape=shape
            )


def load_weights(checkpoint: Checkpoint, family: Family, arch: Arch, dtype: torch.dtype) -> LoadedWeights:
    """Views of the mapped files where the dtype is right already, converted copies, one at a time, where not.

    Everything is checked against the headers before any weight is read. Raises MissingTensor, ShapeMismatch, BadValue.
    """
    expected = []
    for item in expected_tensors(family, arch):
        _check(checkpoint, item)
        expected.append(item)
    source = CheckpointTensors(checkpoint)
    parameters = {}
    converted_bytes = 0
    for item in expected:
        tensor = source.get(item.tensor)
        if tensor.dtype != dtype:
            tensor = tensor.to(dtype)
            source.drop(item.tensor)
            converted_bytes += tensor.nbytes
        if tensor.ndim == 1:
            _check_finite(checkpoint, item, tensor)
        parameters[item.parameter] = tensor
    return LoadedWeights(
        parameters=parameters,
        converted_bytes=converted_bytes,
        unexpected=_unexpected(checkpoint, family, expected),
    )


def _check(checkpoint: Checkpoint, item: ExpectedTensor) -> None:
    info = checkpoint.tensors.get(item.tensor)
    if info is None:
        raise MissingTensor(
            f"{checkpoint.directory}: tensor {item.tensor!r}, of shape {list(item.shape)}, is in none of its files.",
            param="model",
        )
    if tuple(info.shape) != item.shape:
        raise ShapeMismatch(
            f"{info.file}: tensor {item.tensor!r} must have shape {list(item.shape)} by config.json, "
            f"found {list(info.shape)}.",
            param="model",
        )
    if info.dtype not in _FLOATS:
        raise BadValue(
            f"{info.file}: tensor {item.tensor!r} must be of type {', '.join(_FLOATS)}, found {info.dtype}.",
            param="model",
            remedy="Quantised checkpoints are not supported yet.",
        )


def _check_finite(checkpoint: Checkpoint, item: ExpectedTensor, tensor: Tensor) -> None:
    """Norms and biases: small, and one NaN in them spoils every output. The matrices are too large to read for this."""
    bad = (~torch.isfinite(tensor)).nonzero()
    if len(bad):
        index = int(bad[0].item())
        raise BadValue(
            f"{checkpoint.tensors[item.tensor].file}: tensor {item.tensor!r} must be finite, found "
            f"{tensor[index].item()} at index {index} ({len(bad)} such values, in {tensor.dtype}).",
            param="model",
        )


def _unexpected(checkpoint: Checkpoint, family: Family, expected: list[ExpectedTensor]) -> tuple[str, ...]:
    known = {item.tensor for item in expected}
    # A tied head is often saved all the same.
    ignored = (*family.ignored, *(weight.tensor for weight in family.weights if weight.parameter == "head.weight"))
    return tuple(
        name
        for name in sorted(checkpoint.tensors)
        if name not in known and not any(fnmatch.fnmatchcase(name, pattern) for pattern in ignored)
    )
