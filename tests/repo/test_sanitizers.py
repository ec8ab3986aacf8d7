"""The kernels under sanitisers, without Python: memory of exact sizes, odd shapes, every instruction set."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from quire.ops.cpu.library import usable_isas

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")


@pytest.mark.timeout(900)
@pytest.mark.parametrize("sanitizers", ["address,undefined", "thread"])
def test_the_kernels_are_clean(sanitizers: str, tmp_path: Path) -> None:
    # The first set has the generic code, the last the most of its own; each takes a while to compile.
    isas = sorted({usable_isas()[0], usable_isas()[-1]}) if usable_isas() else ["portable"]
    configure = ["cmake", "-S", ROOT / "csrc", "-B", tmp_path, "-G", "Ninja", f"-DPython_EXECUTABLE={sys.executable}"]
    options = ["-DCMAKE_BUILD_TYPE=Debug", f"-DQUIRE_SANITIZE={sanitizers}", f"-DQUIRE_ISAS={';'.join(isas)}"]
    _run([*configure, *options, "-DQUIRE_WERROR=ON"])
    _run(["cmake", "--build", tmp_path, "--target", "quire_check"])
    environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=1", "UBSAN_OPTIONS": "halt_on_error=1"}
    _run([tmp_path / "quire_check"], environment)


def _run(command: list[str | Path], environment: dict[str, str] | None = None) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=800)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
