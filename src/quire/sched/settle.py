"""What a step brought: tokens are appended, full blocks published, requests ended."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec

from quire.cache.pool import NULL_BLOCK, BlockPool
from quire.core.errors import QuireError
from quire.core.pooling import Pooled
from quire.core.prefix import extend_hashes
from quire.core.request import EngineOutput, FinishReason, TokenLogprobs
from quire.sched.policy import GENERATED_WEIGHT
from quire.sched.state import RequestState, ScheduledChunk, SchedulerState, Step

RATE_WEIGHT = 0.1
"""Weight of the latest step in the moving average of tokens per second."""


class StepResult(msgspec.Struct, frozen=True, gc=False):
    """What the forward pass gave one request.

    * `token_ids`, and `logprobs` beside them if asked for: empty unless the chunk samples; several if guesses held.
    * `prompt_logprobs`, if asked for: entry j is of the prompt token at position `chunk.start + 1 + j`, which the row
      of position `chunk.start + j` predicts. Settle adds the None of the first token, and drops what it was told before
      a preemption.
    * `pooled_so_far`, of a pooling request that is not done yet: what its next chunk goes on from. `pooled`, with its
      last chunk: what it asked for.
    """

    token_ids: Sequence[int] = ()
    logprobs: Sequence[TokenLogprobs] | None = None
    prompt_logprobs: Sequence[TokenLogprobs | None] | None = None
    pooled_so_far: object | None = None
    pooled: Pooled | None = None


NO_RESULT = StepResult()


def settle(state: SchedulerState, step: Step, results: Mapping[str, StepResult], now: float) -> list[EngineOutput]:
    """Take in the results of `step`, by request id; chunks that do not sample may have none. Steps are settled in the
    order in which they were applied, but another may have been applied since.

    Returns one output per request that has something to tell: tokens, or its end. Requests that ended or were preempted
    while the step ran get none.
    """
    outputs = [_last_output(late, FinishReason.ERROR, error=error) for late, error in step.refused]
    _note_pace(state, step, now)
    for chunk in step.scheduled:
        if chunk.is_wanted:
            output = _settle_chunk(state, chunk, results.get(chunk.state.request_id, NO_RESULT), now)
            if output is not None:
                outputs.append(output)
    return outputs


def fail(state: SchedulerState, request_id: str, error: QuireError) -> EngineOutput | None:
    """End one live request with an error, and leave the others alone; None if there is no such request."""
    failed = state.requests.get(request_id)
    if failed is None:
        return None
    state.end(failed)
    return _last_output(failed, FinishReason.ERROR, error=error)


def _settle_chunk(state: SchedulerState, chunk: ScheduledChunk, result: StepResult, now: float) -> EngineOutput | None:
    item, pool = chunk.state, state.pool
    item.num_computed_tokens = chunk.start + chunk.num_tokens
    if item.num_published < len(item.block_hashes):
        _publish(pool, item)
    if pool.limited:
        _free_hidden(pool, item)
    if result.prompt_logprobs is not None:
        _gather_prompt_logprobs(item, chunk.start, result.prompt_logprobs)
    if not chunk.samples:
        item.pooled_so_far = result.pooled_so_far
        return None
    if item.pooled_rows is not None:
        assert result.pooled is not None, f"nothing pooled for {item.request_id}"
        state.end(item)
        return _last_output(item, FinishReason.STOP, pooled=result.pooled)
    item.num_pending -= 1
    return _settle_tokens(state, item, result, now)


def _settle_tokens(state: SchedulerState, item: RequestState, result: StepResult, now: float) -> EngineOutput:
    pool, new_ids = state.pool, result.token_ids
    assert new_ids, f"no token for {item.request_id}"
    is_first = item.first_token_time is None
    if is_first:
        item.first_token_time = now
    item.last_token_time = now
    reason = stop_reason = None
    if len(item.token_ids) + len(new_ids) < item.longest and item.ending_token_ids.isdisjoint(new_ids):
        item.token_ids.extend(new_ids)
    else:
        new_ids, reason, stop_reason = _append(state, item, new_ids)
    state.totals.generation_tokens += len(new_ids)
    state.service.charge(item.request.tenant, GENERATED_WEIGHT * len(new_ids))
    logprobs = result.logprobs[: len(new_ids)] if result.logprobs is not None else None
    prompt_logprobs = None if item.request.sampling.prompt_logprobs is None else _tell_prompt_logprobs(item)
    if reason is not None:
        state.end(item)
        return _last_output(
            item, reason, stop_reason=stop_reason, token_ids=new_ids, logprobs=logprobs, prompt_logprobs=prompt_logprobs
        )
    if pool.enable_prefix_caching and len(item.token_ids) // pool.block_size > len(item.block_hashes):
        extend_hashes(item.block_hashes, item.token_ids, pool.block_size, item.cache_extra)
    return EngineOutput(
        request_id=item.request_id,
        token_ids=new_ids,
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
        num_cached_tokens=item.num_cached_tokens,
        num_preemptions=item.num_preemptions,
        times=item.times if is_first else None,
    )


def _publish(pool: BlockPool, item: RequestState) -> None:
    """Make the blocks findable that are full and computed by now."""
    num_full = min(item.num_computed_tokens // pool.block_size, len(item.block_hashes))
    for group, table in enumerate(item.block_tables):
        stored = [
            index
            for index in range(item.num_published, num_full)
            if table[index] != NULL_BLOCK and pool.publish(table[index], item.block_hashes[index], group)
        ]
        if stored and pool.journal is not None:
            pool.journal.stored(group, stored, item.block_hashes, item.token_ids, item.request.cache_salt)
    item.num_published = max(item.num_published, num_full)


def _free_hidden(pool: BlockPool, item: RequestState) -> None:
    """Give back the blocks that no token from here on can see. Their content stays findable, as any free block's."""
    for group, sight in pool.limited:
        hidden, first = item.num_hidden[group], sight.first(item.num_computed_tokens) // pool.block_size
        if first > hidden:
            table = item.block_tables[group]
            pool.release(table[hidden:first])
            table[hidden:first] = [NULL_BLOCK] * (first - hidden)
            item.num_hidden[group] = first


def _append(
    state: SchedulerState, item: RequestState, token_ids: Sequence[int]
) -> tuple[Sequence[int], FinishReason | None, int | None]:
    """Add tokens until one ends the request: what was added, why it ended, and at which stop token."""
    for count, token_id in enumerate(token_ids, start=1):
        item.token_ids.append(token_id)
        if token_id in item.ending_token_ids and item.num_generated >= item.request.sampling.min_tokens:
            is_eos = token_id in state.eos_token_ids and not item.request.sampling.ignore_eos
            return token_ids[:count], FinishReason.STOP, None if is_eos else token_id
        if len(item.token_ids) >= item.longest:
            return token_ids[:count], FinishReason.LENGTH, None
    return token_ids, None, None


def _gather_prompt_logprobs(item: RequestState, start: int, entries: Sequence[TokenLogprobs | None]) -> None:
    if item.prompt_logprobs_told:
        return
    gathered = item.prompt_logprobs
    if not gathered:
        gathered.append(None)
    for position, entry in enumerate(entries, start=start + 1):
        if position == len(gathered) < item.num_prompt_tokens:
            gathered.append(entry)


def _tell_prompt_logprobs(item: RequestState) -> list[TokenLogprobs | None] | None:
    """The logprobs of a prompt that were asked for, once."""
    if item.prompt_logprobs_told:
        return None
    told = item.prompt_logprobs or [None]
    assert len(told) == item.num_prompt_tokens, f"{len(told)} prompt logprobs of {item.num_prompt_tokens}"
    item.prompt_logprobs, item.prompt_logprobs_told = [], True
    return told


def _last_output(
    item: RequestState,
    reason: FinishReason,
    *,
    stop_reason: int | None = None,
    token_ids: Sequence[int] = (),
    logprobs: Sequence[TokenLogprobs] | None = None,
    prompt_logprobs: Sequence[TokenLogprobs | None] | None = None,
    error: QuireError | None = None,
    pooled: Pooled | None = None,
) -> EngineOutput:
    return EngineOutput(
        request_id=item.request_id,
        token_ids=token_ids,
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
        finish_reason=reason,
        stop_reason=stop_reason,
        num_cached_tokens=item.num_cached_tokens,
        num_preemptions=item.num_preemptions,
        times=item.times,
        error=error.to_info() if error is not None else None,
        pooled=pooled,
    )


def _note_pace(state: SchedulerState, step: Step, now: float) -> None:
    seconds = now - max(step.started, state.last_settled)
    state.last_settled = now
    if step.scheduled and seconds > 0:
        pace = step.num_tokens / seconds
        old = state.tokens_per_second
        state.tokens_per_second = pace if old == 0 else old + RATE_WEIGHT * (pace - old)
