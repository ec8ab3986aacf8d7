"""Takes the turns: A B A B …, each noted with what the machine was like, and keeps all of it in one JSON file."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.peers import online
from benchmarks.peers.machine import Machine, others_share
from benchmarks.peers.peer import Peer, Settings
from benchmarks.peers.process import Engine, Server, Worker
from benchmarks.peers.worker import Job
from benchmarks.peers.workloads import START, Workload, common_prefix_len

WARM_UP = {"num_prompts": 4, "length": 256, "output_len": 4}
WARM_UP_TURN = 1_000_000
SPECIAL_TOKENS = 16
"""So many ids at the end of the vocabulary are left out of prompts: generated checkpoints have theirs there."""
FIRST_TOKEN = Workload(name="first token", title="", num_prompts=1, input_len=16, output_len=1)


@dataclass(frozen=True, slots=True)
class Contestant:
    """A peer with weights of one precision."""

    peer: Peer
    precision: str

    def __str__(self) -> str:
        return f"{self.peer.name} {self.precision}"

    def can(self, workload: Workload) -> bool:
        if workload.online:
            return self.peer.has_server
        return self.peer.workloads is None or workload.name in self.peer.workloads


class Contest:
    """One run. `directory` gets figures.json, rewritten after every turn, and the engines' logs."""

    def __init__(
        self,
        contestants: Sequence[Contestant],
        checkpoint: Path,
        settings: Settings,
        *,
        directory: Path,
        timeout: float,
    ) -> None:
        self._directory = directory
        self._timeout = timeout
        self._machine = Machine(settings.threads)
        config = json.loads((checkpoint / "config.json").read_text())
        self._settings = replace(settings, max_len=min(settings.max_len, config["max_position_embeddings"]))
        self._vocab_size = config["vocab_size"] - SPECIAL_TOKENS
        self._models = {each: each.peer.prepare(checkpoint, each.precision) for each in contestants}
        self._weight_bytes = {
            each: each.peer.weight_bytes(model, each.precision) for each, model in self._models.items()
        }
        self._figures: dict[str, Any] = {
            "checkpoint": checkpoint.resolve().name,
            "checkpoint_bytes": sum(file.stat().st_size for file in checkpoint.glob("*.safetensors")),
            "date": time.strftime("%Y-%m-%d %H:%M"),
            "machine": self._machine.describe(),
            "settings": asdict(self._settings),
            "workloads": {},
            "records": [],
        }
        directory.mkdir(parents=True, exist_ok=True)

    def offline(self, workloads: Sequence[Workload], turns: int) -> None:
        """Each engine loaded once and stopped between its turns."""
        self._note_workloads(workloads)
        with ExitStack() as stack:
            workers = {each: stack.enter_context(self._worker(each)) for each in self._models}
            for workload in workloads:
                for each, worker in workers.items():
                    if each.can(workload):
                        with worker.turn():
                            worker.ask(self._job(workload.shortened(**WARM_UP), WARM_UP_TURN))
            for turn in range(turns):
                for workload in workloads:
                    for each, worker in workers.items():
                        if each.can(workload):
                            with worker.turn():
                                self._ask(each, worker, workload, turn)

    def starts(self, workloads: Sequence[Workload], turns: int) -> None:
        """Each engine started anew for its turn, then asked for `workloads`; one without a server for a token alone."""
        self._note_workloads(workloads)
        for turn in range(turns):
            for each in self._models:
                if each.peer.has_server:
                    self._serve(each, workloads, turn)
                else:
                    self._start(each, turn)

    def agreement(self, workload: Workload) -> list[tuple[str, int]]:
        """How many of the first tokens each engine has in common with the first one: do they compute the same model?"""
        tokens = {}
        for each in self._models:
            with self._worker(each) as worker, worker.turn():
                tokens[str(each)] = worker.ask(self._job(workload, 0))["first_tokens"]
        expected = next(iter(tokens.values()))
        return [(name, common_prefix_len([expected, found])) for name, found in tokens.items()]

    def _serve(self, each: Contestant, workloads: Sequence[Workload], turn: int) -> None:
        before = self._conditions()
        log = self._log(each, "server")
        with Server(each.peer, self._models[each], self._with(each), log, self._timeout) as server:
            self._record(each, START, turn, server, {**before, "seconds": server.first_token_s})
            for workload in workloads:
                before = self._conditions()
                with others_share(server.process) as share:  # the load generator is one of the others
                    result = online.measure(server.url, workload, turn, self._vocab_size)
                self._record(each, workload.name, turn, server, {**before, **share, **result})

    def _start(self, each: Contestant, turn: int) -> None:
        before = self._conditions()
        begin = time.perf_counter()
        with self._worker(each) as worker, worker.turn():
            worker.ask(self._job(FIRST_TOKEN, turn))
            self._record(each, START, turn, worker, {**before, "seconds": time.perf_counter() - begin})

    def _ask(self, each: Contestant, worker: Worker, workload: Workload, turn: int) -> None:
        before = self._conditions()
        with others_share(worker.process) as share:
            result = worker.ask(self._job(workload, turn))
        self._record(each, workload.name, turn, worker, {**before, **share, **result})

    def _worker(self, each: Contestant) -> Worker:
        print(f"loading {each}", file=sys.stderr)
        log = self._log(each, "worker")
        return Worker(each.peer, self._models[each], self._with(each), log, self._timeout)

    def _conditions(self) -> dict[str, float]:
        return {"read_gb_per_s": self._machine.read_bandwidth(), "load_average": os.getloadavg()[0]}

    def _record(self, each: Contestant, workload: str, turn: int, engine: Engine, result: Mapping[str, Any]) -> None:
        record = {"peer": each.peer.name, "precision": each.precision, "workload": workload, "turn": turn}
        memory = {
            "weight_bytes": self._weight_bytes[each],
            "loaded_bytes": engine.loaded_bytes,
            "resident_bytes": engine.resident_bytes(),
        }
        self._figures["records"].append({**record, **result, **memory})
        (self._directory / "figures.json").write_text(json.dumps(self._figures, indent=1) + "\n")
        print(f"{workload} turn {turn + 1}, {each}: {result['seconds']:.2f} s", file=sys.stderr)

    def _note_workloads(self, workloads: Sequence[Workload]) -> None:
        fields = {workload.name: {**asdict(workload), "rate": str(workload.rate)} for workload in workloads}
        self._figures["workloads"].update(fields)

    def _job(self, workload: Workload, turn: int) -> Job:
        return Job(workload=asdict(workload), turn=turn, vocab_size=self._vocab_size)

    def _with(self, each: Contestant) -> Settings:
        return replace(self._settings, precision=each.precision)

    def _log(self, each: Contestant, kind: str) -> Path:
        return self._directory / f"{each.peer.name}-{each.precision}-{kind}.log"
