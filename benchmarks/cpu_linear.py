"""Linear layers against what the CPU can do: `python benchmarks/cpu_linear.py [--isa amx] [--threads 2]`.

For each format, shape and number of rows: the best time of several, the bytes of weights read and the operations done
per second, and their share of the stream-read bandwidth and of the dot-product peak, which are measured first. Weights
take turns, so that small ones are read from memory as in a real step, where other layers come between.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch

from quire.ops.cpu.library import kernels_module
from quire.ops.cpu.linear import CpuLinear
from quire.ops.target import Target
from quire.ops.weight import Fp8Weight, Int4Weight, Int8Weight, Weight

SHAPES = {
    "q": (2048, 1024),
    "kv": (1024, 1024),
    "o": (1024, 2048),
    "up": (3072, 1024),
    "down": (1024, 3072),
    "vocab": (151936, 1024),
}
"""Qwen3-0.6B: (features out, features in)."""
FORMATS = ("bf16", "int8", "int4", "fp8")
MIB = 1 << 20


def random_weight(fmt: str, n: int, k: int, group_size: int = 128) -> Weight:
    """Timing does not depend on the values."""
    values_nk = torch.randint(-127, 128, (n, k), dtype=torch.int8)
    match fmt:
        case "int8":
            return Int8Weight(values_nk=values_nk, scale_n=torch.full((n,), 1e-3))
        case "fp8":
            values = values_nk.float().mul_(0.1).to(torch.float8_e4m3fn)
            return Fp8Weight(values_nk=values, scale_n=torch.full((n,), 1e-3))
        case "int4":
            scale_ng = torch.full((n, k // group_size), 1e-3)
            nibbles = values_nk[:, : k // 2].contiguous().view(torch.uint8)
            return Int4Weight(nibbles_nk2=nibbles, scale_ng=scale_ng, zero_ng=None, group_size=group_size)
        case _:
            return values_nk.to(torch.bfloat16)


def best_seconds(linear: CpuLinear, x_tk: torch.Tensor, weights: list[Any], budget: float) -> float:
    """Per call: the shortest of the rounds over all weights that fit into `budget` seconds, two at least."""
    best, end = float("inf"), time.perf_counter() + budget
    rounds = 0
    while rounds < 3 or time.perf_counter() < end:
        begin = time.perf_counter()
        for weight in weights:
            linear(x_tk, weight)
        best = min(best, (time.perf_counter() - begin) / len(weights))
        rounds += 1
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--isa")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=FORMATS)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=tuple(SHAPES))
    parser.add_argument("--rows", nargs="+", type=int, default=(1, 32, 512, 2048))
    parser.add_argument("--seconds", type=float, default=0.5, help="time for each line")
    parser.add_argument("--mib", type=int, default=256, help="weights of one shape take this much together")
    parser.add_argument("--group-size", type=int, default=128)
    args = parser.parse_args()
    target = Target("cpu", torch.bfloat16, threads=args.threads, isa=args.isa)
    module: Any = kernels_module()
    linear = CpuLinear(target)
    bandwidth = module.read_bandwidth(target.cpu, max(args.mib, 64) * MIB, 8)
    peaks = {kind: module.peak(target.cpu, kind, 20) for kind in ("bf16", "int8", "fp32")}
    print(f"{target.cpu.isa}, {target.cpu.threads} threads: reads {bandwidth / 1e9:.1f} GB/s; Gop/s", end=" ")
    print(", ".join(f"{kind} {peak / 1e9:.0f}" for kind, peak in peaks.items()))
    print(f"{'format':7}{'shape':7}{'rows':>5}{'ms':>10}{'GB/s':>8}{'of read':>9}{'Gop/s':>9}{'of peak':>9}")
    for fmt in args.formats:
        peak = peaks["int8" if fmt in ("int8", "int4") else "bf16"]
        for shape in args.shapes:
            n, k = SHAPES[shape]
            packed = linear.pack(random_weight(fmt, n, k, args.group_size))
            nbytes = packed.nbytes
            count = max(1, args.mib * MIB // nbytes)
            weights = [packed, *(linear.pack(random_weight(fmt, n, k, args.group_size)) for _ in range(count - 1))]
            for rows in args.rows:
                if shape == "vocab" and rows > 32:
                    continue
                x_tk = torch.randn(rows, k).to(torch.bfloat16)
                some = weights if rows <= 32 else weights[:8]
                seconds = best_seconds(linear, x_tk, some, args.seconds)
                rate, read = 2 * rows * n * k / seconds, nbytes / seconds
                print(
                    f"{fmt:7}{shape:7}{rows:5}{seconds * 1e3:10.3f}{read / 1e9:8.1f}{read / bandwidth:9.0%}"
                    f"{rate / 1e9:9.0f}{rate / peak:9.0%}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
