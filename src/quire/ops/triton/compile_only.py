"""Compiles kernels for a GPU that is not there, as a `Launch`: what an op would run is compiled and nothing is run.

    python -m quire.ops.triton.compile_only sm_90 [Qwen3-8B] [--op linear] [--rows 16]

compiles what Triton serves at the shapes of real models and prints what each kernel takes. The exit status is 1 where
one needs local memory, or more shared memory than there is. Triton must not interpret (TRITON_INTERPRET unset).
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from quire.core.errors import ConfigError
from quire.ops.target import Target
from quire.ops.triton.launch import HIP_OPTIONS, OPTIONS
from quire.ops.triton.library import TRITON, interprets
from quire.ops.triton.real_shapes import FUSED, ROWS, SHAPES, call, served_ops

_KIB = 1024
_MOST_SHARED: Mapping[str, int] = {
    "sm_80": 163 * _KIB,
    "sm_86": 99 * _KIB,
    "sm_89": 99 * _KIB,
    "sm_90": 227 * _KIB,
    "sm_100": 227 * _KIB,
    "sm_120": 99 * _KIB,
    "gfx90a": 64 * _KIB,
    "gfx942": 64 * _KIB,
    "gfx950": 160 * _KIB,
}
"""What one block can have (CUDA C++ Programming Guide, table of compute capabilities; the CDNA ISA guides)."""
_TOLD = {
    "wgmma": r"\bwgmma\.mma_async",
    "mma": r"\bmma\.sync",
    "tcgen05": r"\btcgen05\.mma",
    "cp.async": r"\bcp\.async\.(?:ca|cg)",
    "bulk": r"\bcp\.async\.bulk",
    "ld128": r"\bld\.global\S*\.v(?:4\.[bfu]32|2\.[bfu]64|8\.b16)",
    "mfma": r"\bv_mfma",
    "mfma16": r"\bv_mfma_\w*_16x16x",
    "load128": r"\b(?:global|buffer)_load_dwordx4",
}
"""Instructions of a kernel's assembly that are counted: matrix products, copies to shared memory, 16-byte loads."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Compiled:
    """A kernel as one launch had it compiled. `grid` is that of the first such launch.

    `local_bytes` is a thread's local memory, which lies in device memory: registers that were spilled, or arrays that
    are indexed by what is known at run time only. `registers` are a thread's.
    """

    kernel: str
    constants: Mapping[str, Any]
    num_warps: int
    num_stages: int
    grid: tuple[int, ...]
    registers: int
    local_bytes: int
    shared_bytes: int
    most_shared: int
    instructions: Mapping[str, int]

    @property
    def fault(self) -> str | None:
        """Why one would not want to run it, or could not."""
        if self.shared_bytes > self.most_shared:
            return f"{self.shared_bytes} bytes of shared memory, of {self.most_shared} at most"
        return f"{self.local_bytes} bytes of local memory" if self.local_bytes else None


class CompileOnly:
    """A `Launch` that compiles for `arch` ("sm_90", "gfx942") and keeps what it learned in `compiled`.

    Each combination of kernel, argument types, divisibilities, constants and options is compiled once. They are found
    from the arguments by Triton's own code, so they are those that a real launch would have. Results of ops are
    whatever their memory holds. Raises ConfigError for an architecture of no name known, or where Triton interprets.
    """

    def __init__(self, arch: str) -> None:
        if arch not in _MOST_SHARED:
            raise ConfigError(
                f"There is no architecture {arch!r}.", param="arch", remedy=f"Name one of {', '.join(_MOST_SHARED)}."
            )
        if interprets():
            raise ConfigError("Triton interprets kernels here.", remedy="Unset the variable TRITON_INTERPRET.")
        self.arch = arch
        self.compiled: list[Compiled] = []
        self._gpu = GPUTarget("hip", arch, 64) if arch.startswith("gfx") else GPUTarget("cuda", int(arch[3:]), 32)
        self._options = HIP_OPTIONS if self._gpu.backend == "hip" else OPTIONS
        self._backend = make_backend(self._gpu)
        self._binders: dict[Any, Any] = {}
        self._seen: set[str] = set()

    def __call__(
        self, kernel: Any, grid: tuple[int, ...], *args: Any, num_warps: int = 4, num_stages: int = 2, **constexprs: Any
    ) -> None:
        assert all(grid), f"an empty grid {grid} of {kernel.__name__}"
        if kernel not in self._binders:
            self._binders[kernel] = create_function_from_signature(kernel.signature, kernel.params, self._backend)
        options = {"num_warps": num_warps, "num_stages": num_stages, **self._options}
        bound, specialization, rest = self._binders[kernel](*args, **constexprs, **options)
        key = f"{kernel.cache_key} {specialization} {rest}"
        if key in self._seen:
            return
        self._seen.add(key)
        parsed, signature, constants, attributes = kernel._pack_args(
            self._backend, {**constexprs, **options}, bound, specialization, rest
        )
        source = ASTSource(kernel, signature, constants, attributes)
        made = triton.compile(source, target=self._gpu, options=parsed.__dict__)
        assembly = made.asm["amdgcn" if self._gpu.backend == "hip" else "ptx"]
        registers, local_bytes = _amd_registers(assembly) if "amdgcn" in made.asm else _registers(made.asm["cubin"])
        names = list(kernel.signature.parameters)
        self.compiled.append(
            Compiled(
                kernel=kernel.__name__,
                constants={names[path[0]]: value for path, value in constants.items()},
                num_warps=num_warps,
                num_stages=num_stages,
                grid=grid,
                registers=registers,
                local_bytes=local_bytes,
                shared_bytes=made.metadata.shared,
                most_shared=_MOST_SHARED[self.arch],
                instructions={
                    name: count for name, pattern in _TOLD.items() if (count := len(re.findall(pattern, assembly)))
                },
            )
        )


def _registers(cubin: bytes) -> tuple[int, int]:
    """(registers, bytes of local memory) of a thread."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout  # noqa: S603
    number = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    return number["REG"], number["STACK"] + number["LOCAL"]


def _amd_registers(assembly: str) -> tuple[int, int]:
    number = {
        name: int(value) for name, value in re.findall(r"\.(vgpr_count|private_segment_fixed_size):\s+(\d+)", assembly)
    }
    return number["vgpr_count"], number["private_segment_fixed_size"]


def compile_ops(launch: CompileOnly, *, shapes: Sequence[str], rows: Sequence[int], ops: Sequence[str] = ()) -> None:
    """What Triton serves of `ops` (of all and "fused", if empty), in bfloat16, at `shapes` of `SHAPES`."""
    target = Target("cpu", torch.bfloat16, isa=TRITON, launch=launch, shared_bytes=_MOST_SHARED[launch.arch])
    for op in (*served_ops(target), FUSED):
        if op in ops or not ops:
            for shape in SHAPES:
                if shape.name in shapes:
                    for count in rows:
                        call(op, target, shape, count)


def table(compiled: Sequence[Compiled]) -> str:
    """A line each, and what is wrong with it."""
    lines = [
        f"{'kernel':28} {'warps':>5} {'stages':>6} {'regs':>5} {'local':>6} {'shared':>7}  instructions; constants"
    ]
    for one in compiled:
        seen = " ".join(f"{name}:{count}" for name, count in one.instructions.items())
        constants = " ".join(f"{name}={value}" for name, value in one.constants.items())
        lines.append(
            f"{one.kernel:28} {one.num_warps:5} {one.num_stages:6} {one.registers:5} {one.local_bytes:6} "
            f"{one.shared_bytes:7}  {seen}; {constants}"
        )
        if one.fault is not None:
            lines.append(f"  FAULT: {one.fault}")
    variants = Counter(one.kernel for one in compiled)
    lines.append(f"{len(variants)} kernels, {len(compiled)} variants")
    return "\n".join(lines)


def main(arguments: Sequence[str]) -> int:
    names = [shape.name for shape in SHAPES]
    parser = argparse.ArgumentParser(prog="python -m quire.ops.triton.compile_only")
    parser.add_argument("arch", choices=list(_MOST_SHARED))
    parser.add_argument("shapes", nargs="*", metavar="shape", help=f"{', '.join(names)}; all")
    parser.add_argument("--op", action="append", default=[], help="one that Triton serves; all")
    parser.add_argument("--rows", action="append", type=int, help=f"{', '.join(map(str, ROWS))}")
    parsed = parser.parse_args(arguments)
    if unknown := set(parsed.shapes) - set(names):
        parser.error(f"no such shape: {', '.join(sorted(unknown))}")
    launch = CompileOnly(parsed.arch)
    compile_ops(launch, shapes=parsed.shapes or names, rows=parsed.rows or ROWS, ops=parsed.op)
    print(table(launch.compiled))
    return int(any(one.fault is not None for one in launch.compiled))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
