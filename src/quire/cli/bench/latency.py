"""`quire bench latency`: how long one batch takes, again and again."""

from __future__ import annotations

import time
from dataclasses import replace

from quire.cli.bench.offline import DEFAULTS, OfflineFlags, asked_for, load_engine, run_batch
from quire.cli.bench.report import print_json, print_table, summaries_as_dict
from quire.cli.bench.statistics import summarise
from quire.cli.bench.workload import make_requests, require
from quire.cli.flags import ConfigFile, OwnEngineFlags, settings
from quire.config.engine import EngineConfig


def latency(
    model: str | None = None,
    *,
    batch_size: int = 1,
    num_iters: int = 10,
    num_warmup_iters: int = 2,
    options: OfflineFlags = DEFAULTS,
    config: ConfigFile = None,
    engine: OwnEngineFlags = None,
) -> None:
    """Seconds for one batch of requests without a server.

    Parameters
    ----------
    model
        A local directory, a Hugging Face id, an s3:// URL, or quire-tiny, the built-in model, if none is named.
    batch_size
        Requests in a batch.
    num_iters
        Measured batches.
    num_warmup_iters
        Batches before them, unmeasured.
    """
    require("num_iters", num_iters, num_iters >= 1, "at least 1")
    require("num_warmup_iters", num_warmup_iters, num_warmup_iters >= 0, "at least 0")
    resolved = settings(EngineConfig, engine, config=config, model=model).value
    llm = load_engine(resolved)
    seconds = []
    for index in range(num_warmup_iters + num_iters):
        # New prompts each time: the same ones would be found in the prefix cache.
        workload = replace(options, seed=options.seed + index).make_workload(batch_size, llm.info.vocab_size)
        requests = make_requests(workload)
        start = time.perf_counter()
        run_batch(llm, requests, progress=False)
        if index >= num_warmup_iters:
            seconds.append(time.perf_counter() - start)
    summary = summarise([value * 1e3 for value in seconds])
    if options.json:
        asked = {"model": resolved.model, "batch_size": batch_size, **asked_for(options)}
        print_json({"benchmark": "latency", **asked, **summaries_as_dict({"batch": summary})})
        return
    rows = [("batches", str(num_iters)), ("requests in each", str(batch_size))]
    print_table(f"{resolved.model}: {options.input_len} in, {options.output_len} out", rows, {"batch": summary})
