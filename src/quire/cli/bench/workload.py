"""What the benchmarks ask for: prompts of random tokens or words, and when they arrive. All from a seed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from quire.core.errors import ConfigError

Format = Literal["token-ids", "text"]
Kind = Literal["random", "shared-prefix"]

# Common one-token words of most vocabularies, so that a text of n words has about n tokens.
_TEXT = """
    the of and to in is you that it he was for on are as with his they at be this have from or one had by word but not
    what all were we when your can said there use an each which she do how their if will up other about out many then
    them these so some her would make like him into time has look two more write go see number no way could people my
    than first water been call who its now find long down day did get come made may part
"""
WORDS = tuple(_TEXT.split())


def require(name: str, value: object, holds: bool, rule: str) -> None:
    """Raise `ConfigError`, naming the flag of the field `name`, unless `holds`."""
    if not holds:
        raise ConfigError(f"--{name.replace('_', '-')} is {value!r}.", param=name, remedy=f"It must be {rule}.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """`input_len` and `output_len` are tokens, each drawn evenly from [n(1-r), n(1+r)], r being `range_ratio`.

    Prompts of a `shared-prefix` workload begin with one of `num_prefixes` prefixes of `prefix_len` tokens, which
    come on top of `input_len`.
    """

    kind: Kind = "random"
    num_prompts: int
    input_len: int
    output_len: int
    range_ratio: float = 0.0
    prefix_len: int = 0
    num_prefixes: int = 1
    vocab_size: int = 1024
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("num_prompts", "input_len", "output_len", "num_prefixes", "vocab_size"):
            require(name, getattr(self, name), getattr(self, name) >= 1, "at least 1")
        require("random_range_ratio", self.range_ratio, 0.0 <= self.range_ratio < 1.0, "at least 0 and below 1")
        require("prefix_len", self.prefix_len, self.prefix_len >= 0, "at least 0")
        if self.kind == "shared-prefix":
            require("prefix_len", self.prefix_len, self.prefix_len > 0, "at least 1 for the shared-prefix workload")


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchRequest:
    """A prompt as token ids or as text, and how many tokens it wants."""

    prompt: list[int] | str
    output_len: int


def make_requests(workload: Workload, prompt_format: Format = "token-ids") -> list[BenchRequest]:
    """The same workload gives the same requests, whoever is measured."""
    rng = np.random.default_rng(workload.seed)
    prefix_len = workload.prefix_len if workload.kind == "shared-prefix" else 0
    prefixes = [_draw(rng, prefix_len, workload, prompt_format) for _ in range(workload.num_prefixes)]
    input_lens = _lengths(rng, workload.input_len, workload)
    output_lens = _lengths(rng, workload.output_len, workload)
    requests = []
    for index, (input_len, output_len) in enumerate(zip(input_lens, output_lens, strict=True)):
        units = prefixes[index % workload.num_prefixes] + _draw(rng, input_len, workload, prompt_format)
        prompt = " ".join(WORDS[unit] for unit in units) if prompt_format == "text" else units
        requests.append(BenchRequest(prompt=prompt, output_len=output_len))
    return requests


def arrival_times(num_requests: int, rate: float, burstiness: float, seed: int) -> npt.NDArray[np.float64]:
    """Seconds from the start at which each request is sent, in order.

    `rate` is requests per second; infinite sends all at once. Gaps are gamma-distributed with shape `burstiness` and
    mean 1/rate: 1 is a Poisson process, below 1 comes in bursts, above 1 is more even.
    """
    require("request_rate", rate, rate > 0 and not math.isnan(rate), "above 0, or inf")
    require("burstiness", burstiness, 0 < burstiness < math.inf, "above 0")
    if math.isinf(rate):
        return np.zeros(num_requests)
    gaps = np.random.default_rng(seed).gamma(shape=burstiness, scale=1.0 / (rate * burstiness), size=num_requests)
    return np.cumsum(gaps)


def _lengths(rng: np.random.Generator, mean: int, workload: Workload) -> list[int]:
    low = max(1, math.floor(mean * (1 - workload.range_ratio)))
    high = max(low, math.ceil(mean * (1 + workload.range_ratio)))
    drawn: list[int] = rng.integers(low, high, size=workload.num_prompts, endpoint=True).tolist()
    return drawn


def _draw(rng: np.random.Generator, count: int, workload: Workload, prompt_format: Format) -> list[int]:
    """`count` token ids, or indices of words."""
    bound = len(WORDS) if prompt_format == "text" else workload.vocab_size
    drawn: list[int] = rng.integers(0, bound, size=count).tolist()
    return drawn


def parse_slos(texts: Sequence[str]) -> dict[str, float]:
    """`ttft=500` … as milliseconds by metric (ttft, tpot, itl, e2e)."""
    slos = {}
    for text in texts:
        name, _, value = text.partition("=")
        try:
            limit = float(value)
        except ValueError:
            limit = math.nan
        if name not in ("ttft", "tpot", "itl", "e2e") or not limit > 0:
            raise ConfigError(
                f"--slo is {text!r}.",
                param="slo",
                remedy="It must be ttft=MS, tpot=MS, itl=MS or e2e=MS, with milliseconds above 0.",
            )
        slos[name] = limit
    return slos
