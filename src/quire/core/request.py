"""A request as the engine knows it, and what the engine says about it.

The front end has done everything that needs text: a prompt is token ids, `n` has been unfolded into single requests,
and `sampling.seed` is always set. These are plain data, and cross process boundaries as msgpack arrays.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum

import msgspec

from quire.core.errors import ErrorInfo, InvalidParameter
from quire.core.pooling import Pooled, PoolingParams
from quire.core.sampling import SamplingParams


class FinishReason(StrEnum):
    """Why a request ended, in OpenAI's words, and `error` for what ended otherwise."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


@dataclass(frozen=True, slots=True, kw_only=True)
class Deadlines:
    """How long a caller is ready to wait, in milliseconds from arrival; None waits for ever."""

    total_ms: float | None = None
    queue_ms: float | None = None
    ttft_ms: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineRequest:
    """One sequence to generate, or with `pooling` one to make a vector or scores of (`sampling` says nothing then).

    * `priority`: lower is served earlier (vLLM's meaning), under the `priority` policy.
    * `tenant`: who pays; the `fair` policy shares tokens between tenants.
    * `cache_salt`: goes into the prefix hash, so that only requests with the same salt share KV blocks.
    * `token_type_ids`: one for each token of the prompt, for models that tell the parts of a prompt apart; None: all 0.
    * `arrival_time`: seconds on the system-wide monotonic clock (`time.monotonic`), set by the front end.
    """

    request_id: str
    prompt_token_ids: Sequence[int]
    sampling: SamplingParams
    arrival_time: float
    priority: int = 0
    tenant: str = ""
    cache_salt: str = ""
    deadlines: Deadlines = field(default_factory=Deadlines)
    pooling: PoolingParams | None = None
    token_type_ids: Sequence[int] | None = None

    def for_types(self, num_token_types: int) -> EngineRequest:
        """For a model that knows so many token types: one that tells none apart is told none. Raises
        InvalidParameter for what is not a known type for each token."""
        types = self.token_type_ids
        if types is None or num_token_types < 2:
            return self if types is None else replace(self, token_type_ids=None)
        if len(types) != len(self.prompt_token_ids):
            raise InvalidParameter(
                f"There are {len(types)} token_type_ids for {len(self.prompt_token_ids)} tokens.",
                param="token_type_ids",
                remedy="Give one for each token of the prompt, or none.",
            )
        unknown = next((kind for kind in types if not 0 <= kind < num_token_types), None)
        if unknown is not None:
            raise InvalidParameter(
                f"token_type_ids has {unknown}; the model knows {num_token_types} types, from 0.",
                param="token_type_ids",
                remedy="Take types that it knows.",
            )
        return self


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """One token's log-probability, its rank (1 is the likeliest), and the likeliest alternatives, best first."""

    token_id: int
    logprob: float
    rank: int
    top_ids: Sequence[int] = ()
    top_logprobs: Sequence[float] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestTimes:
    """Seconds on the monotonic clock; told with a request's first token, and with the output that ends it."""

    arrival: float
    first_scheduled: float | None = None
    first_token: float | None = None
    last_token: float | None = None


class EngineOutput(msgspec.Struct, kw_only=True, omit_defaults=True, gc=False):
    """What one step added to one request. Nobody changes it. One is made, sent and read per token: as a struct that
    sends only what is not the default, that takes a third of the time of a dataclass.

    `finish_reason` is set once, on the last output. `stop_reason` is the stop token's id if one ended it
    (None for EOS). `prompt_logprobs` comes once, before or with the first token: one entry per prompt token, None for
    the first. `pooled` comes once, with the last output, which has no tokens then.
    """

    request_id: str
    token_ids: Sequence[int] = ()
    logprobs: Sequence[TokenLogprobs] | None = None
    prompt_logprobs: Sequence[TokenLogprobs | None] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | None = None
    num_cached_tokens: int = 0
    num_preemptions: int = 0
    times: RequestTimes | None = None
    error: ErrorInfo | None = None
    pooled: Pooled | None = None
