"""How checkpoints store a quantised weight `[n, k]`: which tensors, of which types and shapes. No torch here.

The layouts are those that the tools of the hub write: compressed-tensors (three of its formats), AutoGPTQ, AutoAWQ.
`assemble` makes weights of them.

Legend: n output features, k input features, g groups of input features.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from quire.core.errors import BadValue
from quire.models.quantization.scheme import GROUP_SIZES, Scheme

SCALE_DTYPES = ("BF16", "F16", "F32")
_Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Part:
    """One tensor of a layer: `suffix` follows the layer's name and a dot; any of the types and shapes will do."""

    suffix: str
    dtypes: tuple[str, ...]
    shapes: tuple[_Shape, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class WholeBytes:
    """compressed-tensors' int-quantized and float-quantized: `[n, k]` of one byte each, and a scale per output feature
    or a single one."""

    ignored: ClassVar[tuple[str, ...]] = ("input_scale", "input_zero_point", "weight_zero_point")
    refused: ClassVar[tuple[str, ...]] = ("weight_g_idx",)

    is_float: bool

    def scheme(self, _shape: _Shape, _what: str) -> Scheme:
        return Scheme(format="fp8" if self.is_float else "int8")

    def parts(self, shape: _Shape) -> tuple[Part, ...]:
        n, _ = shape
        return (
            Part("weight", ("F8_E4M3",) if self.is_float else ("I8",), (shape,)),
            Part("weight_scale", SCALE_DTYPES, ((n, 1), (n,), (1,), (1, 1), ())),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedBytes:
    """compressed-tensors' pack-quantized with 8 bits: four values + 128 to an int32, a scale per output feature."""

    ignored: ClassVar[tuple[str, ...]] = ("weight_shape", "input_scale")
    refused: ClassVar[tuple[str, ...]] = ("weight_g_idx", "weight_zero_point")

    def scheme(self, shape: _Shape, what: str) -> Scheme:
        if shape[1] % 4:
            raise BadValue(f"{what} have rows of {shape[1]}, which do not fill whole words.", param="model")
        return Scheme(format="int8")

    def parts(self, shape: _Shape) -> tuple[Part, ...]:
        n, k = shape
        return (
            Part("weight_packed", ("I32",), ((n, k // 4),)),
            Part("weight_scale", SCALE_DTYPES, ((n, 1), (n,))),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedNibbles:
    """compressed-tensors' pack-quantized with 4 bits: eight values + 8 to an int32, low bits first, along k; zero
    points the same, along n. `group_size` 0: one group as long as the row."""

    ignored: ClassVar[tuple[str, ...]] = ("weight_shape", "input_scale")
    refused: ClassVar[tuple[str, ...]] = ("weight_g_idx",)

    group_size: int
    zero_point: bool

    def scheme(self, shape: _Shape, what: str) -> Scheme:
        return int4_scheme(self.group_size, self.zero_point, shape, what)

    def parts(self, shape: _Shape) -> tuple[Part, ...]:
        n, k = shape
        g = k // self.group_size if self.group_size else 1
        parts = [
            Part("weight_packed", ("I32",), ((n, k // 8),)),
            Part("weight_scale", SCALE_DTYPES, ((n, g),)),
        ]
        if self.zero_point:
            parts.append(Part("weight_zero_point", ("I32",), ((-(-n // 8), g),)))
        return tuple(parts)


@dataclass(frozen=True, slots=True, kw_only=True)
class Gptq:
    """AutoGPTQ's: eight values to an int32, low bits first, along k of a transposed weight; zero points along n, each
    less one unless `exact_zero` (its "gptq_v2")."""

    ignored: ClassVar[tuple[str, ...]] = ()
    refused: ClassVar[tuple[str, ...]] = ()

    group_size: int
    symmetric: bool
    exact_zero: bool

    def scheme(self, shape: _Shape, what: str) -> Scheme:
        if shape[0] % 8:
            raise BadValue(f"{what} have {shape[0]} output features, not a multiple of 8.", param="model")
        return int4_scheme(self.group_size, not self.symmetric, shape, what)

    def parts(self, shape: _Shape) -> tuple[Part, ...]:
        n, k = shape
        g = k // self.group_size if self.group_size else 1
        return (
            Part("qweight", ("I32",), ((k // 8, n),)),
            Part("qzeros", ("I32",), ((g, n // 8),)),
            Part("scales", SCALE_DTYPES, ((g, n),)),
            Part("g_idx", ("I32",), ((k,),)),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Awq:
    """AutoAWQ's "gemm": eight values to an int32 along n of a transposed weight, in the order 0 2 4 6 1 3 5 7; zero
    points the same."""

    ignored: ClassVar[tuple[str, ...]] = ()
    refused: ClassVar[tuple[str, ...]] = ()

    group_size: int

    def scheme(self, shape: _Shape, what: str) -> Scheme:
        if shape[0] % 8:
            raise BadValue(f"{what} have {shape[0]} output features, not a multiple of 8.", param="model")
        return int4_scheme(self.group_size, True, shape, what)

    def parts(self, shape: _Shape) -> tuple[Part, ...]:
        n, k = shape
        g = k // self.group_size if self.group_size else 1
        return (
            Part("qweight", ("I32",), ((k, n // 8),)),
            Part("qzeros", ("I32",), ((g, n // 8),)),
            Part("scales", SCALE_DTYPES, ((g, n),)),
        )


def mxfp4_parts(shape: _Shape) -> tuple[Part, Part]:
    """Of a stack of experts `[experts, k, n]`: in blocks of 32 along k, which comes last here."""
    experts, k, n = shape
    return (
        Part("_blocks", ("U8",), ((experts, n, k // 32, 16),)),
        Part("_scales", ("U8",), ((experts, n, k // 32),)),
    )


Storage = WholeBytes | PackedBytes | PackedNibbles | Gptq | Awq


def int4_scheme(group_size: int, zero_point: bool, shape: _Shape, what: str) -> Scheme:
    """Groups as stored; a single group is cut into equal ones, of the same scale, that the kernels know."""
    k = shape[1]
    sizes = [size for size in reversed(GROUP_SIZES) if k % size == 0]
    if not sizes or (group_size and group_size not in sizes):
        raise BadValue(
            f"{what} are in groups of {group_size or k} of {k} input features.",
            param="model",
            remedy=f"Groups of {', '.join(map(str, GROUP_SIZES))} that divide a row are supported.",
        )
    return Scheme(format="int4", group_size=group_size or sizes[0], zero_point=zero_point)
