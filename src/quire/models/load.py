"""Loads a checkpoint into a model that is ready to run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from quire.config.engine import ModelImpl, Quantization
from quire.core.errors import ConfigError, NotEnoughMemory
from quire.models.arch import Arch
from quire.models.build import build_decoder
from quire.models.checkpoint import Checkpoint
from quire.models.dtype import resolve_dtype
from quire.models.fallback.choice import by_transformers
from quire.models.model import Model
from quire.models.packed_weights import EarlyPacked, linear_shapes
from quire.models.parameters import elements_per_row, list_parameters, unexpected_tensors
from quire.models.serving import DEFAULT_SERVING, Serving, check_wish, identify_served
from quire.models.stack import stack_of
from quire.models.upload import Upload
from quire.models.weights import WeightStream, at_path, held_bytes
from quire.nn.kv import KVCache
from quire.ops.cpu.library import REFERENCE
from quire.ops.kernels import select
from quire.ops.target import Target

_DTYPES: Mapping[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedModel:
    """`weight_bytes` counts the parameters as they run, in `dtype` or quantised, and `converted_bytes` those of them
    that were converted, quantised or packed and are in memory already, while the others are read when they are used.
    `num_parameters` counts their values, `elements_per_row` those that a token meets. `unexpected_tensors` are in the
    checkpoint, not in the model. `served_by`: whose code the decoder is."""

    decoder: Model
    arch: Arch
    dtype: torch.dtype
    device: torch.device
    num_parameters: int
    elements_per_row: int
    weight_bytes: int
    converted_bytes: int
    max_model_len: int
    unexpected_tensors: tuple[str, ...]
    served_by: Literal["quire", "transformers"] = "quire"

    def kv_bytes_per_block(self, block_size: int) -> int:
        """Of all layers, as one group."""
        return sum(map(math.prod, self.decoder.block_shapes(block_size)))

    def new_kv_cache(
        self,
        num_blocks: int,
        block_size: int,
        *,
        places: Sequence[tuple[int, int]] | None = None,
    ) -> KVCache:
        """A cache of this model's shape, on its device. `places` as in `KVCache`: without, all layers share one table,
        and their blocks cannot be freed one by one."""
        sizes = self.decoder.block_sizes
        if block_size not in sizes:
            raise ConfigError(
                f"The attention kernel cannot work with a block size of {block_size}.",
                param="block_size",
                remedy=f"It takes {', '.join(map(str, sizes))}.",
            )
        for kind in self.arch.layer_kinds:
            if kind.chunk is not None and kind.chunk % block_size:
                raise ConfigError(
                    f"A block size of {block_size} does not divide the model's attention chunks of {kind.chunk}.",
                    param="block_size",
                    remedy=f"Take one of {', '.join(str(size) for size in sizes if kind.chunk % size == 0)}.",
                )
        shapes = self.decoder.block_shapes(block_size)
        planes, heads, block_bytes = shapes[0]
        return KVCache(
            num_layers=len(shapes),
            num_planes=planes,
            num_kv_heads=heads,
            num_blocks=num_blocks,
            block_size=block_size,
            block_bytes=block_bytes,
            shapes=[shape[1:] for shape in shapes],
            device=self.device,
            places=places,
        )


def load_model(
    directory: Path,
    *,
    dtype: str = "auto",
    quantization: Quantization | None = None,
    device: str = "cpu",
    max_model_len: int | None = None,
    threads: int | None = None,
    isa: str | None = None,
    kv_cache_dtype: str = "auto",
    early: EarlyPacked | None = None,
    serving: Serving = DEFAULT_SERVING,
    model_impl: ModelImpl = "auto",
) -> LoadedModel:
    """The model in `directory`, its weights mapped rather than read where type and layout are right already.

    `quantization` rounds the linear layers of a plain checkpoint to that format; a quantised one has its own.
    `max_model_len` unset takes the model's own limit. Raises CheckpointError's children for what is wrong with the
    checkpoint, and ConfigError for a dtype, a format or a length that the model cannot serve. `threads`, `isa`
    and `kv_cache_dtype` as in `ops.target`. `early`: what was packed of this model before, by the same settings.
    `model_impl` is `EngineConfig`'s.
    """
    checkpoint = Checkpoint.open(directory)
    if by_transformers(checkpoint.config, model_impl):
        from quire.models.fallback.load import load_by_transformers

        check_wish(checkpoint, serving)
        torch_dtype = _DTYPES[resolve_dtype(dtype, checkpoint, device)]
        target = Target(device, torch_dtype, threads=threads, isa=isa, kv_cache_dtype=kv_cache_dtype)
        return load_by_transformers(checkpoint, target, quantization=quantization, max_model_len=max_model_len)
    served = identify_served(checkpoint, serving)
    checkpoint, family, arch = served.checkpoint, served.family, served.arch
    length = model_len(arch, max_model_len)
    torch_dtype = _DTYPES[resolve_dtype(dtype, checkpoint, device)]
    torch_device = torch.device(device)
    parameters = list_parameters(checkpoint, family, arch, quantization=quantization)
    target = Target(
        torch_device,
        torch_dtype,
        threads=threads,
        isa=isa,
        kv_cache_dtype=kv_cache_dtype,
        backend=early and early.backend,
    )
    kernels = select(target)
    if quantization == "fp8_dynamic":
        check_fp8_rows(target)
    packed = None if early is None else early.packed
    compiled = target.unfit_for_cpu_kernels() is None
    weight_bytes = sum(parameter.nbytes(torch_dtype.itemsize, compiled=compiled) for parameter in parameters)
    check_room(weight_bytes, torch_device)
    with closing(Upload(torch_device, threads or 1)) if torch_device.type == "cuda" else nullcontext() as upload:
        weights = WeightStream(
            checkpoint, parameters, torch_dtype, torch_device, rounding=target.rounding, upload=upload, packed=packed
        )
        decoder = build_decoder(arch, weights, kernels, max_model_len=length)
    decoder.stack = stack_of(decoder)
    weights.drop_pages()
    if early is not None and early.kept is not None:
        early.kept.keep({path: at_path(decoder, path) for path in linear_shapes(parameters, arch)})
    return LoadedModel(
        decoder=decoder,
        arch=arch,
        dtype=torch_dtype,
        device=torch_device,
        num_parameters=sum(parameter.num_elements for parameter in parameters),
        elements_per_row=elements_per_row(parameters),
        weight_bytes=weight_bytes,
        converted_bytes=held_bytes(weights, decoder, parameters, torch_dtype, compiled=compiled),
        max_model_len=length,
        unexpected_tensors=unexpected_tensors(checkpoint, family, arch, parameters),
    )


def check_fp8_rows(target: Target) -> None:
    """Raises ConfigError where products of 8-bit floats are not served, but by the reference for which one asks."""
    why_not = target.unfit_for_fp8_rows()
    if why_not is not None and target.isa != REFERENCE:
        raise ConfigError(
            f"quantization is 'fp8_dynamic', which needs a GPU that multiplies 8-bit floats; here: {why_not}.",
            param="quantization",
            remedy="Take fp8, whose activations stay as they are, or int8.",
        )


def check_room(weight_bytes: int, device: torch.device) -> None:
    """Raises `NotEnoughMemory`, before anything is read, for weights that a GPU has no room for."""
    if device.type != "cuda":
        return
    free, total = torch.cuda.mem_get_info(device)
    if weight_bytes > free:
        raise NotEnoughMemory(
            f"The weights take {weight_bytes / 2**30:.2f} GiB; of the {total / 2**30:.2f} GiB of {device}, "
            f"{free / 2**30:.2f} are free.",
            param="device",
            remedy="Quantise them (--quantization int8, fp8 or int4), take a larger GPU, or end what else runs on it.",
        )


def model_len(arch: Arch, asked: int | None) -> int:
    """The context to run with. Raises ConfigError for one that the model has no positions for."""
    if asked is None:
        return arch.default_context
    if asked > arch.longest_context:
        raise ConfigError(
            f"max_model_len is {asked}, but {arch.architecture} ({_positions(arch)}) has positions for "
            f"{arch.longest_context} tokens only.",
            param="max_model_len",
            remedy="Ask for less, or change rope_scaling and max_position_embeddings in the checkpoint's config.json.",
        )
    return asked


def _positions(arch: Arch) -> str:
    if arch.num_learned_positions:
        return "with a table of positions"
    return ", ".join(f"rope type {rope.rope_type!r}" for rope in arch.ropes) or "without positions"
