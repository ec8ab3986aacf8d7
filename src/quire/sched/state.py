"""Everything the scheduler knows, as plain data.

A request is in one place at a time:

    admit → WAITING → RUNNING → ENDED
               ↑         ↓
               ├── preempted (its blocks are gone, its tokens stay)
    SWAPPED ←──┘ or, preempted with its KV in host memory, → RUNNING

`sched.decide` only reads this; `admit`, `cancel`, `apply` and `settle` write it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Literal

import msgspec

from quire.cache.groups import token_capacity
from quire.cache.pool import NULL_BLOCK, BlockPool
from quire.core.errors import ConfigError, QuireError
from quire.core.pooling import PoolingTask, Rows
from quire.core.request import EngineRequest, RequestTimes, TokenLogprobs
from quire.sched.policy import Policy, Service, policies
from quire.sched.queue import DeadlineHeap, WaitingQueue


class Phase(StrEnum):
    WAITING = "waiting"
    RUNNING = "running"
    SWAPPED = "swapped"
    ENDED = "ended"


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerLimits:
    """What bounds a step and the queue.

    * `scheduling_policy`: a name in `policies()`; None is fcfs until a request names a tenant, then fair.
    * `max_num_queued_reqs` counts requests that wait although every sequence slot is taken; `max_num_queued_tokens`
      their known tokens.
    * `swap`: how a preempted request comes back. `auto` swaps if there is room in host memory and moving its blocks
      out and in again (`swap_seconds_per_block` each way) takes less time than computing its tokens again.
    * `pooled_rows`: which rows each pooling task needs that the model serves; empty for one that generates.
    * `whole_prompts`: tokens see those behind them too, so that a prompt is computed in one step or not at all.
    """

    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    eos_token_ids: Sequence[int] = ()
    max_num_queued_reqs: int = 1024
    max_num_queued_tokens: int = 4_000_000
    scheduling_policy: str | None = None
    swap: Literal["auto", "recompute", "swap"] = "auto"
    recompute_seconds_per_token: float = 1e-3
    swap_seconds_per_block: float = 1e-4
    pooled_rows: Mapping[PoolingTask, Rows] = field(default_factory=dict)
    whole_prompts: bool = False

    def __post_init__(self) -> None:
        for name in ("max_num_seqs", "max_num_batched_tokens", "max_model_len"):
            value = getattr(self, name)
            if value < 1:
                raise ConfigError(f"{name} is {value}.", param=name, remedy="It must be at least 1.")

    @property
    def max_running(self) -> int:
        """Sequences that may run at once: in a step, each must be able to get a token."""
        return min(self.max_num_seqs, self.max_num_batched_tokens)


@dataclass(slots=True, eq=False, kw_only=True)
class RequestState:
    """One request on its way. Two of them are equal only if they are the same.

    * `number`: running number of admission; breaks ties of arrival.
    * `longest`: tokens at which it ends, by `max_tokens`, the model's context or the cache: see `SchedulerState`.
    * `ending_token_ids`: those that end it, once there are `min_tokens`.
    * `reads_tokens`, `drawable`: as its `SamplingParams` say, which a step does not ask again.
    * `token_ids`: prompt and generated tokens. KV is in the cache for the first `num_computed_tokens` of them, in the
      blocks of `block_tables`, in order (while it is swapped out: of `host_tables`): one table per group of layers,
      all of one length, or none at all. A table grows in place, or is replaced by a new one.
    * `num_scheduled`: tokens whose KV will be there when the steps that are not settled yet are done, and `num_pending`
      how many those steps will have sampled: the scheduler goes on from what will be known then.
    * `num_hidden`: for each group, how many blocks at the front of its table nobody can see any more; they are given
      back, and null blocks stand in their place.
    * `block_hashes`: the chain over all full blocks of `token_ids`, computed or not; empty without prefix caching.
    * `num_published`: blocks of a table whose content the pool knows under its hash.
    * `num_cached_tokens`: prompt tokens that came from the prefix cache when the request was first scheduled.
    * `prompt_logprobs`: gathered so far, if asked for; emptied when they have been told.
    * `pooled_rows`: which rows' hidden states a pooling request needs; None for one that generates.
    * `pooled_so_far`: what the runner has made of those computed so far. Only the runner looks into it.
    """

    request: EngineRequest
    number: int
    token_ids: list[int]
    num_prompt_tokens: int
    longest: int
    ending_token_ids: Set[int] = frozenset()
    request_id: str = field(init=False)
    reads_tokens: bool = field(init=False)
    drawable: bool = field(init=False)
    cache_extra: bytes = b""
    phase: Phase = Phase.WAITING
    num_computed_tokens: int = 0
    num_scheduled: int = 0
    num_pending: int = 0
    block_tables: list[list[int]] = field(default_factory=list)
    num_hidden: list[int] = field(default_factory=list)
    host_tables: list[list[int]] = field(default_factory=list)
    block_hashes: list[bytes] = field(default_factory=list)
    num_published: int = 0
    num_cached_tokens: int = 0
    num_preemptions: int = 0
    prompt_logprobs: list[TokenLogprobs | None] = field(default_factory=list)
    prompt_logprobs_told: bool = False
    pooled_rows: Rows | None = None
    pooled_so_far: object | None = None
    first_scheduled_time: float | None = None
    first_token_time: float | None = None
    last_token_time: float | None = None

    def __post_init__(self) -> None:
        self.request_id = self.request.request_id
        self.reads_tokens = self.request.sampling.reads_tokens
        self.drawable = self.request.sampling.drawable

    @property
    def num_generated(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def lacking(self) -> int:
        """Tokens that it wants computed now. None while what comes next hangs on a token that is not known yet, or when
        it will have all that it may generate."""
        num_known = len(self.token_ids) + self.num_pending
        if self.num_pending and (self.reads_tokens or num_known >= self.longest):
            return 0
        return num_known - self.num_scheduled

    @property
    def held(self) -> list[list[int]]:
        """The blocks it has in each group, without those that are given back."""
        return [table[hidden:] for table, hidden in zip(self.block_tables, self.num_hidden)]

    @property
    def host_held(self) -> list[list[int]]:
        return [[block_id for block_id in table if block_id != NULL_BLOCK] for table in self.host_tables]

    @property
    def is_live(self) -> bool:
        return self.phase is not Phase.ENDED

    @property
    def reads_cache(self) -> bool:
        """A request that wants logprobs of its prompt needs every prompt position computed; so do vectors that more
        goes into than the last one."""
        if self.pooled_rows is not None:
            return self.pooled_rows == "last"
        return self.request.sampling.prompt_logprobs is None or self.prompt_logprobs_told

    @property
    def times(self) -> RequestTimes:
        return RequestTimes(
            arrival=self.request.arrival_time,
            first_scheduled=self.first_scheduled_time,
            first_token=self.first_token_time,
            last_token=self.last_token_time,
        )


@dataclass(slots=True)
class Totals:
    """Counters since the start. Prefix counters are in tokens, at a request's first scheduling."""

    prefix_cache_queries: int = 0
    prefix_cache_hits: int = 0
    preemptions: int = 0
    swaps_out: int = 0
    swaps_in: int = 0
    prompt_tokens: int = 0
    generation_tokens: int = 0


class ScheduledChunk(msgspec.Struct, frozen=True, gc=False):
    """Rows for positions start .. start + num_tokens - 1 of `state.token_ids`; the last of these may not be known yet.

    * `samples`: the chunk reaches the end of the known tokens, so its last row's logits give the next one (or, of a
      pooling request, the vector is whole).
    * `first_slot_cached`: the only row of a full prefix hit. Its KV is in a block that others may share, so the row
      writes to the null block instead.
    * `epoch`: how often the request had been preempted. What a step brings is of no use after one more time.
    """

    state: RequestState
    start: int
    num_tokens: int
    samples: bool
    first_slot_cached: bool
    epoch: int = 0

    @property
    def is_wanted(self) -> bool:
        """Whether its request still waits for what it brings."""
        return self.state.phase is Phase.RUNNING and self.epoch == self.state.num_preemptions


@dataclass(frozen=True, slots=True)
class Step:
    """What the engine does next. First every (device block, host block) of `swap_out` is copied, then every (host
    block, device block) of `swap_in`, then the forward pass runs over `scheduled`."""

    scheduled: list[ScheduledChunk] = field(default_factory=list)
    swap_out: list[tuple[int, int]] = field(default_factory=list)
    swap_in: list[tuple[int, int]] = field(default_factory=list)
    refused: list[tuple[RequestState, QuireError]] = field(default_factory=list)
    num_tokens: int = 0
    started: float = 0.0


class SchedulerState:
    """All requests, the pools their blocks are from, and the counters. `swap_pool` numbers blocks of host memory."""

    def __init__(self, limits: SchedulerLimits, pool: BlockPool, swap_pool: BlockPool | None = None) -> None:
        name = limits.scheduling_policy
        factory = policies().get(name or "fcfs")
        if factory is None:
            raise ConfigError(
                f"scheduling_policy is {name!r}.",
                param="scheduling_policy",
                remedy=f"It must be one of {', '.join(policies().names())}.",
            )
        self.limits = limits
        self.pool = pool
        self.swap_pool = swap_pool
        self.policy: Policy = factory()
        self.policy_name = name or "fcfs"
        self.requests: dict[str, RequestState] = {}
        self.running: dict[str, RequestState] = {}
        self.swapped: dict[str, RequestState] = {}
        self.waiting = WaitingQueue(self.policy)
        self.deadlines = DeadlineHeap()
        self.service = Service()
        self.totals = Totals()
        self.num_admitted = 0
        self.token_capacity = token_capacity(pool.sights, pool.num_usable, pool.block_size, limits.max_model_len)
        """Known tokens that one request alone can have KV for, up to `max_model_len`."""
        self.longest = min(limits.max_model_len, self.token_capacity + 1)
        """Tokens at which any request ends. The last one needs no KV; with one more, a request alone would outgrow the
        whole cache."""
        self.eos_token_ids = frozenset(limits.eos_token_ids)
        self.tokens_per_second = 0.0
        self.last_settled = 0.0

    @property
    def has_work(self) -> bool:
        return bool(self.requests)

    @property
    def num_running(self) -> int:
        return len(self.running)

    @property
    def num_waiting(self) -> int:
        """Requests that wait, preempted ones included."""
        return len(self.waiting) + len(self.swapped)

    @property
    def num_waiting_tokens(self) -> int:
        return self.waiting.num_tokens

    def retry_after(self, num_tokens: int) -> float:
        """Seconds, 1 to 60, after which `num_tokens` tokens will likely have been computed, at the pace of late."""
        return min(60.0, max(1.0, num_tokens / self.tokens_per_second)) if self.tokens_per_second else 1.0

    def use_policy(self, name: str) -> None:
        """Change the policy; waiting requests are queued anew."""
        factory = policies().get(name)
        assert factory is not None, name
        self.policy = factory()
        self.policy_name = name
        self.waiting = self.waiting.under(self.policy)

    def end(self, state: RequestState) -> None:
        """Take a live request out of wherever it is and free what it holds. The one way a request ends."""
        if state.phase is Phase.WAITING:
            self.waiting.remove(state)
        elif state.phase is Phase.RUNNING:
            del self.running[state.request_id]
        elif state.phase is Phase.SWAPPED:
            del self.swapped[state.request_id]
        state.phase = Phase.ENDED
        self.release(state)
        if state.host_tables:
            assert self.swap_pool is not None
            for table in state.host_tables:
                self.swap_pool.release(table)
            state.host_tables = []
        del self.requests[state.request_id]
        self.service.leave(state.request.tenant)
        self.deadlines.sweep(len(self.requests))

    def release(self, state: RequestState) -> None:
        """Give back all blocks of a request."""
        for block_ids in state.held:
            self.pool.release(block_ids)
        state.block_tables, state.num_hidden = [], []

    def tables(self) -> Iterator[Sequence[int]]:
        """The blocks that requests hold, for `BlockPool.check_integrity`."""
        return (block_ids for state in self.requests.values() for block_ids in state.held)

    def host_tables(self) -> Iterator[Sequence[int]]:
        return (block_ids for state in self.requests.values() for block_ids in state.host_held)

    def check_integrity(self) -> None:
        """AssertionError unless every block, and every request, is accounted for exactly once. Also holds mid-step."""
        self.pool.check_integrity(self.tables())
        if self.swap_pool is not None:
            self.swap_pool.check_integrity(self.host_tables())
        waiting = {state.request_id: state for state in self.waiting}
        assert len(waiting) + len(self.running) + len(self.swapped) == len(self.requests)
        assert self.requests == {**waiting, **self.running, **self.swapped}
        assert self.waiting.num_tokens == sum(len(state.token_ids) for state in waiting.values())
        assert len(self.waiting) == len(waiting)
        for state in self.requests.values():
            assert state.num_computed_tokens < len(state.token_ids), state.request_id
            if state.phase is Phase.WAITING:
                assert not state.block_tables, state.request_id
                assert not state.host_tables, state.request_id
                assert state.num_computed_tokens == 0, state.request_id
            if state.phase is not Phase.RUNNING:
                assert state.num_scheduled == state.num_computed_tokens, state.request_id
                assert state.num_pending == 0, state.request_id
            if state.phase is not Phase.WAITING:
                self._check_tables(state)

    def _check_tables(self, state: RequestState) -> None:
        """Null blocks are where nobody can see, and nowhere else."""
        tables = state.host_tables if state.phase is Phase.SWAPPED else state.block_tables
        firsts = self.pool.first_blocks(state.num_computed_tokens)
        assert state.num_hidden == ([] if state.phase is Phase.SWAPPED else firsts), state.request_id
        assert len({len(table) for table in tables}) == 1, state.request_id
        assert len(tables) == len(self.pool.sights), state.request_id
        for table, first in zip(tables, firsts):
            assert len(table) >= self.pool.blocks_for(state.num_scheduled), state.request_id
            assert all((block_id == NULL_BLOCK) == (i < first) for i, block_id in enumerate(table)), state.request_id
