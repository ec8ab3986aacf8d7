"""The online workloads, sent by quire's load generator, `quire bench serve`, to whichever server it is."""

from __future__ import annotations

import asyncio
from typing import Any

from benchmarks.peers.workloads import Workload
from quire.cli.bench.serve import LoadOptions, make_load, run_load, summarise_load

SHARED = "shared prefixes are for the workloads without a server"


def measure(url: str, workload: Workload, turn: int, vocab_size: int) -> dict[str, Any]:
    """Counts, rates and latencies of the whole workload. A request that fails is among the counts."""
    assert workload.shared_len == 0, SHARED
    options = LoadOptions(
        url=url,
        num_prompts=workload.num_prompts,
        request_rate=workload.rate,
        input_len=workload.input_len,
        output_len=workload.output_len,
        vocab_size=vocab_size,
        warmup=1,
        seed=turn,
    )
    _, records, duration = asyncio.run(run_load(make_load(options), None, show_progress=False))
    result, summaries = summarise_load(records, duration, {})
    return {
        "seconds": duration,
        "completed": result["completed"],
        "failed": result["failed"],
        "output_tokens": result["output_tokens"],
        "requests_per_s": result["request_throughput"],
        "ttft_p50_ms": summaries["TTFT"].p50,
        "ttft_p99_ms": summaries["TTFT"].p99,
        "tpot_p50_ms": summaries["TPOT"].p50,
    }
