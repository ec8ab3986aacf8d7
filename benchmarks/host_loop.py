"""What the host does for a decode step, without a device: microseconds of the engine process per step, by phase.

    python -m benchmarks.host_loop [--batches 1 8 64 256] [--steps 300] [--turns 3] [--context 1024] [--json]

The real engine, scheduler, seats and decode loop, one step ahead, as on a GPU, and a receiver of the outputs in a
process of its own. Only what a device would do is left out: graphs whose `run` does nothing, and a forward pass of
prompts that gives zeros. A CPU stands in for the device, so that uploads cost what a copy within memory does.

Requests have contexts of about `--context` tokens, begin together and decode for all of the measured steps. Figures are
CPU time of the thread that runs the steps, medians over the steps of a turn; of the turns, the median, and for `least`
the least. `process`: the mean of a step, what ZeroMQ's thread does included.
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import zmq

from benchmarks.gpu.hollow import random_weights, write_hollow
from quire.config.engine import EngineConfig
from quire.core.request import EngineRequest
from quire.core.sampling import SamplingParams
from quire.engine import loop, process
from quire.engine.build import build_engine
from quire.engine.decode_loop import DecodeLoop
from quire.engine.loop import Engine
from quire.engine.runner import Drawing, Runner
from quire.engine.seats import Seats
from tools.make_checkpoint import SHAPES

LONGEST = 4096
BLOCK_SIZE = 32
HOLLOW = replace(SHAPES["tiny"], layers=1, heads=1, kv_heads=1, head_dim=16, max_positions=LONGEST)
WARM_UP_STEPS = 20
PHASES = ("decide", "apply", "prepare", "launch", "wait", "settle", "send")


class NoWork:
    """Graphs of a device that takes no time."""

    def has(self, key: int) -> bool:
        return True

    def capture(self, key: int, work: Callable[[], None]) -> None:
        raise AssertionError("there is nothing to capture")

    def run(self, key: int, work: Callable[[], None]) -> None:
        pass


def build(directory: Path, batch: int, *, prefix_caching: bool) -> Engine:
    config = EngineConfig(
        model=str(write_hollow(directory, HOLLOW)),
        device="cpu",
        isa="reference",
        dtype="float32",
        block_size=BLOCK_SIZE,
        max_num_seqs=256,
        max_num_batched_tokens=8192,
        num_kv_blocks=batch * LONGEST // BLOCK_SIZE + 64,
        async_scheduling=True,
        enable_prefix_caching=prefix_caching,
    )
    with random_weights(), mock.patch("quire.engine.build.Direct", NoWork):
        engine = build_engine(config)
    decoder: Any = engine._runner._decoder
    assert isinstance(engine._runner._decode, DecodeLoop)
    decoder.forward = lambda batch, _kv: torch.zeros(len(batch.logits_rows_s), HOLLOW.hidden)
    return engine


def submit(engine: Engine, turn: int, batch: int, context: int) -> None:
    """Greedy chat requests as the front end sends them; their contexts end anywhere in a block."""
    for number in range(batch):
        length = context - number % BLOCK_SIZE
        sampling = SamplingParams(temperature=0.0, max_tokens=None, seed=number)
        tokens = [(turn * batch + number + position) % 500 for position in range(length)]
        request = EngineRequest(
            request_id=f"chatcmpl-{turn:08x}{number:08x}-0",
            prompt_token_ids=tokens,
            sampling=sampling,
            arrival_time=time.monotonic(),
        )
        assert engine.submit(request) is None


class Stopwatch:
    """Seconds by phase; what a phase calls that is one itself counts as the inner one's."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self._inner = [0.0]

    def timed(self, phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **options: Any) -> Any:
            self._inner.append(0.0)
            begin = time.thread_time()
            try:
                return function(*args, **options)
            finally:
                took = time.thread_time() - begin
                self.seconds[phase] += took - self._inner.pop()
                self._inner[-1] += took

        return wrapped

    @contextmanager
    def watching(self) -> Iterator[None]:
        places: Sequence[tuple[str, Any, str]] = (
            ("decide", loop, "decide"),
            ("apply", loop, "apply"),
            ("settle", loop, "settle"),
            ("launch", Runner, "launch"),
            ("prepare", Seats, "prepare"),
            ("prepare", Seats, "advance"),
            ("wait", Drawing, "wait"),
            ("send", process, "send"),
        )
        with ExitStack() as stack:
            for phase, owner, name in places:
                stack.enter_context(mock.patch.object(owner, name, self.timed(phase, getattr(owner, name))))
            yield

    def take(self) -> dict[str, float]:
        taken, self.seconds = self.seconds, dict.fromkeys(PHASES, 0.0)
        return taken


def decode(engine: Engine, socket: zmq.Socket[bytes], steps: int, stopwatch: Stopwatch) -> list[dict[str, float]]:
    """Seconds of each of so many steps of the process's loop, by phase."""
    found = []
    for _ in range(steps):
        begin = time.thread_time()
        process.turn(engine, socket, 0)
        total = time.thread_time() - begin
        found.append(stopwatch.take() | {"total": total})
    return found


def measure(engine: Engine, socket: zmq.Socket[bytes], steps: int) -> dict[str, float]:
    """Median microseconds of a step, and ends the requests: its phases, from steps that are watched, and in total, from
    others."""
    while any(state.num_pending == 0 for state in engine._state.requests.values()):
        process.turn(engine, socket, 0)
    batch = engine._state.num_running
    stopwatch = Stopwatch()
    decode(engine, socket, WARM_UP_STEPS, stopwatch)
    begin = time.process_time()
    plain = decode(engine, socket, steps, stopwatch)
    per_step = (time.process_time() - begin) / steps
    with stopwatch.watching():
        watched = decode(engine, socket, steps, stopwatch)
    assert engine._state.num_running == batch
    for request_id in list(engine._state.requests):
        engine.cancel(request_id)
    while engine.has_work:
        engine.step()
    medians = {phase: statistics.median(step[phase] for step in watched) for phase in PHASES}
    medians["rest"] = statistics.median(step["total"] - sum(step[phase] for phase in PHASES) for step in watched)
    medians["total"] = statistics.median(step["total"] for step in plain)
    medians["process"] = per_step
    return {name: seconds * 1e6 for name, seconds in medians.items()}


def receive(address: str) -> None:
    """The front end's end of the wire."""
    with zmq.Context() as context, context.socket(zmq.PAIR) as socket:
        socket.bind(address)
        socket.send(b"ready")
        while socket.recv():
            pass


@contextmanager
def receiver(directory: Path) -> Iterator[zmq.Socket[bytes]]:
    address = f"ipc://{directory}/wire"
    other = multiprocessing.get_context("spawn").Process(target=receive, args=(address,), daemon=True)
    other.start()
    with zmq.Context() as context, context.socket(zmq.PAIR) as socket:
        socket.connect(address)
        socket.recv()
        yield socket
        socket.send(b"")
        other.join()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 64, 256])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--no-prefix-caching", action="store_true")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args()
    report: dict[int, dict[str, list[float]]] = {}
    with tempfile.TemporaryDirectory() as name, receiver(Path(name)) as socket:
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # the receiver keeps the others
        engine = build(Path(name) / "model", max(options.batches), prefix_caching=not options.no_prefix_caching)
        gc.freeze()  # as the process does
        for turn in range(options.turns):
            for batch in options.batches:
                submit(engine, turn, batch, options.context)
                for phase, value in measure(engine, socket, options.steps).items():
                    report.setdefault(batch, {}).setdefault(phase, []).append(value)
    if options.json:
        print(json.dumps(report))
        return
    print(f"{'µs/step':>8}" + "".join(f"{phase:>9}" for phase in (*PHASES, "rest", "total", "least", "process")))
    for batch, figures in report.items():
        values = [statistics.median(values) for values in figures.values()]
        values.insert(-1, min(figures["total"]))
        print(f"{batch:>8}" + "".join(f"{value:>9.0f}" for value in values))


if __name__ == "__main__":
    main()
