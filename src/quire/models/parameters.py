"""Every parameter of a model: where its values lie in the checkpoint, and what it becomes in memory.

Made from config.json and the headers alone, and checked against them before any weight is read. No torch: `quire plan`
tells sizes by the same list that loading goes through.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from quire.config.engine import Quantization
from quire.core.errors import BadValue, ConfigError, MissingTensor, ShapeMismatch
from quire.models.arch import Arch
from quire.models.checkpoint import Checkpoint
from quire.models.family import Cut, Family
from quire.models.model_config import ModelConfig
from quire.models.quantization.config import read_quantization
from quire.models.quantization.scheme import (
    DEFAULT_GROUP_SIZE,
    FP8_DYNAMIC,
    Scheme,
    is_absorbed,
    is_linear,
    rounded_scheme,
)
from quire.models.quantization.storage import Storage, mxfp4_parts
from quire.models.slots import EMBEDDING, HEAD, slots

_FLOATS = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameter:
    """`path` in the decoder, `tensor` in the checkpoint, and the shape.

    `cut`: the tensor holds other things besides, or holds it in another order; None: it is the tensor.
    `storage`: its values are stored quantised, in several tensors that are named after `tensor`. `scheme`: the format
    that it runs in, quantised; None for one that runs in the model's dtype. `share`: of a step's rows, those that meet
    it; of an expert's parameters a few. `wide`: it runs in float32 whatever the dtype. `normed`: its rows are divided
    by their lengths.
    `mxfp4`: its values are stored in that format, in tensors named after `tensor`, and written out.
    """

    path: str
    tensor: str
    shape: tuple[int, ...]
    cut: Cut | None = None
    storage: Storage | None = None
    scheme: Scheme | None = None
    share: float = 1.0
    wide: bool = False
    normed: bool = False
    mxfp4: bool = False

    @property
    def num_elements(self) -> int:
        return math.prod(self.shape)

    def nbytes(self, dtype_bytes: int, *, compiled: bool) -> int:
        """In memory, by a dtype of so many bytes where it is not quantised; packed, if compiled kernels serve."""
        if self.scheme is None:
            return self.num_elements * (4 if self.wide else dtype_bytes)
        # What is rounded here has scales of bfloat16 (see `quantization.rounding`); a checkpoint's may be any.
        return self.scheme.nbytes(self.shape, narrow=compiled and self.storage is None)

    @property
    def tensor_shape(self) -> tuple[int, ...]:
        """Of the tensor in the checkpoint."""
        return self.shape if self.cut is None else self.cut.stored

    @property
    def stored(self) -> tuple[str, ...]:
        """The names of the checkpoint's tensors that it is made of."""
        if self.mxfp4:
            return tuple(self.tensor + part.suffix for part in mxfp4_parts(self.tensor_shape))
        if self.storage is None:
            return (self.tensor,)
        module = self.tensor.removesuffix("weight")
        return tuple(module + part.suffix for part in self.storage.parts(self.tensor_shape))


def list_parameters(
    checkpoint: Checkpoint,
    family: Family,
    arch: Arch,
    *,
    quantization: Quantization | None = None,
    group_size: int = DEFAULT_GROUP_SIZE,
) -> list[Parameter]:
    """All parameters, each checked against the headers. `quantization` is what a plain checkpoint is rounded to;
    fp8_dynamic of an FP8 checkpoint leaves the weights and rounds rows.

    Raises MissingTensor, ShapeMismatch, BadValue, and ConfigError for `quantization` of what is quantised already.
    """
    file = str(checkpoint.directory / "config.json")
    stored = read_quantization(ModelConfig(checkpoint.config, file))
    expands = stored is not None and stored.method == "mxfp4"
    if stored is not None and quantization not in (None, FP8_DYNAMIC) and not expands:
        raise ConfigError(
            f"quantization is {quantization!r}, but the checkpoint is quantised already ({stored.method}).",
            param="quantization",
            remedy="Leave it out, or name the checkpoint that this one was made from.",
        )
    parameters = []
    for slot in slots(arch):
        tensor, cut = family.locate(slot, arch)
        tensor = next((name for name in family.spellings(tensor) if name in checkpoint.tensors), tensor)
        if slot.optional and tensor not in checkpoint.tensors:
            continue
        path, shape = slot.path, slot.shape
        storage, scheme = None, None
        if stored is not None and is_absorbed(path) and stored.storage_of(tensor.removesuffix(".weight")) is not None:
            raise BadValue(
                f"{file}: {tensor.removesuffix('.weight')!r} is stored quantised, but latent attention takes it apart, "
                "so that it has to be plain.",
                param="model",
                remedy="Take a checkpoint whose quantization_config leaves this layer out.",
            )
        if stored is not None and not expands and is_linear(path, shape):
            storage = stored.storage_of(tensor.removesuffix(".weight"))
            scheme = storage.scheme(shape, f"{file}: the weights of {tensor!r}") if storage is not None else None
            if scheme is not None and quantization == FP8_DYNAMIC:
                scheme = _rounding_rows(scheme, tensor)
        elif quantization is not None and (stored is None or expands):
            scheme = rounded_scheme(quantization, path, shape, group_size)
        share = arch.experts.top_k / arch.experts.num if arch.experts is not None and ".experts." in path else 1.0
        parameter = Parameter(
            path=path,
            tensor=tensor,
            shape=shape,
            cut=cut,
            storage=storage,
            scheme=scheme,
            share=share,
            wide=slot.wide,
            normed=slot.normed,
            mxfp4=expands and cut is not None and f"{tensor}_blocks" in checkpoint.tensors,
        )
        _check(checkpoint, parameter)
        parameters.append(parameter)
    if quantization is not None and (stored is None or expands) and arch.tie_word_embeddings and arch.lm_head:
        parameters += _tied_head(parameters, quantization)
    return parameters


def unexpected_tensors(
    checkpoint: Checkpoint, family: Family, arch: Arch, parameters: Sequence[Parameter]
) -> tuple[str, ...]:
    """The checkpoint's tensors that the model has no place for."""
    known = {name for parameter in parameters for name in parameter.stored}
    # A tied head is often saved all the same.
    ignored = list(family.ignored)
    head = family.names_of(arch).get("head")
    if head is not None:
        ignored.append(f"{head}.{'weight' if arch.lm_head else '*'}")
    ignored += [pattern.removeprefix(family.optional_prefix) for pattern in ignored]
    for parameter in parameters:
        if parameter.storage is not None:
            module = parameter.tensor.removesuffix("weight")
            known.update(module + suffix for suffix in parameter.storage.ignored)
    return tuple(
        name
        for name in sorted(checkpoint.tensors)
        if name not in known and not any(fnmatch.fnmatchcase(name, pattern) for pattern in ignored)
    )


def elements_per_row(parameters: Iterable[Parameter]) -> int:
    """Values that one row is multiplied by, if it meets all these parameters that it may meet."""
    return round(sum(parameter.num_elements * parameter.share for parameter in parameters))


def _rounding_rows(scheme: Scheme, tensor: str) -> Scheme:
    if scheme.format != "fp8":
        raise ConfigError(
            f"quantization is {FP8_DYNAMIC!r}, but {tensor!r} of the checkpoint is {scheme.format}.",
            param="quantization",
            remedy="Leave it out, or name an FP8 checkpoint or a plain one.",
        )
    return replace(scheme, rounds_rows=True)


def _tied_head(parameters: Sequence[Parameter], quantization: Quantization) -> list[Parameter]:
    """A quantised copy of the embedding, which itself stays as it is: its rows are looked up, not multiplied by."""
    embedding = next(parameter for parameter in parameters if parameter.path == EMBEDDING)
    scheme = rounded_scheme(quantization, HEAD, embedding.shape)
    if scheme is None:
        return []
    return [replace(embedding, path=HEAD, scheme=scheme)]


def _check(checkpoint: Checkpoint, parameter: Parameter) -> None:
    if parameter.mxfp4:
        if parameter.tensor_shape[1] % 32:
            raise BadValue(
                f"{checkpoint.directory}: the weights of {parameter.tensor!r} have {parameter.tensor_shape[1]} input "
                "features, which MXFP4's blocks of 32 do not divide.",
                param="model",
            )
        for part in mxfp4_parts(parameter.tensor_shape):
            _check_tensor(checkpoint, parameter.tensor + part.suffix, part.shapes, part.dtypes)
        return
    if parameter.storage is None:
        _check_tensor(checkpoint, parameter.tensor, (parameter.tensor_shape,), _FLOATS)
        return
    if parameter.cut is not None and (parameter.cut.transposed or parameter.cut.expert is not None):
        raise BadValue(
            f"{checkpoint.directory}: the weights of {parameter.tensor!r} lie transposed or stacked, which is not "
            "supported of quantised ones.",
            param="model",
        )
    if parameter.normed:
        raise BadValue(
            f"{checkpoint.directory}: the weights of {parameter.tensor!r} are to be normalised, which is not supported "
            "of quantised ones.",
            param="model",
        )
    module = parameter.tensor.removesuffix("weight")
    for part in parameter.storage.parts(parameter.tensor_shape):
        _check_tensor(checkpoint, module + part.suffix, part.shapes, part.dtypes)
    for suffix in parameter.storage.refused:
        if module + suffix in checkpoint.tensors:
            raise BadValue(
                f"{checkpoint.tensors[module + suffix].file}: tensor {module + suffix!r} reorders the input features "
                "(activation order), which is not supported.",
                param="model",
                remedy="Take a checkpoint that was made without it.",
            )


def _check_tensor(
    checkpoint: Checkpoint, name: str, shapes: tuple[tuple[int, ...], ...], dtypes: tuple[str, ...]
) -> None:
    wanted = " or ".join(str(list(shape)) for shape in shapes)
    info = checkpoint.tensors.get(name)
    if info is None:
        raise MissingTensor(
            f"{checkpoint.directory}: tensor {name!r}, of shape {wanted}, is in none of its files.", param="model"
        )
    if tuple(info.shape) not in shapes:
        raise ShapeMismatch(
            f"{info.file}: tensor {name!r} must have shape {wanted} by config.json, found {list(info.shape)}.",
            param="model",
        )
    if info.dtype not in dtypes:
        raise BadValue(
            f"{info.file}: tensor {name!r} must be of type {', '.join(dtypes)}, found {info.dtype}.", param="model"
        )
