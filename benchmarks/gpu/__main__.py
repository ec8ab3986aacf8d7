"""One GPU: what a step takes, beside what the machine's memory and arithmetic allow, and beside other engines.

    PYTHONPATH=src python3 -m benchmarks.gpu qwen3-0.6b qwen3-8b --out gpu.json
    PYTHONPATH=src python3 -m benchmarks.gpu qwen3-8b --beside vllm --vllm-path /tmp/v:/tmp/z --turns 3
    PYTHONPATH=src python3 -m benchmarks.gpu --dry-run

from the root of the repository. Models are shapes with random weights, which are made on the GPU: nothing is read or
downloaded. Timed are a decode step of 1, 8, 64 and 256 requests with 1024 tokens each, from the wall clock over 256
steps of the engine; one prompt of 1024 and of 4096 tokens to its first token; and nano-vllm's `bench.py`. Engines
take turns, each turn in a process of its own, so that start-up is timed as well; figures are medians of the turns.
The limits are measured in the same run. `--dry-run` needs no GPU: it prints the roofline for limits that are given.

Needed beside torch, Triton and numpy: msgspec, psutil, pyzmq and tokenizers (Python 3.12: carry the wheels of msgspec
and pyzmq to a machine that has the others). Not needed: the compiled CPU kernels, cyclopts, obstore, rich.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.gpu.counts import GB, TERA, Limits, count
from benchmarks.gpu.hollow import write_hollow
from benchmarks.gpu.report import lines, rows, table
from benchmarks.gpu.workloads import BATCHES, CONTEXT, FIRST_STEPS, LAST_STEPS, PREFILLS, nano_vllm, shortened
from tools.make_checkpoint import SHAPES

MODELS = ("qwen3-0.6b", "qwen3-8b", "llama-3.1-8b", "qwen3-30b-a3b")
H200 = Limits(bandwidth=4.3e12, flops=788e12)
"""As measured: a copy of 8.6 GB within the device, and an 8192 x 8192 x 8192 product of random numbers."""
ROOT = Path(__file__).parents[2]


def main() -> int:
    arguments = parse()
    report: dict[str, Any] = {"benchmark": "gpu", "models": {}, "failures": []}
    with tempfile.TemporaryDirectory(prefix="quire-gpu-") as scratch:
        limits = H200 if arguments.dry_run else measured_limits(arguments, report)
        limits = Limits(bandwidth=arguments.bandwidth or limits.bandwidth, flops=arguments.flops or limits.flops)
        print(f"limits: copy {limits.bandwidth / GB:,.0f} GB/s, bf16 {limits.flops / TERA:,.0f} TFLOP/s", flush=True)
        for name in arguments.models or MODELS:
            model = write_hollow(Path(scratch) / name, SHAPES[name])
            report["models"][name] = found = one_model(arguments, model, limits)
            report["failures"] += found.pop("failures")
            if arguments.out is not None:  # after each model: a run may be cut off
                arguments.out.write_text(json.dumps(report, indent=2))
    return int(bool(report["failures"]))


def one_model(arguments: argparse.Namespace, model: Path, limits: Limits) -> dict[str, Any]:
    name, options, failures = model.name, arguments.options, []
    counts = count(
        model, quantization=options.get("quantization"), kv_cache_dtype=options.get("kv_cache_dtype", "auto")
    )
    engines = ["quire", *arguments.beside]
    turns: dict[str, list[dict[str, Any]]] = {engine: [] for engine in ([] if arguments.dry_run else engines)}
    for turn in range(0 if arguments.dry_run else arguments.turns):
        # The order alternates, so that a machine that warms up favours nobody.
        for engine in engines if turn % 2 == 0 else engines[::-1]:
            found, trouble = take_turn(arguments, engine, model, turn, counts.vocab_size)
            if trouble is not None:
                failures.append(f"{name}: {engine}, turn {turn}: {trouble}")
                print(failures[-1], file=sys.stderr)
            if found is not None:
                turns[engine].append(found)
                print(f"{name}, {engine}, turn {turn}: {json.dumps(found)}", flush=True)
    nano = shortened(nano_vllm(), arguments.nano, counts.vocab_size) if arguments.nano else None
    wanted = lines(
        counts,
        limits,
        batches=arguments.batches,
        prefills=arguments.prefills,
        context=arguments.context,
        nano=nano,
    )
    found_rows = rows(wanted, turns)
    print(
        f"\n{name}: weights {counts.weight_bytes / GB:,.2f} GB, KV {counts.kv_bytes_per_token / 1024:,.0f} KiB a token"
    )
    print(table(found_rows, list(turns)))
    starts = {
        engine: statistics.median(turn["load_seconds"] + turn["first_token_seconds"] for turn in taken)
        for engine, taken in turns.items()
        if taken
    }
    for engine, seconds in starts.items():
        print(f"{engine}: {seconds:,.1f} s from the start to the first token")
    print(flush=True)
    return {
        "weight_bytes": counts.weight_bytes,
        "kv_bytes_per_token": counts.kv_bytes_per_token,
        "bandwidth": limits.bandwidth,
        "flops": limits.flops,
        "rows": found_rows,
        "start_seconds": starts,
        "turns": turns,
        "failures": failures,
    }


def measured_limits(arguments: argparse.Namespace, report: dict[str, Any]) -> Limits:
    if arguments.device == "cpu":  # to try out the benchmark itself
        return H200
    found, _ = work(arguments, {"engine": "limits", "seconds": arguments.limit_seconds}, None)
    if found is None:
        raise SystemExit("The limits of the GPU could not be measured: is there one? --dry-run needs none.")
    report["limits"] = found
    print(json.dumps(found), flush=True)
    return Limits(bandwidth=found["memory_gb_per_s"]["copy"] * GB, flops=found["matmul_gflop_per_s"]["bf16"] * GB)


def take_turn(
    arguments: argparse.Namespace, engine: str, model: Path, turn: int, vocab_size: int
) -> tuple[dict[str, Any] | None, str | None]:
    settings = {
        "batch": max([*arguments.batches, 256 if arguments.nano else 1]),
        "device": arguments.device,
        "memory_utilization": arguments.memory_utilization,
        "options": arguments.options,
    }
    task = {
        "engine": engine,
        "model": str(model),
        "turn": turn,
        "vocab_size": vocab_size,
        "settings": settings,
        "batches": arguments.batches,
        "prefills": arguments.prefills,
        "steps": arguments.steps,
        "context": arguments.context,
        "nano": arguments.nano,
    }
    return work(arguments, task, arguments.vllm_path if engine == "vllm" else None)


def work(
    arguments: argparse.Namespace, task: dict[str, Any], first_paths: str | None
) -> tuple[dict[str, Any] | None, str | None]:
    """What a worker found, also if it did not come to its end, and what was wrong then. `first_paths` come before all
    others."""
    paths = [first_paths, str(ROOT / "src"), str(ROOT), os.environ.get("PYTHONPATH")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in paths if path)}
    with tempfile.TemporaryDirectory(prefix="quire-gpu-turn-") as directory:
        out = Path(directory) / "found.json"
        command = [sys.executable, "-m", "benchmarks.gpu.worker", json.dumps(task | {"out": str(out)})]
        try:
            ran = subprocess.run(command, env=environment, cwd=ROOT, check=False, timeout=arguments.turn_timeout)
        except subprocess.TimeoutExpired:
            trouble = f"not done after {arguments.turn_timeout:g} s"
        else:
            trouble = f"exit status {ran.returncode}" if ran.returncode else None
        found: dict[str, Any] | None = json.loads(out.read_text()) if out.exists() else None
        return found, trouble


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python3 -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="*", metavar="shape", help=f"{', '.join(sorted(SHAPES))}; {' '.join(MODELS)}")
    parser.add_argument("--beside", nargs="+", choices=("vllm", "transformers"), default=[], help="other engines")
    parser.add_argument("--vllm-path", help="directories with vLLM and what it needs, as in PYTHONPATH")
    parser.add_argument("--turns", type=int, default=1, help="of each engine and model")
    parser.add_argument("--batches", type=int, nargs="*", default=list(BATCHES))
    parser.add_argument("--prefills", type=int, nargs="*", default=list(PREFILLS), help="tokens")
    parser.add_argument("--context", type=int, default=CONTEXT, help="tokens of each request that decodes")
    parser.add_argument("--steps", type=int, nargs=2, default=[FIRST_STEPS, LAST_STEPS], help="a decode's outputs")
    parser.add_argument("--nano", type=int, default=1024, help="cut nano-vllm's bench to this size; 0: leave it out")
    parser.add_argument("--device", default="auto", help="quire's and transformers'")
    parser.add_argument("--memory-utilization", type=float, default=0.9)
    parser.add_argument(
        "--options",
        type=json.loads,
        default={},
        help='of quire, as JSON: {"enforce_eager": true, "quantization": "fp8"}',
    )
    parser.add_argument("--dry-run", action="store_true", help="the roofline alone, by the limits given")
    parser.add_argument("--bandwidth", type=float, help=f"bytes/s; as measured, or {H200.bandwidth:g}")
    parser.add_argument("--flops", type=float, help=f"operations/s; as measured, or {H200.flops:g}")
    parser.add_argument("--limit-seconds", type=float, default=0.5, help="for each of the machine's limits")
    parser.add_argument("--turn-timeout", type=float, default=550.0, help="seconds")
    parser.add_argument("--out", type=Path, help="a file for all figures, as JSON")
    arguments = parser.parse_args()
    for name in arguments.models:
        if name not in SHAPES:
            parser.error(f"no such shape: {name}")
    if arguments.steps[0] < 1 or arguments.steps[1] <= arguments.steps[0]:
        parser.error("--steps takes two rising numbers")
    if "vllm" in arguments.beside and arguments.vllm_path is None:
        print("--vllm-path is not given: vLLM is taken from this Python's own packages", file=sys.stderr)
    return arguments


if __name__ == "__main__":
    sys.exit(main())
