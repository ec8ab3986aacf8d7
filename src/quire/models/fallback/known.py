"""Which of transformers' classes a config.json asks for, and whether it may be run.

Names are looked up in transformers' own tables; nothing of a checkpoint names code: `auto_map` is not read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from quire.config.engine import Quantization
from quire.core.errors import BadValue, ConfigError, UnknownArchitecture, UnsupportedModel
from quire.core.json_file import shorten
from quire.models.checkpoint import Checkpoint

OLDEST = (5, 16)
INSTALL = "Install it with: pip install 'quire-llm[transformers]'."
ATTENTION = "quire_paged"
"""The name of our attention in transformers' registries."""

_NOT_READ = (
    "auto_map",
    "quantization_config",
    "attn_implementation",
    "_attn_implementation",
    "_attn_implementation_internal",
    "experts_implementation",
    "_experts_implementation",
    "_name_or_path",
    "use_pretrained_backbone",
    "dtype",
    "torch_dtype",
    "transformers_version",
)
"""Fields of config.json that name code or decide how it is run; what they decide is quire's affair."""
_MOST_LAYERS = 10_000
_MOST_EXPERTS = 16_384
_COUNTS = ("num_hidden_layers", "num_layers", "n_layers", "n_layer", "decoder_layers", "encoder_layers")
_LAYER_TYPES = ("full_attention", "sliding_attention", "chunked_attention")


@dataclass(frozen=True, slots=True, kw_only=True)
class Known:
    """`model_class` and `config` are transformers' own; both made of names and values only."""

    architecture: str
    model_class: Any
    config: Any


def know(checkpoint: Checkpoint, quantization: Quantization | None = None) -> Known:
    """The class that transformers has for the checkpoint.

    Raises UnknownArchitecture if there is none or transformers is not installed, UnsupportedModel if paged attention
    cannot serve it, and BadValue or ConfigError for a setting that it cannot have.
    """
    file = str(checkpoint.directory / "config.json")
    name = _name(checkpoint.config, file)
    _check_installed(name)
    if _is_quantized(checkpoint.config):
        raise UnsupportedModel(
            f"{file}: {name} is served by transformers here, and its weights are quantised, which is not supported of "
            "such models.",
            param="model",
            remedy="Name the checkpoint that this one was made from.",
        )
    if quantization is not None:
        raise ConfigError(
            f"quantization is {quantization!r}, but {name} is served by transformers, whose weights stay as they are.",
            param="quantization",
            remedy="Leave it out.",
        )
    model_class, config = _classes(name, checkpoint, file)
    _check_parts(name, config.to_dict())  # with those that are there by default
    _check_kind(name, model_class, config)
    return Known(architecture=name, model_class=model_class, config=config)


def _name(fields: Mapping[str, Any], file: str) -> str:
    names = fields.get("architectures")
    if not isinstance(names, list) or not names or not isinstance(names[0], str):
        raise BadValue(
            f"{file}: field 'architectures' must be a list with the name of a model class, "
            f"found {shorten(repr(names))}.",
            param="model",
        )
    return shorten(names[0], 100)


def _check_installed(name: str) -> None:
    try:
        import transformers
    except ImportError:
        raise UnknownArchitecture(
            f"Architecture {name!r} has no implementation in quire, and transformers, which may have one, is not "
            "installed.",
            param="model",
            remedy=INSTALL,
        ) from None
    found = tuple(int(part) for part in transformers.__version__.split(".")[:2])
    if found < OLDEST:
        raise UnknownArchitecture(
            f"Architecture {name!r} has no implementation in quire, and transformers {transformers.__version__} is "
            f"older than {'.'.join(map(str, OLDEST))}.",
            param="model",
            remedy=INSTALL,
        )


def _classes(name: str, checkpoint: Checkpoint, file: str) -> tuple[Any, Any]:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    )

    fields = _read(checkpoint.config)
    model_type = fields.get("model_type")
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        remedy = "Only what the installed transformers has itself can be run; a checkpoint's own code never is."
        raise UnknownArchitecture(
            f"{file}: neither quire nor transformers knows architecture {name!r} with model type "
            f"{shorten(repr(model_type))}.",
            param="model",
            remedy=remedy,
        )
    _check_counts(fields, checkpoint, file)
    _check_parts(name, fields)
    config_class = CONFIG_MAPPING[model_type]
    found = [
        table.get(config_class, None) for table in (MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING)
    ]
    classes = [one for entry in found for one in (entry if isinstance(entry, tuple) else (entry,)) if one is not None]
    model_class = next((one for one in classes if one.__name__ == name), None)
    if model_class is None:
        known = ", ".join(one.__name__ for one in classes) or "none"
        raise UnknownArchitecture(
            f"{file}: architecture {name!r} is not known. transformers has for model type {model_type!r}: {known}.",
            param="model",
        )
    try:
        config = config_class.from_dict(fields)
    except Exception as error:
        raise BadValue(f"{file}: transformers refuses it: {shorten(str(error), 300)}", param="model") from error
    return model_class, config


def _is_quantized(fields: Mapping[str, Any]) -> bool:
    """Or what is inside it, such as a text part."""
    if any(fields.get(key) is not None for key in ("quantization_config", "compression_config")):
        return True
    return any(_is_quantized(value) for value in fields.values() if isinstance(value, dict))


def _read(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Without what is not read, in the configurations inside it, too."""
    found = {key: value for key, value in fields.items() if key not in _NOT_READ}
    return {key: _read(value) if isinstance(value, dict) else value for key, value in found.items()}


def _check_counts(fields: Mapping[str, Any], checkpoint: Checkpoint, file: str) -> None:
    """Before transformers makes as many modules as config.json asks for."""
    most = min(_MOST_LAYERS, len(checkpoint.tensors))
    for section in (fields, *(value for value in fields.values() if isinstance(value, dict))):
        for key, value in section.items():
            bound = most if key in _COUNTS else _MOST_EXPERTS if "experts" in key else None
            if bound is not None and type(value) is int and value > bound:
                raise BadValue(
                    f"{file}: field {key!r} is {value}, and may be at most {bound}; the checkpoint has "
                    f"{len(checkpoint.tensors)} tensors.",
                    param="model",
                )


def _check_parts(name: str, fields: Mapping[str, Any]) -> None:
    """Before transformers makes a part that it or timm would look for in the network: timm does if a name says so, and
    transformers reads the configuration of a `backbone` that is only named."""
    for part in _parts(fields):
        model_type = part.get("model_type")
        timm = isinstance(model_type, str) and model_type.startswith("timm")
        named = part.get("backbone") is not None or (part is not fields and "architecture" in part)
        if timm or named or "model_args" in part:
            reason = "config.json names a part of it that transformers or timm may fetch from the network"
            raise unsupported(name, reason)


def _parts(value: object) -> Iterator[Mapping[str, Any]]:
    """Every object of a configuration, however deep."""
    if isinstance(value, dict):
        yield value
    for inside in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _parts(inside)


def _check_kind(name: str, model_class: Any, config: Any) -> None:
    inner = config.get_text_config(decoder=True)
    others = set(getattr(inner, "layer_types", None) or ()) - set(_LAYER_TYPES)
    reason = None
    if getattr(model_class, "_is_stateful", False):
        reason = "some of its layers keep a recurrent state, which the KV cache has no place for yet"
    elif others:
        reason = f"it has layers of type {', '.join(map(repr, sorted(others)))}, and only attention is served"
    elif not model_class._can_set_attn_implementation():
        reason = "its attention does not go through transformers' attention interface"
    if reason is not None:
        raise unsupported(name, reason)


def unsupported(name: str, reason: str) -> UnsupportedModel:
    return UnsupportedModel(f"{name} cannot be served by transformers with paged attention: {reason}.", param="model")
