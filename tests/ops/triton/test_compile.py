"""Kernels compiled for GPUs that are not here: in processes of their own, since Triton is interpreted in this one."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from quire.core.errors import ConfigError
from quire.ops.triton.implementations import implementations
from quire.ops.triton.library import is_installed

if not is_installed():
    pytest.skip("Triton is not installed", allow_module_level=True)

QUANTIZED = ("linear_fp8", "linear_fp8_rows", "linear_int4", "linear_int8")
SERVED = {implementation.op for implementation in implementations()}
PLAIN = ("draw", *sorted(SERVED - {"draw", *QUANTIZED}), "fused")
"""`draw` is first: it takes longest to compile, and is left out where it need not be compiled again."""

SPILLS = """
import torch, triton, triton.language as tl
from quire.ops.triton.compile_only import CompileOnly, table

@triton.jit
def transpose(x, y, N: tl.constexpr):
    i, j = tl.arange(0, N)[:, None], tl.arange(0, N)[None, :]
    tl.store(y + j * N + i, tl.load(x + i * N + j))

launch = CompileOnly("sm_90")
x = torch.empty(128 * 128)
for _ in range(2):
    launch(transpose, (1,), x, x, N=128, num_warps=1)
launch(transpose, (1,), x, x, N=32)
launch(transpose, (1,), x[1:], x, N=32)
print(table(launch.compiled))
print([one.fault is not None for one in launch.compiled])
"""


ATTENTION = """
import torch
from quire.ops.attention import AttentionShape, DeviceLengths, PagedRequests
from quire.ops.target import Target
from quire.ops.triton.attention import TritonAttention
from quire.ops.triton.compile_only import CompileOnly, table

launch = CompileOnly("sm_90")

def step(*query_lens, kv_dtype="fp8", rows=None, on_device=True):
    target = Target("cpu", torch.bfloat16, isa="triton", launch=launch, kv_cache_dtype=kv_dtype)
    kernel = TritonAttention(target, row_tile=rows)
    cache = torch.empty(2, 8, 64, kernel.block_bytes(16, 128), dtype=torch.uint8)
    start = torch.tensor([0, *query_lens]).cumsum(0)
    contexts = [900 + 3 * length for length in query_lens]
    told = DeviceLengths(query_start=start.int(), context_lens=torch.tensor(contexts, dtype=torch.int32))
    requests = PagedRequests(
        query_start=start.tolist(),
        context_lens=contexts,
        block_table_rb=torch.zeros(len(query_lens), 64 - len(query_lens), dtype=torch.int64),
        block_size=16,
        lengths=told if on_device else None,
    )
    shape = AttentionShape(num_heads=32, num_kv_heads=8, head_dim=128, scale=0.1)
    kernel(torch.empty(start[-1], 32, 128, dtype=torch.bfloat16), cache, kernel.plan(shape, requests))

for query_lens in [(1,), (1,) * 16, (9,), (1, 30, 1)]:
    step(*query_lens, on_device=False)
for kv_dtype, rows in [("auto", 64), ("auto", 128), ("fp8", 64)]:
    step(1, kv_dtype=kv_dtype, rows=rows)
print(table(launch.compiled))
"""


LATENT = """
import torch
from quire.ops.attention import PagedRequests
from quire.ops.latent_attention import LatentShape
from quire.ops.target import Target
from quire.ops.triton.compile_only import CompileOnly, table
from quire.ops.triton.latent import TritonLatentAttention

launch = CompileOnly("gfx942")
target = Target("cpu", torch.bfloat16, isa="triton", launch=launch, kv_cache_dtype="fp8", shared_bytes=64 << 10)
kernel = TritonLatentAttention(target)
shape = LatentShape(num_heads=128, latent_dim=512, rope_dim=64, scale=0.1)
cache = torch.empty(64, kernel.block_bytes(16, shape), dtype=torch.uint8)
for query_lens in [(1,), (9,)]:
    t = sum(query_lens)
    requests = PagedRequests(
        query_start=[0, t], context_lens=[900], block_table_rb=torch.zeros(1, 64, dtype=torch.int64), block_size=16
    )
    kernel(torch.empty(t, 128, 576, dtype=torch.bfloat16), cache, kernel.plan(shape, requests))
print(table(launch.compiled))
"""


def without_interpreter(tmp_path: Path, *command: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    return subprocess.run(
        [sys.executable, *command], env=environment, capture_output=True, text=True, timeout=250, check=False
    )


@pytest.mark.parametrize(
    ("arch", "shape", "ops", "rows", "expected"),
    [
        ("sm_90", "Qwen3-0.6B", PLAIN, (1, 256), {"rms_norm_kernel", "qkv_kernel", "prefill_kernel"}),
        ("sm_90", "Qwen3-0.6B", QUANTIZED, (16,), {"linear_kernel", "int4_kernel", "quantize_rows_kernel"}),
        ("gfx942", "Qwen3-30B-A3B", (*PLAIN[1:], *QUANTIZED), (16,), {"qkv_kernel", "int4_kernel", "expert_kernel"}),
    ],
    ids=["sm_90", "sm_90-quantized", "gfx942"],
)
def test_kernels_of_a_real_model_need_no_more_than_there_is(
    tmp_path: Path, arch: str, shape: str, ops: tuple[str, ...], rows: tuple[int, ...], expected: set[str]
) -> None:
    options = [f"--op={op}" for op in ops] + [f"--rows={count}" for count in rows]
    ran = without_interpreter(tmp_path, "-m", "quire.ops.triton.compile_only", arch, shape, *options)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert expected <= set(ran.stdout.split())
    # One matrix instruction for few rows and for many, or they would not round alike.
    products = re.findall(r"\bmfma:(\d+)(?: mfma16:(\d+))?", ran.stdout)
    assert bool(products) == (arch == "gfx942")
    assert all(every == of_16 for every, of_16 in products), ran.stdout


def test_what_spills_is_told_and_nothing_is_compiled_twice(tmp_path: Path) -> None:
    script = tmp_path / "spills.py"
    script.write_text(SPILLS)
    ran = without_interpreter(tmp_path, str(script))
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.splitlines()[-1] == "[True, False, False]"
    assert "FAULT" in ran.stdout


def test_attention_does_not_spill_over_caches_of_8_bits_nor_in_wide_decodes(tmp_path: Path) -> None:
    """Nor is it compiled again for steps of other sizes."""
    script = tmp_path / "attention.py"
    script.write_text(ATTENTION)
    ran = without_interpreter(tmp_path, str(script))
    assert ran.returncode == 0, ran.stderr
    assert "FAULT" not in ran.stdout, ran.stdout
    kernels = [line.split()[0] for line in ran.stdout.splitlines()]
    assert [kernels.count(name) for name in ("prefill_kernel", "decode_kernel", "combine_kernel")] == [1, 4, 1]


def test_latent_attention_over_caches_of_8_bits_does_not_spill_on_cdna(tmp_path: Path) -> None:
    """At the shape of DeepSeek-V3. 8-bit floats take most registers."""
    script = tmp_path / "latent.py"
    script.write_text(LATENT)
    ran = without_interpreter(tmp_path, str(script))
    assert ran.returncode == 0, ran.stderr
    assert {"latent_decode_kernel", "latent_prefill_kernel"} <= set(ran.stdout.split())
    assert "FAULT" not in ran.stdout, ran.stdout


def test_an_interpreter_cannot_compile() -> None:
    compile_only = importlib.import_module("quire.ops.triton.compile_only")
    with pytest.raises(ConfigError, match="interprets"):
        compile_only.CompileOnly("sm_90")
    with pytest.raises(ConfigError, match="sm_1"):
        compile_only.CompileOnly("sm_1")
