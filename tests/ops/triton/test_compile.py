"""Kernels compiled for GPUs that are not here: in processes of their own, since Triton is interpreted in this one."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from quire.core.errors import ConfigError
from quire.ops.triton.library import is_installed

if not is_installed():
    pytest.skip("Triton is not installed", allow_module_level=True)

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


def without_interpreter(tmp_path: Path, *command: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    return subprocess.run(
        [sys.executable, *command], env=environment, capture_output=True, text=True, timeout=250, check=False
    )


@pytest.mark.parametrize(
    ("arch", "options"),
    [("sm_90", ("--rows=1", "--rows=256")), ("gfx942", ("--rows=1", "--op=rms_norm", "--op=fused"))],
)
def test_kernels_of_a_real_model_need_no_more_than_there_is(
    tmp_path: Path, arch: str, options: tuple[str, ...]
) -> None:
    ran = without_interpreter(tmp_path, "-m", "quire.ops.triton.compile_only", arch, "Qwen3-0.6B", *options)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert {"rms_norm_kernel", "qkv_kernel"} <= set(ran.stdout.split())


def test_what_spills_is_told_and_nothing_is_compiled_twice(tmp_path: Path) -> None:
    script = tmp_path / "spills.py"
    script.write_text(SPILLS)
    ran = without_interpreter(tmp_path, str(script))
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.splitlines()[-1] == "[True, False, False]"
    assert "FAULT" in ran.stdout


def test_an_interpreter_cannot_compile() -> None:
    compile_only = importlib.import_module("quire.ops.triton.compile_only")
    with pytest.raises(ConfigError, match="interprets"):
        compile_only.CompileOnly("sm_90")
    with pytest.raises(ConfigError, match="sm_1"):
        compile_only.CompileOnly("sm_1")
