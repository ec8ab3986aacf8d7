"""`quantization_config` of a checkpoint's config.json: which layers are stored how. No torch here.

What is supported: quant_method "compressed-tensors" (int-quantized, float-quantized, pack-quantized, and mixtures of
them), "gptq" and "awq" with 4 bits, "mxfp4" of experts. Whatever else, down to a single field, is refused by name.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from quire.models.model_config import ModelConfig
from quire.models.quantization.scheme import GROUP_SIZES
from quire.models.quantization.storage import Awq, Gptq, PackedBytes, PackedNibbles, Storage, WholeBytes

METHODS = ("compressed-tensors", "gptq", "awq", "mxfp4")
FORMATS = ("int-quantized", "float-quantized", "naive-quantized", "pack-quantized")

_HEAD = "lm_head"
_MAX_TARGETS = 10_000
_MAX_PATTERNS = 64
_MAX_PATTERN_LENGTH = 300
_MAX_REPEATS = 4

_Matches = Callable[[str], bool]


@dataclass(frozen=True, slots=True)
class StoredQuantization:
    """`storage_of` tells how a layer, by its name in the checkpoint, is stored: None for one that is plain."""

    method: str
    storage_of: Callable[[str], Storage | None]


def read_quantization(config: ModelConfig) -> StoredQuantization | None:
    """None for a checkpoint that is not quantised. Raises BadValue for what is not supported."""
    if "quantization_config" not in config:
        return None
    section = config.section("quantization_config")
    method = section.text("quant_method", "")
    match method:
        case "compressed-tensors":
            return StoredQuantization(method, _compressed_tensors(section))
        case "gptq":
            return StoredQuantization(method, _gptq(section))
        case "awq":
            return StoredQuantization(method, _awq(section))
        case "mxfp4":
            return StoredQuantization(method, lambda _layer: None)  # known by the names of its tensors
    raise section.fault("quant_method", method, f"one of {', '.join(METHODS)}: no other method is supported")


# --- compressed-tensors -------------------------------------------------------------------------------------


def _compressed_tensors(section: ModelConfig) -> Callable[[str], Storage | None]:
    if section.raw("transform_config"):
        raise section.fault("transform_config", section.raw("transform_config"), "absent: no transform is supported")
    sparsity = section.section("sparsity_config").text("format", "dense")
    if sparsity != "dense":
        raise section.fault("sparsity_config", sparsity, "'dense': sparse weights are not supported")
    ignored = _matcher(section, "ignore", _strings(section, "ignore"))
    groups = section.section("config_groups")
    found: list[tuple[Sequence[str], Storage]] = []
    for name in groups.names():
        group = groups.section(name)
        found.append((_strings(group, "targets"), _group(group, group.text("format", section.text("format", "")))))
    if not found:
        raise section.fault("config_groups", None, "an object of at least one group")
    # The most specific target decides: a layer's own name, then a pattern, then the class.
    exact = {target: storage for targets, storage in found for target in targets}
    patterns = [
        (_matcher(groups, "targets", [target]), storage)
        for targets, storage in found
        for target in targets
        if target.startswith("re:")
    ]

    def storage_of(layer: str) -> Storage | None:
        if ignored(layer):
            return None
        if layer in exact:
            return exact[layer]
        return next((storage for matches, storage in patterns if matches(layer)), exact.get("Linear"))

    return storage_of


def _group(group: ModelConfig, form: str) -> Storage:
    if form not in FORMATS:
        raise group.fault("format", form, f"one of {', '.join(FORMATS)}: no other format is supported")
    weights = group.section("weights")
    bits, kind = weights.integer("num_bits", 8), weights.text("type", "int")
    symmetric, strategy = weights.boolean("symmetric", True), weights.text("strategy", "")
    if not strategy:
        strategy = "group" if weights.raw("group_size") else "tensor"
    if weights.raw("actorder") == "group":
        raise weights.fault("actorder", "group", "absent or 'weight': reordered input features are not supported")
    _check_activations(group, kind)
    if form == "pack-quantized":
        return _packed(weights, bits, kind, symmetric, strategy)
    if bits != 8 or kind not in ("int", "float") or (form, kind) in (
        ("int-quantized", "float"),
        ("float-quantized", "int"),
    ):  # fmt: skip
        raise weights.fault("num_bits", f"{bits} of type {kind}", f"8, of the type that {form} stores")
    if not symmetric:
        raise weights.fault("symmetric", symmetric, "true: 8-bit weights with zero points are not supported")
    if strategy not in ("channel", "tensor"):
        raise weights.fault("strategy", strategy, "'channel' or 'tensor' for 8-bit weights")
    return WholeBytes(is_float=kind == "float")


def _packed(weights: ModelConfig, bits: int, kind: str, symmetric: bool, strategy: str) -> Storage:
    if kind != "int" or bits not in (4, 8):
        raise weights.fault("num_bits", f"{bits} of type {kind}", "4 or 8 of type int for pack-quantized")
    if bits == 8:
        if strategy != "channel" or not symmetric:
            raise weights.fault("strategy", strategy, "'channel', and symmetric, for pack-quantized with 8 bits")
        return PackedBytes()
    if strategy == "channel":
        return PackedNibbles(group_size=0, zero_point=not symmetric)
    if strategy != "group":
        raise weights.fault("strategy", strategy, "'group' or 'channel' for pack-quantized")
    return PackedNibbles(group_size=_group_size(weights, weights.raw("group_size")), zero_point=not symmetric)


def _check_activations(group: ModelConfig, kind: str) -> None:
    """Weights alone, or activations that are rounded as they come. Static scales of float activations do not matter:
    activations are not rounded there at all."""
    if group.raw("output_activations"):
        raise group.fault("output_activations", group.raw("output_activations"), "absent: they are not supported")
    if group.raw("input_activations") is None:
        return
    inputs = group.section("input_activations")
    found = inputs.text("type", "int"), inputs.integer("num_bits", 8)
    if found != (kind, 8):
        raise inputs.fault("num_bits", f"{found[1]} of type {found[0]}", f"8 of type {kind}")
    if kind == "int" and inputs.raw("dynamic") is not True:
        raise inputs.fault("dynamic", inputs.raw("dynamic"), "true: static scales of activations are not supported")


# --- GPTQ and AWQ -------------------------------------------------------------------------------------------


def _gptq(section: ModelConfig) -> Callable[[str], Storage | None]:
    _check_four_bits(section, "bits")
    if section.boolean("desc_act", False):
        raise section.fault("desc_act", True, "false: reordered input features (act-order) are not supported")
    if section.raw("dynamic"):
        raise section.fault("dynamic", section.raw("dynamic"), "absent: settings by layer are not supported")
    written = section.text("checkpoint_format", "gptq")
    if written not in ("gptq", "gptq_v2"):
        raise section.fault("checkpoint_format", written, "'gptq' or 'gptq_v2'")
    size = section.raw("group_size")
    storage = Gptq(
        group_size=0 if size == -1 else _group_size(section, size),
        symmetric=section.boolean("sym", True),
        exact_zero=written == "gptq_v2",
    )
    head = section.boolean("lm_head", False)
    return lambda layer: storage if head or layer != _HEAD else None


def _awq(section: ModelConfig) -> Callable[[str], Storage | None]:
    _check_four_bits(section, "w_bit" if "w_bit" in section else "bits")
    version = section.text("version", "gemm").lower()
    if version != "gemm":
        raise section.fault("version", version, "'gemm': no other layout of AWQ is supported")
    if not section.boolean("zero_point", True):
        raise section.fault("zero_point", False, "true for AWQ")
    size = section.raw("q_group_size" if "q_group_size" in section else "group_size")
    storage = Awq(group_size=0 if size == -1 else _group_size(section, size))
    plain = (_HEAD, *_strings(section, "modules_to_not_convert"))
    return lambda layer: None if any(name in layer for name in plain) else storage


def _check_four_bits(section: ModelConfig, name: str) -> None:
    if section.integer(name) != 4:
        raise section.fault(name, section.raw(name), "4: no other number of bits is supported here")


def _group_size(section: ModelConfig, size: Any) -> int:
    if size not in GROUP_SIZES or isinstance(size, bool):
        raise section.fault("group_size", size, f"one of {', '.join(map(str, GROUP_SIZES))}")
    return int(size)


# --- names of layers ----------------------------------------------------------------------------------------


def _strings(section: ModelConfig, name: str) -> list[str]:
    value = section.raw(name)
    if value is None:
        return []
    if not isinstance(value, list) or len(value) > _MAX_TARGETS or not all(isinstance(item, str) for item in value):
        raise section.fault(name, value, f"a list of at most {_MAX_TARGETS} strings")
    return value


def _matcher(section: ModelConfig, field: str, targets: Sequence[str]) -> _Matches:
    """Whether a layer is among `targets`: by name, by "re:" and a pattern that matches from its start, or by class."""
    names = frozenset(target for target in targets if not target.startswith("re:"))
    patterns = [_pattern(section, field, target.removeprefix("re:")) for target in targets if target not in names]
    if len(patterns) > _MAX_PATTERNS:
        raise section.fault(field, f"{len(patterns)} patterns", f"at most {_MAX_PATTERNS} patterns")
    return lambda layer: (
        layer in names or "Linear" in names or any(pattern.match(layer) is not None for pattern in patterns)
    )


def _pattern(section: ModelConfig, field: str, pattern: str) -> re.Pattern[str]:
    """A pattern whose time is bounded: few repeats, and none of a group, so that none is inside another."""
    plain = re.sub(r"\\.", "_", pattern)
    repeats = re.findall(r"[*+?{]", re.sub(r"\(\?:", "(", plain))
    nested = re.search(r"\)[*+?{]|\(\?[^:]", plain)
    backreference = re.search(r"\\[1-9]", pattern)
    if len(pattern) > _MAX_PATTERN_LENGTH or len(repeats) > _MAX_REPEATS or nested or backreference:
        raise section.fault(
            field, f"re:{pattern}", f"of patterns with at most {_MAX_REPEATS} repeats, none of them of a group"
        )
    try:
        return re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise section.fault(field, f"re:{pattern}", f"of valid patterns ({error})") from None
