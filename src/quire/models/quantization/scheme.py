"""Which format a linear layer's weight runs in, and what it takes there. No torch: `quire plan` reads this too."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from quire.config.engine import Quantization
from quire.ops.spans import span_of

Format = Literal["int8", "int4", "fp8"]
FP8_DYNAMIC: Quantization = "fp8_dynamic"
"""Asked for: fp8, by rows that are rounded to 8-bit floats too."""
GROUP_SIZES = (32, 64, 128)
"""Of int4: input features that share a scale."""
DEFAULT_GROUP_SIZE = 32
"""The smallest: the least error, for 4.5 bits a weight where 128 takes 4.125 (with 16-bit scales)."""

_HEAD = "head.weight"
_SCALE_BYTES = 4
_SMALL = (
    ".router.weight",
    ".shared_gate.weight",
    ".index.weights.weight",
    ".predictor.weight",
    ".corrector.weight",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Scheme:
    """A format of `quire.ops.weight`. `group_size` and `zero_point` are int4's alone, `rounds_rows` is fp8's."""

    format: Format
    group_size: int = 0
    zero_point: bool = False
    rounds_rows: bool = False

    def nbytes(self, shape: tuple[int, ...], *, narrow: bool = False) -> int:
        """Bytes of a weight `[n, k]` in this format, with its scales. `narrow`: as the compiled kernels keep what is
        rounded here, for int4 a byte for a group's multiplier and two for a span's step."""
        n, k = shape
        if self.format != "int4":
            return n * k + n * _SCALE_BYTES
        groups, span = n * (k // self.group_size), span_of(k, self.group_size)
        if narrow and not self.zero_point:
            return n * k // 2 + (groups + 2 * n * (k // span) if span else 2 * groups)
        return n * k // 2 + groups * (_SCALE_BYTES + self.zero_point)


def is_linear(parameter: str, shape: tuple[int, ...]) -> bool:
    """Whether a parameter is a linear layer's weight: a matrix that is multiplied by, not looked up in.

    A router is none: it is small, decides between experts, and stays as it is in quantised checkpoints too; so are an
    index's weights, which decide between tokens, and what mixes a few streams. Nor are the products that take queries
    to latents and back: they stand for a layer of the checkpoint that is never multiplied.
    """
    if len(shape) != 2 or parameter.endswith(_SMALL) or is_absorbed(parameter):
        return False
    return parameter.endswith(".weight") and not parameter.startswith(("embedding.", "pooling."))


def is_absorbed(parameter: str) -> bool:
    """Whether a parameter is a head's share of latent attention's layer from latents to keys and values."""
    return ".attention.k_up." in parameter or ".attention.v_up." in parameter


def rounded_scheme(
    asked: Quantization, parameter: str, shape: tuple[int, ...], group_size: int = DEFAULT_GROUP_SIZE
) -> Scheme | None:
    """The format that a parameter of an unquantised checkpoint takes when `asked` is asked for; None: it stays.

    The output head decides between tokens directly, and gets 8 bits where the other layers get 4. Of fp8, whose
    arithmetic is no cheaper than bfloat16's, it is left out. A row that does not divide into groups takes int8.
    """
    if not is_linear(parameter, shape) or (parameter == _HEAD and asked in ("fp8", FP8_DYNAMIC)):
        return None
    if asked == "fp8_dynamic":
        return Scheme(format="fp8", rounds_rows=True)
    if asked == "int4" and (parameter == _HEAD or shape[1] % group_size):
        return Scheme(format="int8")
    return Scheme(format=asked, group_size=group_size if asked == "int4" else 0)
