"""One engine, loaded in its own environment: answers each line of JSON on stdin with one on stdout.

    python -m benchmarks.peers.worker PEER HOME MODEL SETTINGS

A request has the fields of `Job`. The first line out tells that the model is loaded. What the engine itself prints goes
to stderr.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.peers.peer import Generate, Settings
from benchmarks.peers.registry import PEERS
from benchmarks.peers.workloads import Workload


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A workload's fields, which turn it is, and the size of the vocabulary to draw prompts from."""

    workload: dict[str, Any]
    turn: int
    vocab_size: int


def main() -> None:
    name, home, model, settings = sys.argv[1:]
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    generate = PEERS[name](Path(home)).load(Path(model), Settings(**json.loads(settings)))
    print(json.dumps({"loaded": True}), file=answers)
    for line in sys.stdin:
        job = Job(**json.loads(line))
        result = measure(generate, Workload(**job.workload), job.turn, job.vocab_size)
        print(json.dumps(result), file=answers)


def measure(generate: Generate, workload: Workload, turn: int, vocab_size: int) -> dict[str, Any]:
    """Seconds of the whole workload, and, for a single stream, of another prompt's first token.

    `generate` returns when all is done, in every engine; what a stream's prompt took is told by asking for one token.
    """
    first_token_s = None
    if workload.num_prompts == 1 and workload.output_len > 1:
        first_token_s, _ = timed(generate, workload.prompts(-turn - 1, vocab_size), 1)
    seconds, outputs = timed(generate, workload.prompts(turn, vocab_size), workload.output_len)
    return {"seconds": seconds, "first_token_s": first_token_s, "first_tokens": outputs[0][:16]}


def timed(generate: Generate, prompts: Sequence[Sequence[int]], output_len: int) -> tuple[float, list[list[int]]]:
    begin = time.perf_counter()
    outputs = generate(prompts, output_len)
    seconds = time.perf_counter() - begin
    lengths = [len(output) for output in outputs]
    assert lengths == [output_len] * len(prompts), f"{output_len} tokens asked for, {lengths} got"
    return seconds, outputs


if __name__ == "__main__":
    main()
