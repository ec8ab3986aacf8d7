"""Fused kernels: the bits of the ops that they stand for."""

from __future__ import annotations

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from quire.ops.activation import gated_activation
from quire.ops.kernels import select
from quire.ops.op import random_tensor
from quire.ops.reference.attention import ReferenceAttention
from quire.ops.target import Target
from quire.ops.triton.library import TRITON, is_installed

if not is_installed():
    pytest.skip("Triton is not installed", allow_module_level=True)

from quire.ops.triton.fused import HeadNorms, RotaryTable, TritonFused

FORMATS = [
    (torch.bfloat16, "auto"),
    (torch.float16, "auto"),
    (torch.float32, "auto"),
    (torch.float32, "bf16"),
    (torch.bfloat16, "int8"),
    (torch.bfloat16, "fp8"),
]


@pytest.mark.parametrize(("dtype", "kv_cache_dtype"), FORMATS)
@settings(max_examples=6, deadline=None, phases=[Phase.generate])  # interpreted: too slow to make failures small
@given(data=st.data(), seed=st.integers(0, 2**32))
def test_qkv_is_norm_then_rope_then_write(
    dtype: torch.dtype, kv_cache_dtype: str, data: st.DataObject, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    d, half = data.draw(st.sampled_from([(64, 32), (128, 64), (80, 16), (21, 9)]), label="head")
    t, g, group = (data.draw(st.integers(1, most), label=name) for name, most in (("t", 5), ("g", 3), ("group", 4)))
    h, s, blocks = g * group, 8, 4
    target = Target("cpu", dtype, isa=TRITON, kv_cache_dtype=kv_cache_dtype)
    ops, reference = select(target), ReferenceAttention(target)

    joint = random_tensor(t, h + 2 * g, d, dtype=dtype, generator=generator, scale=3.0)
    if data.draw(st.booleans(), label="values that are not finite"):
        joint[0, h + g, 0], joint[t - 1, h, d - 1] = torch.inf, torch.nan
    q, k, v = joint.split([h, g, g], dim=1)
    norms = None
    if data.draw(st.booleans(), label="normed"):
        weights = random_tensor(2, d, dtype=dtype, generator=generator)
        offset = data.draw(st.sampled_from([0.0, 1.0]), label="offset")
        norms = HeadNorms(q_weight=weights[0], k_weight=weights[1], eps=1e-6, weight_offset=offset)
    angle = random_tensor(50, half, dtype=torch.float32, generator=generator, scale=10.0)
    rotary = RotaryTable(cos_pr=angle.cos(), sin_pr=angle.sin())
    positions = torch.randint(0, 50, (t,), generator=generator)
    slots = torch.randperm((blocks - 1) * s, generator=generator)[:t] + s
    caches = torch.zeros(2, 3, 2, g, blocks, reference.block_bytes(s, d), dtype=torch.uint8)

    kept = slots.clone()
    if t > 1 and data.draw(st.booleans(), label="a token is not written"):
        slots[0] = -1
        kept[0] = 0
    found = TritonFused(target).qkv(
        q, k, v, norms=norms, rotary=rotary, positions_t=positions, slots_t=slots, kv_layer=caches[0, 1]
    )
    if norms is not None:
        q = ops.rms_norm(q, norms.q_weight, norms.eps, norms.weight_offset)
        k = ops.rms_norm(k, norms.k_weight, norms.eps, norms.weight_offset)
    table = (rotary.cos_pr[positions], rotary.sin_pr[positions])
    reference.write(caches[1, 1], ops.rope(k, *table), v, kept)
    expected = ops.rope(q, *table)
    # All NaNs are one here: in the cache only bytes that were NaN on the way may differ.
    assert torch.equal(found.nan_to_num(), expected.nan_to_num())
    stored = {"int8": torch.float32, "fp8": torch.float32}.get(kv_cache_dtype, getattr(torch, target.kv_dtype))
    wide = [cache[:, :, :, 1:].view(stored).nan_to_num() for cache in caches]
    assert torch.equal(wide[0].view(torch.uint8), wide[1].view(torch.uint8))


def test_silu_mul_is_gated_activation() -> None:
    generator = torch.Generator().manual_seed(0)
    x = random_tensor(5, 2 * 136, dtype=torch.bfloat16, generator=generator)
    target = Target("cpu", torch.bfloat16, isa=TRITON)
    gate, up = x.chunk(2, dim=-1)
    found = TritonFused(target).silu_mul(x)
    assert torch.equal(found, select(target).gated_activation(gate.contiguous(), up.contiguous(), "silu"))
    torch.testing.assert_close(found, gated_activation(gate, up, "silu"), rtol=1e-2, atol=1e-3)
