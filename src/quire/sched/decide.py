"""What the next step should be. Reads the state, changes nothing.

Scheduling knows tokens, not phases: each running request has `num_scheduled` tokens and wants to catch up with those
that are known, or will be when the steps in flight are done. In a token budget, requests that lack one token (decoding)
come first; the others share what is left, in the order of the policy. Blocks are given in the order of the policy too,
and when they run out, they are taken from the running request that ranks last. So the one that ranks first always moves
on.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain

from quire.cache.ledger import RESERVE
from quire.cache.pool import NULL_BLOCK
from quire.core.errors import DeadlineExceeded, QuireError
from quire.sched.policy import PROMPT_WEIGHT
from quire.sched.queue import Deadline
from quire.sched.state import Phase, RequestState, ScheduledChunk, SchedulerState


@dataclass(frozen=True, slots=True)
class Entry:
    """Let a request run, with `num_computed_tokens` tokens computed. Its tables start as `cached_tables`; if they hold
    less than that, the rest comes back from host memory (`swap_in`)."""

    state: RequestState
    cached_tables: Sequence[Sequence[int]]
    num_computed_tokens: int
    swap_in: bool = False


@dataclass(frozen=True, slots=True)
class Preemption:
    state: RequestState
    swap_out: bool


@dataclass(frozen=True, slots=True)
class Decision:
    """Made at `now`, for the state as it was. `sched.apply` carries it out in the order of the fields, and finds
    `num_free` blocks free then, if that was foreseen.

    * `grown`: to each table of these requests so many blocks are added.
    * `chunks`: what is computed then, `num_tokens` tokens in all.
    """

    now: float
    refused: list[tuple[RequestState, QuireError]] = field(default_factory=list)
    preempted: list[Preemption] = field(default_factory=list)
    entries: list[Entry] = field(default_factory=list)
    grown: list[tuple[RequestState, int]] = field(default_factory=list)
    chunks: list[ScheduledChunk] = field(default_factory=list)
    num_tokens: int = 0
    num_free: int | None = None


def decide(state: SchedulerState, now: float) -> Decision:
    """The next step, in monotonic seconds `now`."""
    plan = _Plan(state, now)
    for deadline in state.deadlines.due(now):
        plan.refuse(deadline)
    _serve_running(plan)
    if not plan.preempted and _bring_back_swapped(plan):
        _let_in_waiting(plan)
    return Decision(
        now=now,
        refused=plan.refused,
        preempted=plan.preempted,
        entries=plan.entries,
        grown=plan.grown,
        chunks=plan.chunks,
        num_tokens=state.limits.max_num_batched_tokens - plan.budget,
        num_free=plan.num_free,
    )


class _Plan:
    """The decision so far, and what it leaves of the budget and of the blocks."""

    def __init__(self, state: SchedulerState, now: float) -> None:
        self.state = state
        self.now = now
        self.refused: list[tuple[RequestState, QuireError]] = []
        self.preempted: list[Preemption] = []
        self.entries: list[Entry] = []
        self.grown: list[tuple[RequestState, int]] = []
        self.chunks: list[ScheduledChunk] = []
        self.budget = state.limits.max_num_batched_tokens
        self.num_groups = len(state.pool.sights)
        self.block_size = state.pool.block_size
        self.num_free = state.pool.num_free
        self.num_host_free = state.swap_pool.num_free if state.swap_pool is not None else 0
        self.num_running = len(state.running)
        self.gone: set[RequestState] = set()
        self._references: dict[int, int] = {}

    @property
    def has_room(self) -> bool:
        """For one more running request."""
        return self.num_running < self.state.limits.max_running and self.budget > 0

    def refuse(self, deadline: Deadline) -> None:
        late = deadline.state
        self.refused.append((late, _too_late(self.state, deadline, self.now)))
        self._remove(late)

    def preempt(self, victim: RequestState) -> None:
        num_filled = self.state.pool.blocks_for(victim.num_computed_tokens)
        num_blocks = sum(num_filled - hidden for hidden in victim.num_hidden)
        swap_out = _should_swap(self.state, victim, num_blocks, self.num_host_free)
        self.num_host_free -= num_blocks if swap_out else 0
        self.preempted.append(Preemption(victim, swap_out))
        self._remove(victim)

    def grant(self, item: RequestState, start: int, num_tokens: int, num_held: int, *, cached: bool = False) -> None:
        """Give tokens to a request whose tables have `num_held` blocks."""
        end = start + num_tokens
        if end > num_held * self.block_size:
            num_new = self.state.pool.blocks_for(end) - num_held
            assert num_new * self.num_groups <= self.num_free
            self.num_free -= num_new * self.num_groups
            self.grown.append((item, num_new))
        self.budget -= num_tokens
        self.chunks.append(
            ScheduledChunk(
                state=item,
                start=start,
                num_tokens=num_tokens,
                samples=end == len(item.token_ids) + item.num_pending,
                first_slot_cached=cached,
                epoch=item.num_preemptions,
            )
        )

    def fitting(self, start: int, num_held: int) -> int:
        """Tokens from `start` on that a request whose tables have `num_held` blocks could get with all that is free."""
        return (num_held + self.num_free // self.num_groups) * self.block_size - start

    def num_unused(self, block_ids: Sequence[int]) -> int:
        """How many of these distinct blocks are in the free list."""
        return sum(1 for block_id in block_ids if not self._held(block_id))

    def touch(self, block_ids: Sequence[int]) -> None:
        for block_id in block_ids:
            if block_id != NULL_BLOCK:
                held = self._held(block_id)
                self.num_free -= held == 0
                self._references[block_id] = held + 1

    def _remove(self, item: RequestState) -> None:
        self.gone.add(item)
        self.num_running -= item.phase is Phase.RUNNING
        for block_id in chain.from_iterable(item.held):
            held = self._held(block_id) - 1
            self.num_free += held == 0
            self._references[block_id] = held

    def _held(self, block_id: int) -> int:
        held = self._references.get(block_id)
        return self.state.pool.references(block_id) if held is None else held


def _serve_running(plan: _Plan) -> None:
    state = plan.state
    tokens = state.service.tokens
    running = [*state.running.values()]
    if plan.gone:
        running = [item for item in running if item not in plan.gone]
    running.sort(key=lambda item: state.policy.rank(item, tokens))
    lacking = [item.lacking for item in running]
    num_decoding = lacking.count(1)
    served, end = 0, len(running)
    while served < end:
        item, wanted = running[served], lacking[served]
        if wanted == 1:
            num_decoding -= 1
        wanted = min(wanted, plan.budget - num_decoding)
        start, num_held = item.num_scheduled, len(item.block_tables[0])
        while wanted > 0:
            fitting = num_held * plan.block_size - start
            if fitting < wanted:
                fitting = plan.fitting(start, num_held)
            if fitting > 0:
                plan.grant(item, start, min(wanted, fitting), num_held)
                break
            end -= 1
            plan.preempt(running[end])
            if end == served:
                break
            if lacking[end] == 1:
                num_decoding -= 1
        served += 1


def _bring_back_swapped(plan: _Plan) -> bool:
    """Let swapped requests run again, in order; True if none is left behind."""
    state, tokens = plan.state, plan.state.service.tokens
    swapped = [item for item in state.swapped.values() if item not in plan.gone]
    swapped.sort(key=lambda item: state.policy.rank(item, tokens))
    return all(_enter(plan, item, swap_in=True) for item in swapped)


def _let_in_waiting(plan: _Plan) -> None:
    """Let waiting requests run, in order, until one does not fit: nobody overtakes it."""
    if not plan.has_room or not plan.state.waiting:
        return
    service = dict(plan.state.service.tokens)
    for item in _in_order(plan, service):
        if not _enter(plan, item, swap_in=False):
            return
        if item.first_scheduled_time is None:
            num_cached = plan.entries[-1].num_computed_tokens
            service[item.request.tenant] += PROMPT_WEIGHT * (item.num_prompt_tokens - num_cached)


def _in_order(plan: _Plan, service: dict[str, float]) -> Iterator[RequestState]:
    """Waiting requests, best first; `service` may grow while this is consumed."""
    policy, lanes = plan.state.policy, plan.state.waiting.lanes
    queues = {name: iter(lane) for name, lane in lanes.items()}
    heads: dict[str, RequestState] = {}
    behind = list(queues)
    while True:
        for name in behind:
            head = next((item for _key, item in queues[name] if item not in plan.gone), None)
            if head is None:
                heads.pop(name, None)
            else:
                heads[name] = head
        if not heads:
            return
        best = min(heads, key=lambda name: policy.rank(heads[name], service))
        behind = [best]
        yield heads[best]


def _enter(plan: _Plan, item: RequestState, *, swap_in: bool) -> bool:
    """Let a request run if a sequence slot, a token and blocks are there.

    Blocks must be there for all known tokens, although chunks take them one after the other; and while others run, one
    block in `RESERVE` must stay free for them to grow: who was let in should not have to give way at once.
    """
    pool, known = plan.state.pool, len(item.token_ids)
    if not plan.has_room or (plan.state.limits.whole_prompts and known > plan.budget):
        return False
    cached = pool.match(item.block_hashes, known) if item.reads_cache else [[] for _ in pool.sights]
    num_cached = len(cached[0])
    covered = num_cached * pool.block_size
    if swap_in and covered <= item.num_computed_tokens:
        start = item.num_computed_tokens
        num_held = pool.blocks_for(start)
        cached = [_hide(table, first) for table, first in zip(cached, pool.first_blocks(start))]
    else:
        start = min(covered, known - 1)
        num_held = num_cached
    available = plan.num_free
    if plan.num_running:
        available -= pool.num_usable // RESERVE
    if _needed(plan, cached, start, known) > available:
        return False
    for table in cached:
        plan.touch(table)
    plan.num_free -= sum(max(0, num_held - max(num_cached, first)) for first in pool.first_blocks(start))
    plan.num_running += 1
    plan.entries.append(Entry(item, cached, start, swap_in))
    num_tokens = min(plan.budget, known - start, plan.fitting(start, num_held))
    plan.grant(item, start, num_tokens, num_held, cached=covered == known)
    return True


def _hide(table: list[int], first: int) -> list[int]:
    return [NULL_BLOCK] * min(first, len(table)) + table[first:]


def _needed(plan: _Plan, cached: Sequence[Sequence[int]], start: int, known: int) -> int:
    """Most blocks of the free list, at one time, that a request takes until all its known tokens are computed, from
    `start` on: those that are missing, and those that are found but held by nobody. Alone, it may go token by token."""
    pool, needed = plan.state.pool, 0
    step_tokens = plan.state.limits.max_num_batched_tokens if plan.num_running else 1
    for sight, table, first in zip(pool.sights, cached, pool.first_blocks(start)):
        missing = pool.blocks_for(known) - max(len(table), first)
        unused = plan.num_unused(table[first:])
        needed += min(missing + unused, sight.most_blocks(known, pool.block_size, step_tokens))
    return needed


def _should_swap(state: SchedulerState, victim: RequestState, num_blocks: int, num_host_free: int) -> bool:
    limits = state.limits
    if limits.swap == "recompute" or not 0 < num_blocks <= num_host_free:
        return False
    swap_seconds = 2 * num_blocks * limits.swap_seconds_per_block
    return limits.swap == "swap" or swap_seconds < victim.num_computed_tokens * limits.recompute_seconds_per_token


def _too_late(state: SchedulerState, deadline: Deadline, now: float) -> DeadlineExceeded:
    late = deadline.state
    waited = (now - late.request.arrival_time) * 1000.0
    limit = (deadline.time - late.request.arrival_time) * 1000.0
    waits_for = {"total": "the end", "queue": "being scheduled", "ttft": "the first token"}[deadline.kind]
    return DeadlineExceeded(
        f"{waited:.0f} ms after arrival the request waits for {waits_for}; its {deadline.kind}_ms is {limit:.0f} ms "
        f"({late.num_generated} tokens generated).",
        param=f"{deadline.kind}_ms",
        remedy="Retry later, or allow more time.",
        retry_after=state.retry_after(state.num_waiting_tokens),
    )
