"""The one definition of what every engine is asked to do. Standard library only: the workers import it too."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """Requests of `shared_len + input_len` prompt tokens, `shared_len` the same for all, and `output_len` new ones.

    All are there at once, unless `rate` says how many arrive per second. `online` ones go through a server.
    """

    name: str
    title: str
    num_prompts: int
    shared_len: int = 0
    input_len: int
    output_len: int
    online: bool = False
    rate: float = float("inf")

    @property
    def prompt_len(self) -> int:
        return self.shared_len + self.input_len

    def prompts(self, turn: int, vocab_size: int) -> list[list[int]]:
        """Token ids. Another turn has other prompts, so that no prefix cache knows them; the same for every engine."""
        rng = random.Random(f"{self.name} {turn}")
        shared = rng.choices(range(vocab_size), k=self.shared_len)
        return [shared + rng.choices(range(vocab_size), k=self.input_len) for _ in range(self.num_prompts)]

    def shortened(self, *, num_prompts: int, length: int, output_len: int) -> Workload:
        """The same kind of work, but no more than so much of it: for warming up, and for trying the harness out."""
        return replace(
            self,
            num_prompts=min(self.num_prompts, num_prompts),
            shared_len=min(self.shared_len, length),
            input_len=min(self.input_len, length),
            output_len=min(self.output_len, output_len),
        )


OFFLINE = (
    Workload(name="W1", title="one stream, 128 in, 128 out", num_prompts=1, input_len=128, output_len=128),
    Workload(name="W2", title="prefill, 2048 in, 1 out", num_prompts=1, input_len=2048, output_len=1),
    Workload(name="W3", title="32 requests, 256 in, 64 out", num_prompts=32, input_len=256, output_len=64),
    Workload(name="W4", title="32 requests, 1024 shared + 32 in, 32 out", num_prompts=32, shared_len=1024,
             input_len=32, output_len=32),
)  # fmt: skip
ONLINE = (
    Workload(name="W5", title="64 requests at once to a server, 128 in, 64 out", num_prompts=64, input_len=128,
             output_len=64, online=True),
    Workload(name="W5r", title="64 requests to a server, 2 per second, 128 in, 64 out", num_prompts=64, input_len=128,
             output_len=64, online=True, rate=2.0),
)  # fmt: skip
START = "W6"
"""Not a workload of requests: from a command to its first token. W7, memory, is noted beside every turn."""

WORKLOADS = {workload.name: workload for workload in (*OFFLINE, *ONLINE)}


def common_prefix_len(sequences: Sequence[Sequence[int]]) -> int:
    """Of all of them, at most the shortest one's length."""
    columns = zip(*sequences, strict=False)
    shortest = min(map(len, sequences))
    return next((index for index, column in enumerate(columns) if len(set(column)) > 1), shortest)
