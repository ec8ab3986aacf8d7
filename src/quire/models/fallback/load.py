"""Loads a checkpoint into a model of transformers' own code, with quire's linear layers, attention and cache."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from quire.config.engine import Quantization
from quire.core.errors import BadValue, CheckpointError, MissingTensor, QuireError, ShapeMismatch
from quire.core.json_file import shorten
from quire.models.arch import Arch, LayerKind, NormKind
from quire.models.checkpoint import Checkpoint
from quire.models.fallback.attention import CacheShape, Layer, Unfit, register
from quire.models.fallback.known import ATTENTION, Known, know, unsupported
from quire.models.fallback.positions import fix_positions
from quire.models.fallback.proof import own_logits, prove, survey
from quire.models.fallback.rowwise import LinearModule, replace_linears
from quire.models.fallback.served import TransformersModel, give_body
from quire.models.load import LoadedModel, model_len
from quire.models.tensors import CheckpointTensors
from quire.ops.kernels import Kernels, select
from quire.ops.target import Target

_BLOCK = 16


def load_by_transformers(
    checkpoint: Checkpoint, target: Target, *, quantization: Quantization | None, max_model_len: int | None
) -> LoadedModel:
    """As `load_model`; raises UnsupportedModel for a model whose code does what paged attention cannot see."""
    known = know(checkpoint, quantization)
    try:
        return _load(checkpoint, known, target, max_model_len)
    except Unfit as error:
        raise unsupported(known.architecture, str(error)) from error
    except (QuireError, MemoryError):
        raise
    except Exception as error:
        # Code that we do not know, with a config.json that its authors have not seen: it may raise anything.
        reason = f"its code raises {type(error).__name__}: {shorten(str(error), 300)}"
        raise unsupported(known.architecture, reason) from error


def _load(checkpoint: Checkpoint, known: Known, target: Target, max_model_len: int | None) -> LoadedModel:
    register(ATTENTION)
    weights = _read(checkpoint, known, target)
    model, inner = weights.model, known.config.get_text_config(decoder=True)
    kernels_of = _kernels(target)
    replace_linears(model, kernels_of[target.dtype])
    compiled = target.unfit_for_cpu_kernels() is None
    weight_bytes, converted_bytes = _bytes(model, weights.mapped, compiled=compiled)
    body = give_body(model)
    longest = fix_positions(model, inner, max_model_len)
    vocab_size = int(inner.vocab_size)
    own_tv = own_logits(model, vocab_size)
    layers = survey(body, longest, vocab_size)
    served = TransformersModel(model, body, layers, kernels_of, target.dtype)
    arch = _arch(known, inner, layers, longest)
    loaded = LoadedModel(
        decoder=served,
        arch=arch,
        dtype=target.dtype,
        device=target.device,
        num_parameters=weights.num_parameters,
        elements_per_row=weights.num_parameters,
        weight_bytes=weight_bytes,
        converted_bytes=converted_bytes,
        max_model_len=model_len(arch, max_model_len),
        unexpected_tensors=weights.unexpected,
        served_by="transformers",
    )
    exact = target.kv_dtype not in ("int8", "fp8")
    caches = (loaded.new_kv_cache(5, _BLOCK) for _ in range(2))
    prove(known.architecture, served, caches, own_tv, target.dtype, exact=exact)
    return loaded


def _kernels(target: Target) -> Mapping[torch.dtype, Kernels]:
    """For the model's dtype, and for code that computes some products in float32."""
    own = {target.dtype: select(target)}
    if target.dtype == torch.float32:
        return own
    wide = Target(target.device, torch.float32, threads=target.threads, isa=target.isa)
    return {**own, torch.float32: select(wide)}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Weights:
    model: Any
    num_parameters: int
    mapped: frozenset[int]
    unexpected: tuple[str, ...]


def _read(checkpoint: Checkpoint, known: Known, target: Target) -> _Weights:
    """transformers' own loading, which knows how names and layouts of checkpoints changed, from our maps of the files:
    what needs no change stays a view of them."""
    tensors = CheckpointTensors(checkpoint)
    state = {name: tensors.get(name) for name in tensors}
    _check_size(checkpoint, known, state)
    model, found = known.model_class.from_pretrained(
        None,
        config=known.config,
        state_dict=dict(state),
        dtype=target.dtype,
        attn_implementation=ATTENTION,
        experts_implementation="eager",
        output_loading_info=True,
        local_files_only=True,
        use_safetensors=True,
        ignore_mismatched_sizes=True,
    )
    _check_loaded(checkpoint, found)
    model = model.eval().requires_grad_(False).to(target.device)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1 and not bool(torch.isfinite(parameter).all()):
            raise BadValue(f"{checkpoint.directory}: parameter {name!r} must be finite.", param="model")
    return _Weights(
        model=model,
        num_parameters=sum(parameter.numel() for parameter in model.parameters()),
        mapped=frozenset(tensor.data_ptr() for tensor in state.values()),
        unexpected=tuple(sorted(found["unexpected_keys"])),
    )


def _bytes(model: Any, mapped: frozenset[int], *, compiled: bool) -> tuple[int, int]:
    """(of the weights as they run, of those that are not pages of the files). Compiled kernels have copies of theirs;
    experts' are made when a token first meets them, beside the model's own."""
    sizes: dict[int, tuple[int, bool]] = {}
    copies = 0
    for module in model.modules():
        if isinstance(module, LinearModule):
            if compiled:
                copies += module.weight.nbytes
            else:
                pointer = module.linear.weight.data_ptr()
                sizes[pointer] = module.weight.nbytes, pointer in mapped
        for parameter in module.parameters(recurse=False):
            sizes[parameter.data_ptr()] = parameter.nbytes, parameter.data_ptr() in mapped
            if compiled and parameter.ndim > 1 and not isinstance(module, nn.Embedding):
                copies += parameter.nbytes
    converted = sum(size for size, is_mapped in sizes.values() if not is_mapped)
    return copies + sum(size for size, _ in sizes.values()), copies + converted


def _check_size(checkpoint: Checkpoint, known: Known, state: Mapping[str, Tensor]) -> None:
    """What config.json asks for may not be more than the checkpoint has: it would be made up, and take memory."""
    with torch.device("meta"):
        empty = known.model_class._from_config(known.config, attn_implementation="eager")
    asked = sum(parameter.numel() for parameter in empty.parameters())
    there = sum(tensor.numel() for tensor in state.values())
    if asked > there:
        raise ShapeMismatch(
            f"{checkpoint.directory}: config.json describes {asked:,} parameters, the checkpoint has {there:,}.",
            param="model",
        )


def _check_loaded(checkpoint: Checkpoint, found: Mapping[str, Any]) -> None:
    if found["missing_keys"]:
        name = min(found["missing_keys"])
        raise MissingTensor(
            f"{checkpoint.directory}: the checkpoint has nothing for parameter {name!r} (as transformers calls it; "
            f"{len(found['missing_keys'])} are missing).",
            param="model",
        )
    if found["mismatched_keys"]:
        name, *shapes = min(found["mismatched_keys"], key=str)
        raise ShapeMismatch(
            f"{checkpoint.directory}: tensor {name!r} has shape {tuple(shapes[0])}, config.json says "
            f"{tuple(shapes[1])}.",
            param="model",
        )
    if found.get("error_msgs"):
        raise CheckpointError(f"{checkpoint.directory}: {shorten(str(found['error_msgs']), 300)}", param="model")


def _arch(known: Known, inner: Any, layers: list[Layer], longest: int) -> Arch:
    """The flags that the engine sizes its cache by: what the layers see, and widths. How they compute is not ours."""
    cache = CacheShape.of(layers)
    hidden_size = int(inner.hidden_size)
    intermediate_size = getattr(inner, "intermediate_size", None)
    return Arch(
        architecture=known.architecture,
        vocab_size=int(inner.vocab_size),
        hidden_size=hidden_size,
        intermediate_size=intermediate_size if type(intermediate_size) is int else 4 * hidden_size,
        num_layers=len(layers),
        num_heads=max(layer.num_heads for layer in layers),
        num_kv_heads=cache.num_kv_heads,
        head_dim=cache.head_dim,
        max_positions=longest,
        norm=NormKind(eps=1e-6),
        layer_kinds=tuple(
            LayerKind(rope=None, window=layer.visible.window, chunk=layer.visible.chunk) for layer in layers
        ),
        attention_scale=layers[0].scale,
    )
