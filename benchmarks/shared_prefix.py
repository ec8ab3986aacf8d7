"""Shared prefixes over several small engines: the gateway's default policy against round robin, side by side.

    python tools/make_checkpoint.py --shape bench-50m /tmp/bench-50m
    python -m benchmarks.shared_prefix /tmp/bench-50m --rate 6 --turns 3

Each engine's KV cache holds about a quarter of the prefixes. The same engines serve each policy in turn, with fresh
prefixes each time, every one of which is sent once before anything is measured; the order of the policies alternates.
Two controls have to come out even: prompts that share nothing, and a load so low that nobody waits. The engines share
this machine's cores: what one computes twice, all of them wait for.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from quire.cli.bench.serve import Load, run_load, summarise_load
from quire.cli.bench.workload import Workload, arrival_times, make_requests

START_TIMEOUT = 120.0
ROUND_ROBIN = """
apiVersion: llm-d.ai/v1alpha1
kind: EndpointPickerConfig
plugins: [{type: round-robin-picker}, {type: single-profile-handler}]
schedulingProfiles: [{name: default, plugins: [{pluginRef: round-robin-picker}]}]
"""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One load. `shared` prompts begin with one of `groups` prefixes; the others are as long, and share nothing."""

    name: str
    rate: float
    shared: bool
    groups: int
    prefix: int
    question: int
    output: int
    requests: int


@dataclass(frozen=True)
class Result:
    ttft_p50: float
    ttft_p90: float
    requests_per_second: float
    cached_share: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--engines", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1, help="of each engine")
    parser.add_argument("--groups", type=int, default=32)
    parser.add_argument("--prefix", type=int, default=1500, help="tokens")
    parser.add_argument("--question", type=int, default=64)
    parser.add_argument("--output", type=int, default=16)
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--rate", type=float, nargs="+", default=[6.0], help="requests a second, near saturation")
    parser.add_argument("--low-rate", type=float, default=0.3)
    parser.add_argument(
        "--kv-gib", type=float, help="of each engine; a quarter of the prefixes and some more if not given"
    )
    parser.add_argument("--kv-bytes-per-token", type=int, default=12 * 2 * 4 * 64 * 2)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--skip-controls", action="store_true")
    parser.add_argument("--only-controls", action="store_true")
    arguments = parser.parse_args()
    cases = make_cases(arguments)
    quarter = arguments.groups / arguments.engines * (arguments.prefix + arguments.question + arguments.output)
    running = 4 * (arguments.prefix + arguments.question + arguments.output)
    gib = arguments.kv_gib or (quarter + running) * arguments.kv_bytes_per_token / 2**30
    with contextlib.ExitStack() as stack:
        urls = [stack.enter_context(engine(arguments.model, arguments.threads, gib)) for _ in range(arguments.engines)]
        print(f"{arguments.engines} engines of {arguments.threads} threads, {gib:.3f} GiB of KV cache each", flush=True)
        run_all(cases, urls, arguments.turns)


def make_cases(arguments: argparse.Namespace) -> list[Case]:
    base = Case(
        name="",
        rate=0.0,
        shared=True,
        groups=arguments.groups,
        prefix=arguments.prefix,
        question=arguments.question,
        output=arguments.output,
        requests=arguments.requests,
    )
    rates = [] if arguments.only_controls else arguments.rate
    cases = [replace(base, name=f"shared, {rate:g}/s", rate=rate) for rate in rates]
    if not arguments.skip_controls:
        few = max(arguments.requests // 4, 20)
        rate = min(arguments.rate) / 4
        cases.append(replace(base, name=f"nothing shared, {rate:g}/s", rate=rate, shared=False, requests=few))
        low = arguments.low_rate
        cases.append(replace(base, name=f"nothing shared, {low:g}/s", rate=low, shared=False, requests=16))
    return cases


def run_all(cases: list[Case], urls: list[str], turns: int) -> None:
    found: dict[tuple[str, str], list[Result]] = {}
    seed = int(time.time())
    for turn in range(turns):
        policies = ["default", "round-robin"] if turn % 2 == 0 else ["round-robin", "default"]
        for case in cases:
            for policy in policies:
                seed += 1
                with gateway(urls, policy) as url:
                    result = asyncio.run(measure(case, url, seed, turn))
                found.setdefault((case.name, policy), []).append(result)
                print(f"turn {turn}  {case.name:24} {policy:12} {result}", flush=True)
    for case in cases:
        ours, theirs = found[case.name, "default"], found[case.name, "round-robin"]
        report(case.name, ours, theirs)


def report(name: str, ours: list[Result], theirs: list[Result]) -> None:
    """Ratios within each turn, then their median [least, most]: above 1 the default policy is better."""
    pairs = list(zip(ours, theirs, strict=True))
    ttft = [rr.ttft_p90 / mine.ttft_p90 for mine, rr in pairs]
    rates = [mine.requests_per_second / rr.requests_per_second for mine, rr in pairs]
    for title, values in (("TTFT p90, round robin / default", ttft), ("throughput, default / round robin", rates)):
        print(f"{name:26} {title:36} {statistics.median(values):.2f} [{min(values):.2f}-{max(values):.2f}]")


async def measure(case: Case, url: str, seed: int, turn: int) -> Result:
    """Prompts are of `seed`, so that no cache has them; arrivals of `turn`, the same for every policy."""
    workload = Workload(
        kind="shared-prefix" if case.shared else "random",
        num_prompts=case.requests + (case.groups if case.shared else 4),
        input_len=case.question + (0 if case.shared else case.prefix),
        output_len=case.output,
        prefix_len=case.prefix if case.shared else 0,
        num_prefixes=case.groups if case.shared else 1,
        vocab_size=8000,
        seed=seed,
    )
    requests = make_requests(workload)
    warm = case.groups if case.shared else 4
    measured = requests[warm:]
    random.Random(seed).shuffle(measured)  # in turns they would suit whoever takes turns
    load = Load(
        url=url,
        endpoint="completions",
        model="bench",
        warmup=requests[:warm],
        requests=measured,
        arrivals=[float(at) for at in arrival_times(case.requests, case.rate, 1.0, turn)],
        max_concurrency=None,
        extra={"temperature": 0.0, "ignore_eos": True},
    )
    _, records, duration = await run_load(load, None, show_progress=False)
    told, summaries = summarise_load(records, duration, {})
    assert told["failed"] == 0, told["errors"]
    ttft = summaries["TTFT"]
    assert ttft.p50 is not None
    assert ttft.p90 is not None
    share = told["cached_tokens"] / max(told["prompt_tokens"], 1)
    return Result(round(ttft.p50), round(ttft.p90), round(told["request_throughput"], 2), round(share, 2))


@contextlib.contextmanager
def command(arguments: list[str], says: str) -> Iterator[str]:
    """A `quire` process, and the address that it says it is at."""
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen([sys.executable, "-m", "quire", *arguments], stdout=subprocess.PIPE, stderr=log)
        try:
            assert process.stdout is not None
            line = process.stdout.readline().decode()
            if not line.startswith(says):
                log.seek(0)
                raise RuntimeError(f"{' '.join(arguments)}: {line}{log.read().decode()[-2000:]}")
            yield line.split()[-1].removesuffix("/v1")
        finally:
            process.terminate()
            process.wait(60)


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


@contextlib.contextmanager
def engine(model: Path, threads: int, gib: float) -> Iterator[str]:
    arguments = ["serve", str(model), "--port", str(free_port()), "--threads", str(threads)]
    arguments += ["--kv-cache-memory", f"{gib:.4f}", "--served-model-name", "bench", "--log-level", "error"]
    with command(arguments, "quire serves") as url:
        yield url


@contextlib.contextmanager
def gateway(urls: list[str], policy: str) -> Iterator[str]:
    arguments = ["gateway", "--endpoints", ",".join(urls), "--port", "0", "--log-level", "error"]
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        if policy == "round-robin":
            file.write(ROUND_ROBIN)
            file.flush()
            arguments += ["--policy", file.name]
        with command(arguments, "quire gateway") as url:
            wait_ready(url, len(urls))
            yield url


def wait_ready(url: str, endpoints: int) -> None:
    deadline = time.monotonic() + START_TIMEOUT
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError), urllib.request.urlopen(url + "/ready", timeout=5) as answer:
            if json.load(answer)["usable_endpoints"] == endpoints:
                return
        time.sleep(0.1)
    raise RuntimeError("the gateway did not find its endpoints")


if __name__ == "__main__":
    main()
