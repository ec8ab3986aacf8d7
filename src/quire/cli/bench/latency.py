"""`quire bench latency`: how long one batch takes, again and again."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, replace
from typing import Annotated

from cyclopts import Parameter

from quire.cli.bench.offline import OfflineOptions, load_engine, run_batch
from quire.cli.bench.report import print_json, print_table, summaries_as_dict
from quire.cli.bench.statistics import summarise
from quire.cli.bench.workload import make_requests, require
from quire.cli.flags import ConfigFile, OwnEngineFlags, settings
from quire.config.engine import EngineConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class LatencyOptions(OfflineOptions):
    """The flags of `quire bench latency`."""

    num_prompts: int = 1
    """Requests in a batch."""
    input_len: int = 128
    """Tokens of a prompt, without its shared prefix."""
    output_len: int = 32
    """Tokens to generate."""
    num_iters: int = 10
    """Measured batches."""
    num_warmup_iters: int = 2
    """Batches before them, unmeasured."""


DEFAULTS = LatencyOptions()


def latency(
    model: str | None = None,
    *,
    options: Annotated[LatencyOptions, Parameter(name="*")] = DEFAULTS,
    config: ConfigFile = None,
    engine: OwnEngineFlags = None,
) -> None:
    """Seconds for one batch of requests without a server.

    Parameters
    ----------
    model
        A local directory, a Hugging Face id, an s3:// URL, or quire-tiny, the built-in model, if none is named.
    """
    require("num_iters", options.num_iters, options.num_iters >= 1, "at least 1")
    require("num_warmup_iters", options.num_warmup_iters, options.num_warmup_iters >= 0, "at least 0")
    resolved = settings(EngineConfig, engine, config=config, model=model).value
    llm = load_engine(resolved)
    seconds = []
    for index in range(options.num_warmup_iters + options.num_iters):
        # New prompts each time: the same ones would be found in the prefix cache.
        workload = replace(options, seed=options.seed + index).make_workload(llm.info.vocab_size)
        requests = make_requests(workload)
        start = time.perf_counter()
        run_batch(llm, requests, progress=False)
        if index >= options.num_warmup_iters:
            seconds.append(time.perf_counter() - start)
    summary = summarise([value * 1e3 for value in seconds])
    if options.json:
        asked = {key: value for key, value in asdict(options).items() if key != "json"}
        print_json({"benchmark": "latency", "model": resolved.model, **asked, **summaries_as_dict({"batch": summary})})
        return
    rows = [("batches", str(options.num_iters)), ("requests in each", str(options.num_prompts))]
    print_table(f"{resolved.model}: {options.input_len} in, {options.output_len} out", rows, {"batch": summary})
