"""`quire bench throughput`: tokens per second of an engine in this process, beside `transformers` if asked."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import Any, Literal

from quire.cli.bench.offline import DEFAULTS, OfflineFlags, OfflineOptions, asked_for, load_engine, run_batch
from quire.cli.bench.report import note, print_json, print_table
from quire.cli.bench.workload import BenchRequest, make_requests
from quire.cli.flags import ConfigFile, OwnEngineFlags, settings
from quire.config.engine import EngineConfig

WARMUP_REQUESTS = 2
WARMUP_TOKENS = 4


Backend = Literal["quire", "transformers", "both"]


def throughput(
    model: str | None = None,
    *,
    backend: Backend = "quire",
    num_prompts: int = 32,
    options: OfflineFlags = DEFAULTS,
    config: ConfigFile = None,
    engine: OwnEngineFlags = None,
) -> None:
    """Tokens per second of an engine without a server, all requests at once.

    Parameters
    ----------
    model
        A local directory, a Hugging Face id, an s3:// URL, or quire-tiny, the built-in model, if none is named.
    backend
        Who generates: quire all at once, transformers one request at a time, or first one, then the other.
    num_prompts
        Requests to generate.
    """
    resolved = settings(EngineConfig, engine, config=config, model=model).value
    run = OfflineRun(resolved, options, num_prompts)
    results: dict[str, dict[str, Any]] = {}
    # The peer first: its memory is free again before the engine measures what is there for its KV pool.
    if backend in ("transformers", "both"):
        note("Running transformers.generate, one request at a time.")
        results["transformers"] = run.measure_peer()
    if backend in ("quire", "both"):
        results["quire"] = run.measure_engine()
    ratio = None
    if backend == "both":
        rates = {name: result["output_token_throughput"] for name, result in results.items()}
        ratio = rates["quire"] / rates["transformers"]
    if options.json:
        asked = {"model": resolved.model, "num_prompts": num_prompts, **asked_for(options)}
        print_json({"benchmark": "throughput", **asked, **results, "ratio": ratio})
        return
    for name, result in results.items():
        print_table(f"{name}: {resolved.model}", _rows(result))
    if ratio is not None:
        print(f"quire / transformers: {ratio:.2f}")


@dataclass(frozen=True, slots=True)
class OfflineRun:
    """One workload, for whoever is measured."""

    config: EngineConfig
    options: OfflineOptions
    num_prompts: int

    def measure_engine(self) -> dict[str, Any]:
        llm = load_engine(self.config)
        run_batch(llm, self._warmup(llm.info.vocab_size), progress=False)
        requests = self._requests(llm.info.vocab_size)
        start = time.perf_counter()
        prompt_tokens, output_tokens = run_batch(llm, requests, progress=not self.options.json)
        return _result(time.perf_counter() - start, len(requests), prompt_tokens, output_tokens)

    def measure_peer(self) -> dict[str, Any]:
        from quire.cli.bench.peer import TransformersPeer
        from quire.models.source import resolve_model

        peer = TransformersPeer(resolve_model(self.config), self.config)
        peer.run(self._warmup(peer.vocab_size))
        requests = self._requests(peer.vocab_size)
        elapsed, prompt_tokens, output_tokens = peer.run(requests)
        return _result(elapsed, len(requests), prompt_tokens, output_tokens)

    def _requests(self, vocab_size: int) -> list[BenchRequest]:
        return make_requests(self.options.make_workload(self.num_prompts, vocab_size))

    def _warmup(self, vocab_size: int) -> list[BenchRequest]:
        """A few short requests, of other prompts than the measured ones, which would be prefix hits otherwise."""
        output_len = min(WARMUP_TOKENS, self.options.output_len)
        shorter = replace(self.options, output_len=output_len, seed=self.options.seed + 1)
        return make_requests(shorter.make_workload(WARMUP_REQUESTS, vocab_size))


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
