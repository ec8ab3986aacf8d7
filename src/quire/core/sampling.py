"""Sampling parameters: how the next token is chosen and when to stop.

Names and meanings follow vLLM's `SamplingParams`; `typical_p` is TGI's. Everything is validated when the object is
made, so that the engine may rely on it. Bounds are here as well: nothing a caller asks for may grow without limit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from quire.core.errors import InvalidParameter

MAX_N = 128
MAX_LOGPROBS = 64
MAX_STOP_STRINGS = 16
MAX_STOP_STRING_CHARS = 1024
MAX_STOP_TOKEN_IDS = 1024
MAX_BAD_WORDS = 256
MAX_LOGIT_BIAS = 1024
MAX_ALLOWED_TOKEN_IDS = 65536


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """One request's sampling. `temperature=0` is greedy.

    * `seed`: None asks for a fresh one per request. The random number behind the token at a position is a function of
      (seed, position) alone, so the same seed gives the same tokens in any company.
    * `max_tokens`: None means up to the model's context.
    * `top_k`: 0 or -1 keeps all. `top_p`, `typical_p`: 1.0 keeps all. `min_p`: 0.0 keeps all.
    * `logprobs`: how many alternatives to report beside each sampled token (0 reports the token alone), None for none;
      they are log-softmax of the raw logits, before penalties and temperature. `prompt_logprobs` likewise.
    * `bad_words_token_ids` is filled by the front end from `bad_words`; callers leave it empty.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    typical_p: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    allowed_token_ids: Sequence[int] | None = None
    bad_words: Sequence[str] = ()
    bad_words_token_ids: Sequence[Sequence[int]] = ()
    seed: int | None = None
    max_tokens: int | None = 16
    min_tokens: int = 0
    stop: Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    detokenize: bool = True
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    truncate_prompt_tokens: int | None = None

    def __post_init__(self) -> None:
        _integer("n", self.n, 1, MAX_N)
        _number("temperature", self.temperature, 0.0, 100.0)
        _number("top_p", self.top_p, 0.0, 1.0, open_low=True)
        _integer("top_k", self.top_k, -1, 2**31)
        _number("min_p", self.min_p, 0.0, 1.0)
        _number("typical_p", self.typical_p, 0.0, 1.0, open_low=True)
        _number("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _number("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _number("repetition_penalty", self.repetition_penalty, 0.0, 100.0, open_low=True)
        _optional_integer("seed", self.seed, -(2**63), 2**63 - 1)
        _optional_integer("max_tokens", self.max_tokens, 1, 2**31)
        _integer("min_tokens", self.min_tokens, 0, 2**31)
        _optional_integer("logprobs", self.logprobs, 0, MAX_LOGPROBS)
        _optional_integer("prompt_logprobs", self.prompt_logprobs, 0, MAX_LOGPROBS)
        _optional_integer("truncate_prompt_tokens", self.truncate_prompt_tokens, 1, 2**31)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise InvalidParameter(
                f"min_tokens is {self.min_tokens}, more than max_tokens, {self.max_tokens}.",
                param="min_tokens",
                remedy="Lower min_tokens or raise max_tokens.",
            )
        _strings("stop", self.stop, MAX_STOP_STRINGS, MAX_STOP_STRING_CHARS)
        _strings("bad_words", self.bad_words, MAX_BAD_WORDS, MAX_STOP_STRING_CHARS)
        if self.stop and not self.detokenize:
            raise InvalidParameter(
                "stop strings need detokenize=True.", param="stop", remedy="Use stop_token_ids, or set detokenize."
            )
        _token_ids("stop_token_ids", self.stop_token_ids, MAX_STOP_TOKEN_IDS)
        if self.allowed_token_ids is not None:
            _token_ids("allowed_token_ids", self.allowed_token_ids, MAX_ALLOWED_TOKEN_IDS)
            if not self.allowed_token_ids:
                raise InvalidParameter(
                    "allowed_token_ids is empty.", param="allowed_token_ids", remedy="Name at least one token."
                )
        _token_ids("logit_bias", list(self.logit_bias), MAX_LOGIT_BIAS)
        for token_id, bias in self.logit_bias.items():
            _number(f"logit_bias[{token_id}]", bias, -100.0, 100.0)

    @property
    def greedy(self) -> bool:
        return self.temperature < 1e-5

    @property
    def reads_tokens(self) -> bool:
        """Whether what may be sampled next hangs on which tokens, or how many, have been generated."""
        return (
            self.repetition_penalty != 1.0
            or self.frequency_penalty != 0.0
            or self.presence_penalty != 0.0
            or bool(self.bad_words_token_ids)
            or self.min_tokens > 0
        )

    @property
    def drawable(self) -> bool:
        """Whether what is sampled hangs on the logits, the position, and a few numbers alone, and nothing more is to be
        told of it: such a token can be drawn without the host.

        `typical_p` is not one of them. A nucleus is found by sums over ranks that are the weights themselves, so that a
        bucket's are of one binade and add up to the same double in any order. Typical ranks are distances from the
        entropy: a bucket has weights of any size, the definition adds them up in order of id, and another order rounds
        otherwise. Many programs could not make these sums, and one that makes them token by token is slower than the
        host.
        """
        return (
            self.logprobs is None
            and self.prompt_logprobs is None
            and not self.reads_tokens
            and self.allowed_token_ids is None
            and not self.logit_bias
            and self.typical_p == 1.0
        )

    def with_child_seed(self, index: int, seed: int) -> SamplingParams:
        """The parameters of the index-th of `n` samples: one sample, with a seed of its own derived from `seed`."""
        child = (seed + index) & (2**63 - 1)
        return replace(self, n=1, seed=child)


def _fail(name: str, value: object, rule: str) -> InvalidParameter:
    shown = repr(value)
    shown = shown if len(shown) <= 80 else shown[:77] + "..."
    return InvalidParameter(f"{name} is {shown}.", param=name.partition("[")[0], remedy=f"It must be {rule}.")


def _number(name: str, value: object, low: float, high: float, *, open_low: bool = False) -> None:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not math.isfinite(value):
        raise _fail(name, value, "a finite number")
    if value < low or value > high or (open_low and value == low):
        raise _fail(name, value, f"{'above' if open_low else 'at least'} {low:g} and at most {high:g}")


def _integer(name: str, value: object, low: int, high: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise _fail(name, value, "an integer")
    if not low <= value <= high:
        raise _fail(name, value, f"between {low} and {high}")


def _optional_integer(name: str, value: object, low: int, high: int) -> None:
    if value is not None:
        _integer(name, value, low, high)


def _strings(name: str, values: Sequence[str], most: int, most_chars: int) -> None:
    if isinstance(values, str) or len(values) > most:
        raise _fail(name, values, f"a list of at most {most} strings")
    for value in values:
        if not isinstance(value, str) or not 0 < len(value) <= most_chars:
            raise _fail(name, value, f"a non-empty string of at most {most_chars} characters")


def _token_ids(name: str, values: Sequence[int], most: int) -> None:
    if len(values) > most:
        raise InvalidParameter(f"{name} has {len(values)} entries.", param=name, remedy=f"It may have at most {most}.")
    for value in values:
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**31:
            raise _fail(name, value, "a list of token ids")
