"""The layer stack in compiled code (`csrc/stack`)."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

from quire.ops.cpu.attention import KV_FORMATS
from quire.ops.cpu.library import kernels_module
from quire.ops.stack import Stack, StackDescription, StackInputs, StackLayer, StackLinear
from quire.ops.target import Target


class CpuStack:
    """Keeps what the compiled stack points to."""

    reads_lengths = False

    def __init__(self, target: Target, description: StackDescription) -> None:
        module = kernels_module()
        assert module is not None
        shape = description.attention
        self._description = description
        self._kv_dtype = target.kv_dtype
        self._hidden = description.embedding.shape[1]
        self._stack: Any = module.Stack(
            target.cpu,
            hidden=self._hidden,
            inner=description.layers[0].gate.weight.n,
            num_heads=shape.num_heads,
            num_kv_heads=shape.num_kv_heads,
            head_dim=shape.head_dim,
            rope_half=description.cos.shape[1],
            eps=description.eps,
            scale=shape.scale,
            embedding=description.embedding.data_ptr(),
            norm=description.norm.data_ptr(),
            cos=description.cos.data_ptr(),
            sin=description.sin.data_ptr(),
        )
        for layer in description.layers:
            self._stack.add_layer(
                attention_norm=layer.attention_norm.data_ptr(),
                q=_linear(layer.q),
                k=_linear(layer.k),
                v=_linear(layer.v),
                o=_linear(layer.o),
                q_norm=_address(layer.q_norm),
                k_norm=_address(layer.k_norm),
                mlp_norm=layer.mlp_norm.data_ptr(),
                gate=_linear(layer.gate),
                up=_linear(layer.up),
                down=_linear(layer.down),
            )

    def __call__(self, inputs: StackInputs) -> Tensor:
        requests, shape = inputs.requests, self._description.attention
        num_rows = inputs.rows_s.shape[0]
        out_se = torch.empty(num_rows, self._hidden, dtype=torch.bfloat16)
        kv = inputs.kv
        self._stack.forward(
            token_ids=inputs.token_ids_t.data_ptr(),
            positions=inputs.positions_t.data_ptr(),
            slots=inputs.slots_t.data_ptr(),
            t=inputs.token_ids_t.shape[0],
            rows=inputs.rows_s.data_ptr(),
            s=num_rows,
            query_start=requests.query_start,
            context_lens=requests.context_lens,
            block_table=requests.block_table_rb.data_ptr(),
            table_stride=requests.block_table_rb.stride(0),
            keys=kv.data_ptr(),
            values=kv.data_ptr() + kv.stride(1) * kv.itemsize,
            layer_bytes=kv.stride(0) * kv.itemsize,
            num_blocks=kv.shape[3],
            block_size=requests.block_size,
            kv_format=KV_FORMATS[self._kv_dtype],
            num_kv_heads=shape.num_kv_heads,
            head_dim=shape.head_dim,
            out=out_se.data_ptr(),
        )
        return out_se


def build_stack(target: Target, description: StackDescription) -> Stack | None:
    """None where gate and up take different forms of a row, which the fused activation cannot."""
    if any(layer.gate.weight.row_form != layer.up.weight.row_form for layer in description.layers):
        return None
    _check(description)
    return CpuStack(target, description)


def _check(description: StackDescription) -> None:
    tensors = [description.embedding, description.norm, *itertools.chain(*map(_tensors, description.layers))]
    assert all(tensor.is_contiguous() and tensor.dtype == torch.bfloat16 for tensor in tensors)
    assert description.cos.is_contiguous()
    assert description.sin.is_contiguous()


def _tensors(layer: StackLayer) -> list[Tensor]:
    linears = (layer.q, layer.k, layer.v, layer.o, layer.gate, layer.up, layer.down)
    tensors = (layer.attention_norm, layer.mlp_norm, layer.q_norm, layer.k_norm, *(linear.bias for linear in linears))
    return [tensor for tensor in tensors if tensor is not None]


def _linear(linear: StackLinear) -> tuple[Any, int]:
    return linear.weight, _address(linear.bias)


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
