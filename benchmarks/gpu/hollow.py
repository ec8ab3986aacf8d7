"""Checkpoints that say everything about a model but hold no weights, and the random ones that stand in for them.

Zeros would flatter a GPU: it draws less power multiplying them, and clocks higher.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from tools.make_checkpoint import DTYPES, Shape, config, tensors, write_json

STD = 0.02
SEED = 20261123


def write_hollow(directory: Path, shape: Shape) -> Path:
    """A checkpoint whose weights are a hole in the file: it takes no room."""
    directory.mkdir(parents=True, exist_ok=True)
    write_json(directory / "config.json", config(shape, "bfloat16"))
    type_name, size = DTYPES["bfloat16"]
    header: dict[str, Any] = {}
    end = 0
    for name, dims in tensors(shape):
        begin, end = end, end + int(np.prod(dims)) * size
        header[name] = {"dtype": type_name, "shape": list(dims), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    with (directory / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return directory


@contextmanager
def random_weights() -> Iterator[None]:
    """While models are loaded in it, their weights are made on the device, of the shapes that their files tell."""
    # The loader has no door for weights that come from elsewhere, so that a class takes the place of its own.
    with mock.patch("quire.models.load.WeightStream", _random_stream()):
        yield


def _random_stream() -> type[Mapping[str, Any]]:
    import torch

    from quire.models.parameters import Parameter
    from quire.models.quantization.rounding import round_weight

    class RandomStream(Mapping[str, Any]):
        """In the place of `models.weights.WeightStream`. A path's values are the same each time and in each process."""

        def __init__(
            self, _checkpoint: Any, parameters: Sequence[Parameter], dtype: Any, device: Any, **_options: Any
        ) -> None:
            self._parameters = {parameter.path: parameter for parameter in parameters}
            self._numbers = {path: number for number, path in enumerate(self._parameters)}
            self._dtype, self._device = dtype, device
            self._generator = torch.Generator(device)

        def __getitem__(self, path: str) -> Any:
            parameter = self._parameters[path]
            dtype = torch.float32 if parameter.wide else self._dtype
            if len(parameter.shape) == 1:
                return torch.ones(parameter.shape, dtype=dtype, device=self._device)
            self._generator.manual_seed(SEED + self._numbers[path])
            weight = torch.empty(parameter.shape, dtype=dtype, device=self._device)
            weight.normal_(0, STD, generator=self._generator)
            return weight if parameter.scheme is None else round_weight(weight, parameter.scheme, None)

        def __contains__(self, path: object) -> bool:
            return path in self._parameters

        def __iter__(self) -> Iterator[str]:
            return iter(self._parameters)

        def __len__(self) -> int:
            return len(self._parameters)

        def drop_pages(self) -> None:
            """There are none."""

        def is_mapped(self, _parameter: Parameter, _held: object) -> bool:
            return False

    return RandomStream
