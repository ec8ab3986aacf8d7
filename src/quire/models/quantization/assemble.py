"""Quantised weights from the tensors that a checkpoint stores them in (see `storage`).

Legend: n output features, k input features, g groups of input features.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from quire.core.errors import BadValue
from quire.models.quantization.scheme import Scheme
from quire.models.quantization.storage import Awq, Gptq, PackedBytes, PackedNibbles, Storage, WholeBytes
from quire.ops.weight import Fp8Weight, Int4Weight, Int8Weight, QuantizedWeight, pack_nibbles, split

_AWQ_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)
"""Where each of eight neighbours lies in a word."""
_AWQ_COLUMNS = 256
"""Output features that are turned round at a time."""


def assemble(storage: Storage, scheme: Scheme, parts: Mapping[str, Tensor]) -> QuantizedWeight:
    """The weight of `parts` by suffix, whose types and shapes have been checked. Values stay where they lie if they
    lie as `quire.ops.weight` has them. Raises BadValue for input features in an order of their own."""
    match storage:
        case WholeBytes():
            values_nk = parts["weight"]
            scale_n = parts["weight_scale"].float().reshape(-1).expand(len(values_nk)).contiguous()
            if scheme.format == "fp8":
                return Fp8Weight(values_nk=values_nk, scale_n=scale_n, rounds_rows=scheme.rounds_rows)
            return Int8Weight(values_nk=values_nk, scale_n=scale_n)
        case PackedBytes():
            values_nk = (parts["weight_packed"].view(torch.uint8) ^ 128).view(torch.int8)
            return Int8Weight(values_nk=values_nk, scale_n=parts["weight_scale"].float().reshape(-1))
        case PackedNibbles():
            nibbles_nk2 = parts["weight_packed"].view(torch.uint8)
            scale_ng = parts["weight_scale"].float()
            words = parts.get("weight_zero_point")
            zero_ng = None if words is None else _unpack_words(words.t()).t()[: len(scale_ng)]
        case Gptq():
            _check_order(parts["g_idx"], storage.group_size)
            nibbles_nk2 = parts["qweight"].t().contiguous().view(torch.uint8)
            scale_ng = parts["scales"].float().t()
            zero_ng = _unpack_words(parts["qzeros"]).t()
            if not storage.exact_zero:
                zero_ng = (zero_ng + 1) & 15
        case Awq():
            nibbles_nk2 = _turn_round(parts["qweight"])
            scale_ng = parts["scales"].float().t()
            zero_ng = _in_order(_unpack_words(parts["qzeros"])).t()
    if zero_ng is not None and bool((zero_ng == 8).all()):
        zero_ng = None
    repeats = 2 * nibbles_nk2.shape[1] // scheme.group_size // scale_ng.shape[1]
    weight = Int4Weight(
        nibbles_nk2=nibbles_nk2,
        scale_ng=scale_ng.repeat_interleave(repeats, dim=1).contiguous(),
        zero_ng=None if zero_ng is None else zero_ng.repeat_interleave(repeats, dim=1).contiguous(),
        group_size=scheme.group_size,
    )
    return split(weight)


def _unpack_words(words_rc: Tensor) -> Tensor:
    """uint8 `[r, 8 c]`: the eight nibbles of each int32, low bits first."""
    octets = words_rc.contiguous().view(torch.uint8)
    return torch.stack((octets & 15, octets >> 4), dim=-1).flatten(-2)


def _in_order(values_rn: Tensor) -> Tensor:
    """AWQ's nibbles as they count."""
    return values_rn.view(len(values_rn), -1, 8)[:, :, list(_AWQ_PLACES)].flatten(1)


def _turn_round(words_kc: Tensor) -> Tensor:
    """AWQ's `[k, n / 8]` int32 to uint8 `[n, k / 2]`, some columns at a time."""
    k, columns = words_kc.shape
    nibbles_nk2 = torch.empty(8 * columns, k // 2, dtype=torch.uint8)
    step = _AWQ_COLUMNS // 8
    for first in range(0, columns, step):
        values_km = _in_order(_unpack_words(words_kc[:, first : first + step]))
        nibbles_nk2[8 * first : 8 * (first + step)] = pack_nibbles(values_km.t())
    return nibbles_nk2


def _check_order(group_of_k: Tensor, group_size: int) -> None:
    k = len(group_of_k)
    expected = torch.arange(k, dtype=torch.int32) // (group_size or k)
    if not torch.equal(group_of_k, expected):
        raise BadValue(
            "g_idx puts input features into groups in an order of its own (act-order), which is not supported.",
            param="model",
            remedy="Take a checkpoint that was made with desc_act false.",
        )
