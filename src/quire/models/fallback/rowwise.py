"""Quire's linear layers and activations in the place of torch's, whose bits depend on how many rows they are given.

Legend: t rows, k features in, n features out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from quire.models.fallback.attention import Unfit
from quire.nn.layers import Linear
from quire.ops.activation import activation
from quire.ops.kernels import Kernels

_BY_A_MATRIX: tuple[Callable[..., Tensor], ...] = (
    torch.matmul,
    Tensor.matmul,
    Tensor.__matmul__,
    torch.mm,
    Tensor.mm,
)
_PRODUCTS: tuple[Callable[..., Tensor], ...] = (
    Tensor.__rmatmul__,
    torch.bmm,
    Tensor.bmm,
    torch.mv,
    Tensor.mv,
    torch.addmm,
    Tensor.addmm,
    torch.baddbmm,
    Tensor.baddbmm,
    torch.einsum,
    torch.tensordot,
    functional.bilinear,
)


class LinearModule(nn.Module):
    """Takes an `nn.Linear`'s place in a tree of modules. `wide`: gives float32, see `Linear.wide`."""

    def __init__(self, weight_nk: Tensor, bias_n: Tensor | None, kernels: Kernels, *, wide: bool) -> None:
        super().__init__()
        self.out_features, self.in_features = weight_nk.shape
        self.linear = Linear(weight_nk, bias_n, kernels)
        # For code that asks for its dtype or shape: there are no values to compute with.
        self.weight = torch.empty_like(weight_nk, device="meta")
        self.wide = wide

    def forward(self, x: Tensor) -> Tensor:
        rows_tk = x.reshape(-1, self.in_features)
        y_tn = self.linear.wide(rows_tk) if self.wide else self.linear(rows_tk)
        return y_tn.view(*x.shape[:-1], self.out_features)


def replace_linears(model: nn.Module, kernels: Kernels) -> None:
    """In place, each packed before the next. Modules that look into their linear layers keep torch's."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    replaced: dict[int, LinearModule] = {}
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if id(child) not in replaced:
                made = _replacement(child, kernels, wide=child is head)
                if made is None:
                    continue
                replaced[id(child)] = made
            setattr(parent, name, replaced[id(child)])


def _replacement(module: nn.Module, kernels: Kernels, *, wide: bool) -> LinearModule | None:
    if type(module) is nn.Linear:
        weight_nk = module.weight.data
    elif type(module).__name__ == "Conv1D" and isinstance(getattr(module, "nf", None), int):
        assert isinstance(module.weight, Tensor)
        weight_nk = module.weight.data.T.contiguous()  # transformers' own class, whose weight is [k, n]
    else:
        return None
    bias = module.bias
    assert bias is None or isinstance(bias, Tensor)
    return LinearModule(weight_nk, None if bias is None else bias.data, kernels, wide=wide)


class Rowwise(TorchFunctionMode):
    """Within it, what torch computes differently for other numbers of rows goes another way: `functional.linear`, which
    routers and experts call with parameters of their own, and products of rows by a matrix, to quire's kernels;
    activations, whose last few elements torch rounds differently from the others, to quire's. Other products with the
    model's parameters raise Unfit: torch adds their terms in an order that depends on the number of rows.

    Matrices of the model, and parts of them, are packed when they are first met; any other is packed for the call.
    """

    def __init__(self, model: nn.Module, kernels_of: Mapping[torch.dtype, Kernels]) -> None:
        super().__init__()
        self._kernels_of = kernels_of
        # They live as long as the model, so no other tensor can come to lie there.
        self._own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        self._packed: dict[tuple[int, torch.Size, tuple[int, ...], torch.dtype], Linear] = {}
        modules = [module for module in model.modules() if isinstance(module, LinearModule)]
        self._served = {
            module.linear.weight.data_ptr() for module in modules if isinstance(module.linear.weight, Tensor)
        }
        self._functions: Mapping[Any, Callable[..., Tensor]] = {
            functional.linear: self._linear,
            functional.silu: self._silu,
            functional.gelu: self._gelu,
            torch.sigmoid: _sigmoid,
            Tensor.sigmoid: _sigmoid,
            functional.sigmoid: _sigmoid,
            functional.softplus: _softplus,
            **{product: partial(self._by_matrix, product) for product in _BY_A_MATRIX},
            **{product: partial(self._product, product) for product in _PRODUCTS},
        }

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self._functions.get(func, func)(*args, **(kwargs or {}))

    def _linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:  # noqa: A002
        is_kernel_itself = weight.data_ptr() in self._served
        served = weight.ndim == 2 and weight.dtype == input.dtype and input.dtype in self._kernels_of
        if is_kernel_itself or not served:
            return functional.linear(input, weight, bias)
        y_tn = self._linear_of(weight)(input.reshape(-1, input.shape[-1]))
        y = y_tn.view(*input.shape[:-1], weight.shape[0])
        return y if bias is None else y + bias

    def _linear_of(self, weight: Tensor) -> Linear:
        key = weight.data_ptr(), weight.shape, weight.stride(), weight.dtype
        found = self._packed.get(key)
        if found is None:
            found = Linear(weight.detach().contiguous(), None, self._kernels_of[weight.dtype])
            if self._is_own(weight):
                self._packed[key] = found
        return found

    def _by_matrix(self, product: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        if len(args) == 2 and not kwargs:
            rows, matrix_kn = args
            if self._is_own(matrix_kn) and not self._is_own(rows) and matrix_kn.ndim == 2 and rows.ndim > 1:
                return self._linear(rows, matrix_kn.T)
        return self._product(product, *args, **kwargs)

    def _product(self, product: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        for operand in _tensors((*args, *kwargs.values())):
            if self._is_own(operand):
                name = getattr(product, "__name__", "a product")
                raise Unfit(f"its code multiplies by a parameter with {name}, whose bits depend on the number of rows")
        return product(*args, **kwargs)

    def _is_own(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage().data_ptr() in self._own

    def _silu(self, input: Tensor, inplace: bool = False) -> Tensor:  # noqa: A002, ARG002
        return self._activation(input, "silu")

    def _gelu(self, input: Tensor, approximate: str = "none") -> Tensor:  # noqa: A002
        return self._activation(input, "gelu_tanh" if approximate == "tanh" else "gelu")

    def _activation(self, x: Tensor, name: str) -> Tensor:
        kernels = self._kernels_of.get(x.dtype)
        return activation(x, name) if kernels is None else kernels.activation(x.contiguous(), name)


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)


def _softplus(input: Tensor, beta: float = 1, threshold: float = 20) -> Tensor:  # noqa: A002
    wide = input.float()
    scaled = wide * beta
    soft = (scaled.clamp(min=0) + scaled.abs().neg().exp().log1p()) / beta
    return torch.where(scaled > threshold, wide, soft).to(input.dtype)


def _sigmoid(input: Tensor) -> Tensor:  # noqa: A002
    return (1.0 / (input.float().neg().exp() + 1.0)).to(input.dtype)
