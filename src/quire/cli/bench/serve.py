"""`quire bench serve`: a load generator against any server with OpenAI's API.

Requests are sent at their arrival times whatever the server does (an open loop), unless `--max-concurrency` makes
later ones wait. A request's clock starts when it is sent, so waiting for a place among the `--max-concurrency` is not
counted as the server's time.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import aiohttp
from cyclopts import Parameter

from quire.cli.bench.report import note, plot, print_json, print_table, require_plotting, summaries_as_dict
from quire.cli.bench.statistics import Record, Summary, e2e_ms, goodput, itls_ms, summarise, tpot_ms, ttft_ms
from quire.cli.bench.workload import (
    BenchRequest,
    Format,
    Kind,
    Workload,
    arrival_times,
    make_requests,
    parse_slos,
    require,
)
from quire.cli.client import ServerFault, base_url, list_models, open_session, stream
from quire.core.errors import ConfigError

Endpoint = Literal["completions", "chat"]

_PATHS: Mapping[Endpoint, str] = {"completions": "/v1/completions", "chat": "/v1/chat/completions"}
READ_TIMEOUT = 600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadOptions:
    """The flags of `quire bench serve`."""

    url: str = "http://127.0.0.1:8000"
    """Address of the server."""
    model: str | None = None
    """Name of the model; the first that the server lists otherwise."""
    api_key: Annotated[str | None, Parameter(env_var="OPENAI_API_KEY")] = None
    """Key that the server asks for."""
    endpoint: Endpoint = "completions"
    """Which route to load."""
    num_prompts: int = 100
    """Requests to send."""
    request_rate: float = math.inf
    """Requests per second; inf sends all at once."""
    burstiness: float = 1.0
    """Shape of the gaps between requests: 1 is a Poisson process, below 1 comes in bursts, above 1 is more even."""
    max_concurrency: int | None = None
    """Most requests under way at once."""
    workload: Kind = "random"
    """random, or shared-prefix: prompts that begin alike."""
    input_len: int = 256
    """Tokens (or words) of a prompt, without its shared prefix."""
    output_len: int = 64
    """Tokens to generate."""
    random_range_ratio: float = 0.0
    """Lengths vary evenly between n(1-r) and n(1+r)."""
    prefix_len: int = 0
    """Tokens (or words) of a shared prefix."""
    num_prefixes: int = 1
    """Different shared prefixes."""
    prompt_format: Format | None = None
    """token-ids (exact lengths; completions only) or text (random words)."""
    vocab_size: int = 1024
    """Token ids are drawn below this."""
    temperature: float = 0.0
    """Sampling temperature."""
    ignore_eos: Annotated[bool, Parameter(negative="--no-ignore-eos")] = True
    """Generate all tokens that are asked for, whatever the model says; vLLM's extension, which others may refuse."""
    warmup: int = 1
    """Requests sent, one by one and unmeasured, before the others."""
    seed: int = 0
    """Of prompts and arrivals."""
    slo: tuple[str, ...] | None = None
    """A limit for goodput, in milliseconds, such as ttft=500 or tpot=50; may be repeated."""
    plot: Path | None = None
    """Draw the latencies into this PNG."""
    json: bool = False
    """Print JSON."""


DEFAULTS = LoadOptions()


def serve(options: Annotated[LoadOptions, Parameter(name="*")] = DEFAULTS) -> int:
    """Load on an OpenAI-compatible server: throughput, TTFT, ITL, TPOT, E2E, goodput.

    The exit code is 1 if no request completed.
    """
    slos = parse_slos(options.slo or ())
    if options.plot is not None:
        require_plotting(options.plot)
    load = make_load(options)
    name, records, duration = asyncio.run(run_load(load, options.api_key, show_progress=not options.json))
    result, summaries = summarise_load(records, duration, slos)
    if options.plot is not None:
        plot(options.plot, name, records)
    if options.json:
        asked = {key: value for key, value in asdict(options).items() if key not in _UNTOLD}
        print_json({"benchmark": "serve", **asked, "model": name, **result, **summaries_as_dict(summaries)})
    else:
        print_table(f"{name} at {load.url}", _rows(result), summaries)
    return 1 if result["completed"] == 0 else 0


_UNTOLD = frozenset({"api_key", "json", "plot", "slo"})


def make_load(options: LoadOptions) -> Load:
    """The requests that the flags ask for. Raises `ConfigError` for flags that make no sense."""
    prompt_format: Format = options.prompt_format or ("text" if options.endpoint == "chat" else "token-ids")
    if options.endpoint == "chat" and prompt_format == "token-ids":
        raise ConfigError("--prompt-format is 'token-ids'.", param="prompt_format", remedy="Chat takes text.")
    most = options.max_concurrency
    require("max_concurrency", most, most is None or most >= 1, "at least 1")
    require("warmup", options.warmup, options.warmup >= 0, "at least 0")
    require("num_prompts", options.num_prompts, options.num_prompts >= 1, "at least 1")
    workload = Workload(
        kind=options.workload,
        num_prompts=options.num_prompts + options.warmup,
        input_len=options.input_len,
        output_len=options.output_len,
        range_ratio=options.random_range_ratio,
        prefix_len=options.prefix_len,
        num_prefixes=options.num_prefixes,
        vocab_size=options.vocab_size,
        seed=options.seed,
    )
    requests = make_requests(workload, prompt_format)
    arrivals = arrival_times(options.num_prompts, options.request_rate, options.burstiness, options.seed)
    return Load(
        url=base_url(options.url),
        endpoint=options.endpoint,
        model=options.model,
        warmup=requests[: options.warmup],
        requests=requests[options.warmup :],
        arrivals=[float(at) for at in arrivals],
        max_concurrency=options.max_concurrency,
        extra={"temperature": options.temperature, **({"ignore_eos": True} if options.ignore_eos else {})},
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What to send where, and when: `arrivals` are seconds from the start, one for each of `requests`."""

    url: str
    endpoint: Endpoint
    model: str | None
    warmup: Sequence[BenchRequest]
    requests: Sequence[BenchRequest]
    arrivals: Sequence[float]
    max_concurrency: int | None
    extra: Mapping[str, Any]


async def run_load(load: Load, api_key: str | None, *, show_progress: bool) -> tuple[str, list[Record], float]:
    """The model's name, what became of each request, and how many seconds it took from first to last."""
    async with AsyncExitStack() as stack:
        session = await stack.enter_async_context(open_session(api_key=api_key, read_timeout=READ_TIMEOUT))
        name = load.model or await _first_model(session, load.url)
        for request in load.warmup:
            record = await send(session, load, name, request)
            if record.error is not None:
                raise ServerFault(f"The first request failed: {record.error}", remedy="Nothing was measured.")
        gate: asyncio.Semaphore | nullcontext[None]
        gate = asyncio.Semaphore(load.max_concurrency) if load.max_concurrency else nullcontext()
        tell = stack.enter_context(_progress(len(load.requests), show_progress))
        start = time.perf_counter()

        async def one(request: BenchRequest, arrival: float) -> Record:
            await asyncio.sleep(max(0.0, start + arrival - time.perf_counter()))
            async with gate:
                record = await send(session, load, name, request)
            tell()
            return record

        records = await asyncio.gather(*map(one, load.requests, load.arrivals))
        return name, list(records), time.perf_counter() - start


async def send(session: aiohttp.ClientSession, load: Load, model: str, request: BenchRequest) -> Record:
    """One request, start to end; a failure is part of the record."""
    body: dict[str, Any] = {
        "model": model,
        "max_tokens": request.output_len,
        "stream": True,
        "stream_options": {"include_usage": True},
        **load.extra,
    }
    if load.endpoint == "chat":
        body["messages"] = [{"role": "user", "content": request.prompt}]
    else:
        body["prompt"] = request.prompt
    record = Record(start=time.perf_counter())
    try:
        async for delta in stream(session, load.url + _PATHS[load.endpoint], body):
            now = time.perf_counter()
            if delta.text:
                record.token_times.append(now)
                record.end = now
            if delta.usage is not None:
                record.prompt_tokens = delta.usage.prompt_tokens
                record.output_tokens = delta.usage.completion_tokens
                record.cached_tokens = delta.usage.cached_tokens
            elif delta.finish_reason is not None:
                record.end = now
    except ServerFault as error:
        record.error = error.message
    record.end = record.end or time.perf_counter()
    # A server that sends no usage sends, as a rule, a token with each event.
    record.output_tokens = record.output_tokens or len(record.token_times)
    return record


def summarise_load(
    records: Sequence[Record], duration: float, slos: Mapping[str, float]
) -> tuple[dict[str, Any], dict[str, Summary]]:
    """Counts and rates, and the latencies of the requests that completed."""
    done = [record for record in records if record.error is None]
    failed = [record for record in records if record.error is not None]
    prompt_tokens = sum(record.prompt_tokens for record in done)
    output_tokens = sum(record.output_tokens for record in done)
    result: dict[str, Any] = {
        "duration_s": duration,
        "completed": len(done),
        "failed": len(failed),
        "errors": dict(Counter(record.error for record in failed).most_common(10)),
        "prompt_tokens": prompt_tokens,
        "cached_tokens": sum(record.cached_tokens for record in done),
        "output_tokens": output_tokens,
        "request_throughput": len(done) / duration,
        "output_token_throughput": output_tokens / duration,
        "total_token_throughput": (prompt_tokens + output_tokens) / duration,
    }
    if slos:
        result["slos_ms"] = dict(slos)
        result["goodput"] = goodput(records, slos, duration)
    tpots = [value for record in done if (value := tpot_ms(record)) is not None]
    summaries = {
        "TTFT": summarise([ttft_ms(record) for record in done]),
        "TPOT": summarise(tpots),
        "ITL": summarise([gap for record in done for gap in itls_ms(record)]),
        "E2E": summarise([e2e_ms(record) for record in done]),
    }
    return result, summaries


async def _first_model(session: aiohttp.ClientSession, url: str) -> str:
    names = await list_models(session, url)
    if not names:
        raise ServerFault(f"The server at {url} lists no model.", remedy="Name one with --model.")
    return names[0]


@contextmanager
def _progress(total: int, show: bool) -> Iterator[Callable[[], None]]:
    """A bar on stderr; yields a function that is called for every request that has ended."""
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), disable=not show) as bar:
        task = bar.add_task("Requests", total=total)
        yield lambda: bar.advance(task)


def _rows(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    rows = [
        ("completed / failed", f"{result['completed']} / {result['failed']}"),
        ("duration", f"{result['duration_s']:.2f} s"),
        ("requests", f"{result['request_throughput']:.2f} /s"),
        ("output tokens", f"{result['output_token_throughput']:,.1f} /s"),
        ("all tokens", f"{result['total_token_throughput']:,.1f} /s"),
        ("prompt tokens, of them cached", f"{result['prompt_tokens']:,}, {result['cached_tokens']:,}"),
    ]
    if "goodput" in result:
        limits = ", ".join(f"{name} ≤ {limit:g} ms" for name, limit in result["slos_ms"].items())
        rows.append((f"goodput ({limits})", f"{result['goodput']:.2f} /s"))
    for error, count in result["errors"].items():
        note(f"{count} failed: {error}")
    return rows
