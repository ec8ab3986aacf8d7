"""What engines are asked to do. Prompts are token ids; all ignore EOS."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Protocol

BATCHES = (1, 8, 64, 256)
CONTEXT = 1024
PREFILLS = (1024, 4096)
FIRST_STEPS, LAST_STEPS = 64, 320
"""A decode is timed twice, with outputs of these lengths. What the two have in common, prompts and a batch that fills
and empties, cancels out: what is left are `LAST_STEPS - FIRST_STEPS` steps of the full batch."""
VOCABULARY = 10_000
LONGEST = 5120


class Engine(Protocol):
    def generate(
        self, prompts: Sequence[Sequence[int]], output_lens: Sequence[int], *, temperature: float = 0.0
    ) -> float:
        """Seconds that all of them took together."""
        ...

    def room(self) -> int:
        """Tokens that its KV cache holds."""
        ...


@dataclass(frozen=True, kw_only=True)
class Work:
    """Requests that are begun together."""

    prompts: list[list[int]]
    output_lens: list[int]

    @property
    def num_tokens(self) -> int:
        return sum(map(len, self.prompts)) + sum(self.output_lens)


def nano_vllm() -> Work:
    """The one of nano-vllm's `bench.py`, number by number: 256 requests of 100 to 1024 tokens in and out."""
    numbers = random.Random(0)
    prompts = [[numbers.randint(0, 10000) for _ in range(numbers.randint(100, 1024))] for _ in range(256)]
    return Work(prompts=prompts, output_lens=[numbers.randint(100, 1024) for _ in range(256)])


def shortened(work: Work, most: int, vocab_size: int) -> Work:
    """For trying out: so many requests of so many tokens at most, of a small vocabulary."""
    return Work(
        prompts=[[token % vocab_size for token in prompt[:most]] for prompt in work.prompts[:most]],
        output_lens=[min(length, most) for length in work.output_lens[:most]],
    )


class Prompts:
    """New ones each time, so that no prefix cache knows them."""

    def __init__(self, turn: int, vocab_size: int) -> None:
        self._numbers = random.Random(turn + 1)
        self._vocab_size = min(vocab_size, VOCABULARY)

    def make(self, count: int, length: int) -> list[list[int]]:
        return [[self._numbers.randrange(self._vocab_size) for _ in range(length)] for _ in range(count)]


def decode_prompt_len(context: int, steps: tuple[int, int]) -> int:
    """So that a request has `context` tokens half-way between these two lengths of its output."""
    return max(1, context - sum(steps) // 2)


def decode_seconds(engine: Engine, prompts: Prompts, batch: int, *, steps: tuple[int, int], context: int) -> float:
    """Of one step in which `batch` requests decode, with `context` tokens each in the middle of what is timed."""
    prompt_len = decode_prompt_len(context, steps)
    short, long = (engine.generate(prompts.make(batch, prompt_len), [length] * batch) for length in steps)
    return (long - short) / (steps[1] - steps[0])


def measure(
    engine: Engine,
    prompts: Prompts,
    *,
    batches: Sequence[int],
    prefills: Sequence[int],
    steps: tuple[int, int],
    context: int,
    nano: Work | None,
) -> Iterator[tuple[str, float]]:
    """Names and seconds, as they are found. What the KV cache has no room for is left out, and told on stderr."""
    for batch in batches:
        longest = decode_prompt_len(context, steps) + steps[1]
        if batch * longest > engine.room():
            print(f"no room for {batch} requests of {longest} tokens", file=sys.stderr)
            continue
        engine.generate(prompts.make(batch, 64), [8] * batch)  # what is compiled or captured on first use is
        yield f"decode {batch}", decode_seconds(engine, prompts, batch, steps=steps, context=context)
    for length in prefills:
        engine.generate(prompts.make(1, length), [1])
        yield f"prefill {length}", median(engine.generate(prompts.make(1, length), [1]) for _ in range(3))
    if nano is not None:
        if nano.num_tokens > engine.room():
            print(f"nano-vllm's {nano.num_tokens} tokens have no room all at once", file=sys.stderr)
        engine.generate(prompts.make(len(nano.prompts), 64), [8] * len(nano.prompts), temperature=0.6)
        yield "nano", engine.generate(nano.prompts, nano.output_lens, temperature=0.6)
