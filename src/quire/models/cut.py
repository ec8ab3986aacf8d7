"""Takes a parameter out of the tensor that a checkpoint keeps it in."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from quire.models.family import Cut
from quire.ops.weight import Fp8Weight, Int4Weight, Int8Weight, Weight, split


def cut_out(tensor: Tensor, cut: Cut | None) -> Tensor:
    """A view where rows lie together already."""
    if cut is None:
        return tensor
    tensor = tensor.reshape(cut.shape)
    if cut.expert is not None:
        tensor = tensor[cut.expert]
    return _take(tensor.T if cut.transposed else tensor, cut)


def cut_rows(weight: Weight, cut: Cut | None) -> Weight:
    """The same for a quantised weight, which keeps what belongs to a row in the row."""
    if cut is None:
        return weight
    match weight:
        case Int8Weight() | Fp8Weight():
            return replace(weight, values_nk=_take(weight.values_nk, cut), scale_n=_take(weight.scale_n, cut))
        case Int4Weight():
            zero = None if weight.zero_ng is None else _take(weight.zero_ng, cut)
            scale, nibbles = _take(weight.scale_ng, cut), _take(weight.nibbles_nk2, cut)
            return split(replace(weight, nibbles_nk2=nibbles, scale_ng=scale, zero_ng=zero, split_scales=None))
        case _:
            return cut_out(weight, cut)


def _take(tensor: Tensor, cut: Cut) -> Tensor:
    rest = tensor.shape[1:]
    taken = tensor.reshape(cut.groups, -1, *rest)[:, cut.start : cut.stop]
    taken = taken[0] if cut.groups == 1 else taken.reshape(-1, *rest)
    if not cut.rotary_dim:
        return taken
    heads = taken.reshape(-1, cut.head_dim, *rest)
    paired = torch.cat([heads[:, 0 : cut.rotary_dim : 2], heads[:, 1 : cut.rotary_dim : 2]], dim=1)
    return torch.cat([paired, heads[:, cut.rotary_dim :]], dim=1).reshape(-1, *rest)
