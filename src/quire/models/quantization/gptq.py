"""GPTQ (Frantar et al., 2022, arXiv:2210.17323): rounding that makes up for its own errors.

Columns are rounded one after the other; what a column's rounding changes in the layer's output, for inputs like those
that were seen, the columns that are not rounded yet take back as well as they can. Columns with the largest inputs come
first ("act order"), while groups and scales are those of the original order, so that the result is stored as any other.

Legend: n output features, k input features, g groups, j features of a group, b columns of a block.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quire.core.errors import BadValue
from quire.models.quantization.rounding import int4_scales, inverse, pack_offset_nibbles, round_scale
from quire.models.quantization.scheme import Scheme
from quire.ops.weight import Int4Weight, Int8Weight, QuantizedWeight, split

_BLOCK = 128
_DAMPING = (0.01, 0.1, 1.0)
"""Shares of the mean input energy that are added to every feature's own: the next if the one before does not do."""
_SCALE_STEPS = tuple(step / 20 for step in range(14, 23))
"""Scales that are tried, as shares of the one that reaches the largest magnitude."""


def gptq(weight_nk: Tensor, energy_kk: Tensor, scheme: Scheme) -> QuantizedWeight:
    """`weight_nk` rounded to `scheme`, int8 or int4, for inputs x with the mean of `x x^T` that `energy_kk` gives.

    Raises BadValue if no damping makes that matrix invertible, as when inputs were not finite.
    """
    assert scheme.format != "fp8"
    k = weight_nk.shape[1]
    low, high = (-8, 7) if scheme.format == "int4" else (-127, 127)
    group_size = scheme.group_size if scheme.format == "int4" else k
    weight_nk = weight_nk.float()
    scale_ng = search_scales(weight_nk, energy_kk.diagonal(), group_size, low, high)
    if scheme.format == "int4":
        scale_ng = int4_scales(scale_ng, group_size)
    order_k = energy_kk.diagonal().argsort(descending=True, stable=True)
    upper_kk = _inverse_factor(energy_kk[order_k][:, order_k])
    scale_kn = scale_ng.T[order_k // group_size].contiguous()
    values_kn = _round_columns(weight_nk.T[order_k].contiguous(), upper_kk, scale_kn, low, high)
    values_nk = torch.empty(len(weight_nk), k).index_copy_(1, order_k, values_kn.T)
    if scheme.format == "int8":
        return Int8Weight(values_nk=values_nk.to(torch.int8), scale_n=scale_ng[:, 0].contiguous())
    nibbles = pack_offset_nibbles(values_nk)
    return split(Int4Weight(nibbles_nk2=nibbles, scale_ng=scale_ng, zero_ng=None, group_size=group_size))


def search_scales(weight_nk: Tensor, energy_k: Tensor, group_size: int, low: int, high: int) -> Tensor:
    """`[n, g]`: for each group the scale, of those that are tried, whose rounding errors weigh least, each by the
    energy of its input feature. Of both signs where the range has one end longer than the other."""
    groups_ngj = weight_nk.view(len(weight_nk), -1, group_size)
    energy_gj = energy_k.float().view(-1, group_size)
    largest_ng = groups_ngj.abs().amax(-1)
    best_ng = torch.zeros_like(largest_ng)
    least_ng = torch.full_like(largest_ng, torch.inf)
    for sign in (1, -1) if -low != high else (1,):
        for share in _SCALE_STEPS:
            scale_ng = round_scale(largest_ng * (sign * share / max(-low, high)))
            values_ngj = (groups_ngj * inverse(scale_ng)[..., None]).round_().clamp_(low, high)
            error_ngj = values_ngj.mul_(scale_ng[..., None]).sub_(groups_ngj).square_()
            error_ng = torch.einsum("ngj,gj->ng", error_ngj, energy_gj)
            better_ng = error_ng < least_ng
            least_ng = torch.where(better_ng, error_ng, least_ng)
            best_ng = torch.where(better_ng, scale_ng, best_ng)
    return best_ng


def _inverse_factor(energy_kk: Tensor) -> Tensor:
    """U, upper triangular, with U^T U the inverse of the damped matrix."""
    diagonal_k = energy_kk.diagonal()
    unseen_k = diagonal_k == 0  # features that were always zero: rounded for themselves
    for share in _DAMPING:
        damped_kk = energy_kk.clone()
        damped_kk.diagonal().add_(share * diagonal_k.mean() + unseen_k.float())
        lower_kk, failed = torch.linalg.cholesky_ex(damped_kk)
        if failed:
            continue
        upper_kk: Tensor
        upper_kk, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower_kk), upper=True)
        if not failed and bool(torch.isfinite(upper_kk).all()):
            return upper_kk
    raise BadValue(
        "The calibration's inputs of a layer cannot be used: their covariance has no inverse, or is not finite.",
        param="calibration",
        remedy="Calibrate with another text, or use method rtn.",
    )


def _round_columns(weight_kn: Tensor, upper_kk: Tensor, scale_kn: Tensor, low: int, high: int) -> Tensor:
    """Whole numbers, in float32. A column of the weight is a row here, for the cache. `weight_kn` is overwritten."""
    k = len(weight_kn)
    values_kn = torch.empty_like(weight_kn)
    inverse_kn = inverse(scale_kn)
    for first in range(0, k, _BLOCK):
        last = min(first + _BLOCK, k)
        errors_bn = torch.empty_like(weight_kn[first:last])
        for at in range(first, last):
            torch.mul(weight_kn[at], inverse_kn[at], out=values_kn[at]).round_().clamp_(low, high)
            error_n = errors_bn[at - first]
            torch.addcmul(weight_kn[at], values_kn[at], scale_kn[at], value=-1, out=error_n).div_(upper_kk[at, at])
            weight_kn[at + 1 : last].addr_(upper_kk[at, at + 1 : last], error_n, alpha=-1)
        weight_kn[last:].addmm_(upper_kk[first:last, last:].T, errors_bn, alpha=-1)
    return values_kn
