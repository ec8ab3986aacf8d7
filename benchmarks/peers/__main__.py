"""`python -m benchmarks.peers`: set the engines up, measure them in turns, tell the result."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from pathlib import Path

from benchmarks.peers.llama_cpp import LlamaCpp
from benchmarks.peers.machine import require_quiet
from benchmarks.peers.measure import Contest, Contestant
from benchmarks.peers.peer import Settings
from benchmarks.peers.registry import PEERS
from benchmarks.peers.report import draw, markdown
from benchmarks.peers.workloads import OFFLINE, START, WORKLOADS

DEFAULT_HOME = Path("~/.cache/quire-peers")
SHORT = {"num_prompts": 4, "length": 64, "output_len": 8}


def main() -> None:
    arguments = parse_arguments()
    # As an interrupt does, so that the engines are not left behind, stopped as most of them are.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))
    commands = {"setup": setup, "run": run, "check": check, "report": report, "llama-bench": llama_bench}
    commands[arguments.command](arguments)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers", description=__doc__)
    parser.add_argument("--home", type=Path, default=DEFAULT_HOME, help="where the peers and their models are kept")
    commands = parser.add_subparsers(dest="command", required=True)

    each = commands.add_parser("setup", help="make the environments of these peers")
    each.add_argument("peers", nargs="+", choices=sorted(PEERS))

    for name, words in {
        "run": "measure; figures.json, logs, a table and a picture go to --out",
        "check": "compare the first tokens of each engine with those of the first one",
    }.items():
        each = commands.add_parser(name, help=words)
        each.add_argument("checkpoint", type=Path)
        each.add_argument("--engines", type=contestant_name, nargs="+", required=True, metavar="PEER:PRECISION",
                          help=f"of {', '.join(PEERS)} and bf16, int8, int4; in the order of their turns")  # fmt: skip
        each.add_argument("--out", type=Path, default=Path("peers-out"))
        each.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
        each.add_argument("--kv-gib", type=float, default=2.0, help="of each engine's KV pool, where it takes a size")
        each.add_argument("--timeout", type=float, default=1800.0, help="seconds that a load or a turn may take")
        if name == "run":
            each.add_argument("--workloads", nargs="+", choices=[*WORKLOADS, START], default=[*WORKLOADS, START])
            each.add_argument("--turns", type=int, default=5)
            each.add_argument("--short", action="store_true", help="a few tokens of each, to try the harness out")
            each.add_argument("--noisy", action="store_true", help="measure on a busy machine all the same")

    each = commands.add_parser("report", help="the table and the picture of a run that was made before")
    each.add_argument("figures", type=Path)
    each.add_argument("--png", type=Path)

    each = commands.add_parser("llama-bench", help="llama.cpp's own figures, to check ours of it against")
    each.add_argument("checkpoint", type=Path)
    each.add_argument("--precision", choices=LlamaCpp.precisions, default="bf16")
    each.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    each.add_argument("--turns", type=int, default=3)

    arguments = parser.parse_args()
    arguments.home = arguments.home.expanduser()
    return arguments


def contestant_name(text: str) -> tuple[str, str]:
    peer, _, precision = text.partition(":")
    if peer not in PEERS or (precision or "bf16") not in PEERS[peer].precisions:
        raise argparse.ArgumentTypeError(f"{text!r} is not one of PEER or PEER:PRECISION")
    return peer, precision or "bf16"


def setup(arguments: argparse.Namespace) -> None:
    for name in arguments.peers:
        PEERS[name](arguments.home).setup()


def run(arguments: argparse.Namespace) -> None:
    if not arguments.noisy:
        require_quiet(0.5)
    wanted = [WORKLOADS[name].shortened(**SHORT) if arguments.short else WORKLOADS[name]
              for name in arguments.workloads if name != START]  # fmt: skip
    offline = [workload for workload in wanted if not workload.online]
    online = [workload for workload in wanted if workload.online]
    contest = make_contest(arguments)
    if offline:
        contest.offline(offline, arguments.turns)
    if online or START in arguments.workloads:
        contest.starts(online, arguments.turns)
    tell(arguments.out / "figures.json", arguments.out / "figures.png")


def check(arguments: argparse.Namespace) -> None:
    workload = OFFLINE[0].shortened(num_prompts=1, length=64, output_len=16)
    for name, common in make_contest(arguments).agreement(workload):
        print(f"{name}: {common} of {workload.output_len} first tokens in common")


def make_contest(arguments: argparse.Namespace) -> Contest:
    peers = {name: PEERS[name](arguments.home) for name, _ in arguments.engines}
    settings = Settings(precision="bf16", threads=arguments.threads, kv_gib=arguments.kv_gib)
    return Contest(
        [Contestant(peers[name], precision) for name, precision in arguments.engines],
        arguments.checkpoint,
        settings,
        directory=arguments.out,
        timeout=arguments.timeout,
    )


def report(arguments: argparse.Namespace) -> None:
    tell(arguments.figures, arguments.png)


def tell(path: Path, png: Path | None) -> None:
    figures = json.loads(path.read_text())
    print(markdown(figures))
    if png is not None:
        draw(figures, png)


def llama_bench(arguments: argparse.Namespace) -> None:
    peer = LlamaCpp(arguments.home)
    model = peer.prepare(arguments.checkpoint, arguments.precision)
    peer.own_benchmarks(model, arguments.threads, arguments.turns)


if __name__ == "__main__":
    main()
