"""The package builds its kernels, and can do without them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from quire.ops.cpu.library import usable_isas

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")
def test_with_a_compiler_this_installation_has_kernels() -> None:
    """A build that fails is made again without them: that must not pass for an installation."""
    assert "portable" in usable_isas()


def test_without_a_compiler_the_package_builds_without_kernels(tmp_path: Path) -> None:
    environment = {**os.environ, "CXX": "/nonexistent/c++"}
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    source = _copy_of_the_sources(tmp_path / "source")
    done = subprocess.run(
        [*command, "--wheel-dir", tmp_path, source],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=280,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "quire/ops/cpu/library.py" in names
    assert not [name for name in names if name.endswith((".so", ".cpp"))]


def _copy_of_the_sources(target: Path) -> Path:
    """What git knows, so that nothing built here before is taken along."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    for name in filter(None, listed.stdout.split("\0")):
        if name.startswith(("src/", "csrc/")) or "/" not in name:
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            (target / name).write_bytes((ROOT / name).read_bytes())
    return target
