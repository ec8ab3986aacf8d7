"""`quire bench throughput`: tokens per second of an engine in this process, beside `transformers` if asked."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal

from cyclopts import Parameter

from quire.cli.bench.offline import OfflineOptions, load_engine, run_batch
from quire.cli.bench.report import note, print_json, print_table
from quire.cli.bench.workload import make_requests
from quire.cli.flags import ConfigFile, OwnEngineFlags, settings
from quire.config.engine import EngineConfig

WARMUP_REQUESTS = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class ThroughputOptions(OfflineOptions):
    """The flags of `quire bench throughput`."""

    backend: Literal["quire", "transformers", "both"] = "quire"
    """Who generates: quire in one batch, transformers one request at a time, or first one, then the other."""


DEFAULTS = ThroughputOptions()


def throughput(
    model: str | None = None,
    *,
    options: Annotated[ThroughputOptions, Parameter(name="*")] = DEFAULTS,
    config: ConfigFile = None,
    engine: OwnEngineFlags = None,
) -> None:
    """Tokens per second of an engine without a server, all requests at once.

    Parameters
    ----------
    model
        A local directory, a Hugging Face id, an s3:// URL, or quire-tiny, the built-in model, if none is named.
    """
    resolved = settings(EngineConfig, engine, config=config, model=model).value
    results: dict[str, dict[str, Any]] = {}
    # The peer first: its memory is free again before the engine measures what is there for its KV pool.
    if options.backend in ("transformers", "both"):
        note("Running transformers.generate, one request at a time.")
        results["transformers"] = measure_peer(resolved, options)
    if options.backend in ("quire", "both"):
        results["quire"] = measure_engine(resolved, options)
    ratio = None
    if options.backend == "both":
        rates = {name: result["output_token_throughput"] for name, result in results.items()}
        ratio = rates["quire"] / rates["transformers"]
    if options.json:
        told = {"benchmark": "throughput", "model": resolved.model, **asdict(options), **results, "ratio": ratio}
        print_json({key: value for key, value in told.items() if key != "json"})
        return
    for name, result in results.items():
        print_table(f"{name}: {resolved.model}", _rows(result))
    if ratio is not None:
        print(f"quire / transformers: {ratio:.2f}")


def measure_engine(config: EngineConfig, options: OfflineOptions) -> dict[str, Any]:
    llm = load_engine(config)
    workload = options.make_workload(llm.info.vocab_size)
    # Other prompts than those that are measured, which would be prefix hits otherwise.
    run_batch(llm, make_requests(warmup_of(options).make_workload(llm.info.vocab_size)), progress=False)
    requests = make_requests(workload)
    start = time.perf_counter()
    prompt_tokens, output_tokens = run_batch(llm, requests, progress=not options.json)
    return _result(time.perf_counter() - start, len(requests), prompt_tokens, output_tokens)


def measure_peer(config: EngineConfig, options: OfflineOptions) -> dict[str, Any]:
    from quire.cli.bench.peer import TransformersPeer
    from quire.models.source import resolve_model

    peer = TransformersPeer(resolve_model(config), config)
    peer.run(make_requests(warmup_of(options).make_workload(peer.vocab_size)))
    requests = make_requests(options.make_workload(peer.vocab_size))
    elapsed, prompt_tokens, output_tokens = peer.run(requests)
    return _result(elapsed, len(requests), prompt_tokens, output_tokens)


def warmup_of(options: OfflineOptions) -> OfflineOptions:
    """A few short requests which share no prefix with the measured ones."""
    output_len = min(4, options.output_len)
    return OfflineOptions(
        num_prompts=WARMUP_REQUESTS, input_len=options.input_len, output_len=output_len, seed=options.seed + 1
    )


def _result(elapsed: float, num_requests: int, prompt_tokens: int, output_tokens: int) -> dict[str, Any]:
    return {
        "duration_s": elapsed,
        "num_requests": num_requests,
        "prompt_tokens": prompt_tokens,
        "output_tokens": output_tokens,
        "request_throughput": num_requests / elapsed,
        "output_token_throughput": output_tokens / elapsed,
        "total_token_throughput": (prompt_tokens + output_tokens) / elapsed,
    }


def _rows(result: dict[str, Any]) -> list[tuple[str, str]]:
    return [
        ("duration", f"{result['duration_s']:.2f} s"),
        ("requests", f"{result['num_requests']}, {result['request_throughput']:.2f} /s"),
        ("output tokens", f"{result['output_tokens']:,}, {result['output_token_throughput']:,.1f} /s"),
        ("all tokens", f"{result['total_token_throughput']:,.1f} /s"),
    ]
