"""Attention's speed on this machine: decode against what memory gives, prefill against what oneDNN's product reaches.

    python benchmarks/cpu_attention.py [--threads 2] [--isa amx] [--heads 16 8 128]

Each figure is the best of several rounds, and the rounds of all cases take turns: another load then hits all alike.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from quire.models.machine import measure_bandwidth
from quire.ops.attention import AttentionKernel, AttentionShape, PagedRequests
from quire.ops.kernels import select
from quire.ops.target import Target

ROUNDS = 7
BLOCK_SIZE = 16
LAYERS = 3
PRODUCT_SIZE = 2048


@dataclass
class Case:
    """`work` is in bytes or in operations of one call of `run`."""

    name: str
    unit: str
    work: float
    run: Callable[[], object]
    best: float = float("inf")


def attention_case(
    kernel: AttentionKernel, kv_dtype: str, shape: AttentionShape, *, batch: int, query: int, context: int
) -> Case:
    """`query` tokens of each of `batch` requests at the end of `context`, in shuffled blocks, layer after layer."""
    per_request = -(-context // BLOCK_SIZE)
    num_blocks = batch * per_request + 1
    size = (2, shape.num_kv_heads, num_blocks, kernel.block_bytes(BLOCK_SIZE, shape.head_dim))
    layers = [torch.zeros(size, dtype=torch.uint8) for _ in range(LAYERS)]
    numbers = torch.randn(num_blocks * BLOCK_SIZE, shape.num_kv_heads, shape.head_dim).to(torch.bfloat16)
    for layer in layers:
        kernel.write(layer, numbers, numbers, torch.arange(len(numbers)))
    requests = PagedRequests(
        query_start=tuple(range(0, batch * query + 1, query)),
        context_lens=(context,) * batch,
        block_table_rb=(torch.randperm(num_blocks - 1) + 1).view(batch, per_request),
        block_size=BLOCK_SIZE,
    )
    plan = kernel.plan(shape, requests)
    q_thd = torch.randn(batch * query, shape.num_heads, shape.head_dim).to(torch.bfloat16)

    def run() -> None:
        for layer in layers:
            kernel(q_thd, layer, plan)

    if query == 1:
        return Case(f"decode {kv_dtype} {batch} x {context}", "GB/s", LAYERS * layers[0].nbytes, run)
    pairs = batch * query * (context - (query - 1) / 2)
    operations = LAYERS * 4 * pairs * shape.num_heads * shape.head_dim
    return Case(f"prefill {kv_dtype} {batch} x {query} of {context}", "GFLOP/s", operations, run)


def write_case(kernel: AttentionKernel, kv_dtype: str, shape: AttentionShape, tokens: int) -> Case:
    size = (2, shape.num_kv_heads, tokens // BLOCK_SIZE + 1, kernel.block_bytes(BLOCK_SIZE, shape.head_dim))
    layer = torch.zeros(size, dtype=torch.uint8)
    numbers = torch.randn(tokens, shape.num_kv_heads, shape.head_dim).to(torch.bfloat16)
    slots = torch.arange(BLOCK_SIZE, tokens + BLOCK_SIZE)
    return Case(
        f"write {kv_dtype} {tokens}", "GB/s", 4 * numbers.numel(), lambda: kernel.write(layer, numbers, numbers, slots)
    )


def product_case() -> Case:
    left, right = (torch.randn(PRODUCT_SIZE, PRODUCT_SIZE).to(torch.bfloat16) for _ in range(2))
    return Case("product bf16 (torch)", "GFLOP/s", 2 * PRODUCT_SIZE**3, lambda: left @ right)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--isa", default=None)
    parser.add_argument("--heads", type=int, nargs=3, default=(16, 8, 128), metavar=("QUERY", "KV", "DIM"))
    parser.add_argument("--kv", nargs="+", default=("bf16", "int8", "fp8"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    heads, kv_heads, head_dim = options.heads
    shape = AttentionShape(num_heads=heads, num_kv_heads=kv_heads, head_dim=head_dim, scale=head_dim**-0.5)
    cases = [product_case()]
    for kv_dtype in options.kv:
        target = Target("cpu", torch.bfloat16, threads=options.threads, isa=options.isa, kv_cache_dtype=kv_dtype)
        kernel = select(target).attention
        cases += [
            attention_case(kernel, kv_dtype, shape, batch=32, query=1, context=1024),
            attention_case(kernel, kv_dtype, shape, batch=1, query=1, context=8192),
            attention_case(kernel, kv_dtype, shape, batch=1, query=2048, context=2048),
            write_case(kernel, kv_dtype, shape, 1024),
        ]
    bandwidth = 0.0
    for _ in range(ROUNDS):
        bandwidth = max(bandwidth, measure_bandwidth(options.threads, seconds=0.3))
        for case in cases:
            start = time.perf_counter()
            case.run()
            case.best = min(case.best, time.perf_counter() - start)
    print(f"{'read bandwidth':<28}{bandwidth / 1e9:10.1f} GB/s")
    for case in cases:
        print(f"{case.name:<28}{case.work / case.best / 1e9:10.1f} {case.unit}")


if __name__ == "__main__":
    main()
