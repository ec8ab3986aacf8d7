"""The one function that carries a decision out."""

from __future__ import annotations

from quire.cache.pool import NULL_BLOCK
from quire.sched.decide import Decision, Entry, Preemption
from quire.sched.policy import PROMPT_WEIGHT
from quire.sched.state import Phase, RequestState, SchedulerState, Step


def apply(state: SchedulerState, decision: Decision, now: float) -> Step:
    """Change the state as decided, and say what the engine is to do.

    `decision` must be of this state, unchanged since. Order matters: blocks are given back before any is taken, and
    blocks found in the prefix cache are taken before others, which evicts what is cached.
    """
    step = Step(scheduled=decision.chunks, refused=decision.refused, num_tokens=decision.num_tokens, started=now)
    for late, _error in decision.refused:
        state.end(late)
    state.deadlines.drop_until(decision.now)
    for preemption in decision.preempted:
        _preempt(state, preemption, step)
    for entry in decision.entries:
        for table in entry.cached_tables:
            state.pool.touch(table)
    for entry in decision.entries:
        _enter(state, entry, step, now)
    for item, num_blocks in decision.grown:
        for table in item.block_tables:
            table.extend(state.pool.allocate(num_blocks))
    for chunk in decision.chunks:
        item = chunk.state
        item.num_scheduled += chunk.num_tokens
        if chunk.samples and item.pooled_rows is None:
            item.num_pending += 1
    assert decision.num_free in (None, state.pool.num_free)
    return step


def _preempt(state: SchedulerState, preemption: Preemption, step: Step) -> None:
    victim = preemption.state
    del state.running[victim.request_id]
    victim.num_preemptions += 1
    victim.num_pending = 0  # what is under way is computed again, to the same bits
    state.totals.preemptions += 1
    if preemption.swap_out:
        _swap_out(state, victim, step)
        victim.phase = Phase.SWAPPED
        state.swapped[victim.request_id] = victim
        state.totals.swaps_out += 1
    else:
        victim.num_computed_tokens = 0
        victim.pooled_so_far = None
        victim.phase = Phase.WAITING
        state.waiting.push(victim)
    victim.num_scheduled = victim.num_computed_tokens
    state.release(victim)


def _swap_out(state: SchedulerState, victim: RequestState, step: Step) -> None:
    assert state.swap_pool is not None
    num_filled = state.pool.blocks_for(victim.num_computed_tokens)
    for table, hidden in zip(victim.block_tables, victim.num_hidden):
        filled = table[hidden:num_filled]
        host_block_ids = state.swap_pool.allocate(len(filled))
        step.swap_out.extend(zip(filled, host_block_ids))
        victim.host_tables.append([NULL_BLOCK] * hidden + host_block_ids)


def _swap_in(state: SchedulerState, item: RequestState, step: Step) -> None:
    """Bring back the blocks that come after those in the tables."""
    assert state.swap_pool is not None
    for table, host_table in zip(item.block_tables, item.host_tables):
        missing = host_table[len(table) :]
        hidden = missing.count(NULL_BLOCK)
        block_ids = state.pool.allocate(len(missing) - hidden)
        step.swap_in.extend(zip(missing[hidden:], block_ids))
        table.extend([NULL_BLOCK] * hidden + block_ids)
        state.swap_pool.release(host_table)
    item.host_tables = []


def _enter(state: SchedulerState, entry: Entry, step: Step, now: float) -> None:
    item = entry.state
    item.block_tables = [list(table) for table in entry.cached_tables]
    item.num_hidden = state.pool.first_blocks(entry.num_computed_tokens)
    item.num_published = len(item.block_tables[0])
    if entry.swap_in:
        _swap_in(state, item, step)
        del state.swapped[item.request_id]
        state.totals.swaps_in += 1
    else:
        state.waiting.remove(item)
    item.num_computed_tokens = item.num_scheduled = entry.num_computed_tokens
    item.phase = Phase.RUNNING
    state.running[item.request_id] = item
    if item.first_scheduled_time is None:
        item.first_scheduled_time = now
        _count_prompt(state, item)


def _count_prompt(state: SchedulerState, item: RequestState) -> None:
    """A prompt is charged and counted once, when it is first scheduled: to compute it again is our own affair."""
    item.num_cached_tokens = item.num_computed_tokens
    state.service.charge(item.request.tenant, PROMPT_WEIGHT * (item.num_prompt_tokens - item.num_cached_tokens))
    state.totals.prompt_tokens += item.num_prompt_tokens
    if state.pool.enable_prefix_caching and item.reads_cache:
        state.totals.prefix_cache_queries += item.num_prompt_tokens
        state.totals.prefix_cache_hits += item.num_cached_tokens
