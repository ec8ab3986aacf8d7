"""The way in and the early way out of the scheduler."""

from __future__ import annotations

from quire.core.errors import InvalidParameter, PromptTooLong, QueueFull
from quire.core.prefix import extend_hashes
from quire.core.request import EngineRequest
from quire.sched.state import RequestState, SchedulerState


def admit(state: SchedulerState, request: EngineRequest, now: float) -> RequestState:  # noqa: ARG001
    """Queue a request, whose kind (`core.pooling.check_pooling`) the caller has checked.

    Raises `InvalidParameter` (id in use, empty prompt), `PromptTooLong` (the prompt and one token can never fit; a
    request that later outgrows the cache alone ends with reason `length`), or `QueueFull`.
    """
    _check_request(state, request)
    refusal = queue_refusal(state, len(request.prompt_token_ids))
    if refusal is not None:
        raise refusal
    if request.tenant and state.limits.scheduling_policy is None and state.policy_name != "fair":
        state.use_policy("fair")
    sampling, num_tokens = request.sampling, len(request.prompt_token_ids)
    admitted = RequestState(
        request=request,
        number=state.num_admitted,
        token_ids=list(request.prompt_token_ids),
        num_prompt_tokens=num_tokens,
        longest=state.longest if sampling.max_tokens is None else min(state.longest, num_tokens + sampling.max_tokens),
        ending_token_ids=(frozenset() if sampling.ignore_eos else state.eos_token_ids).union(sampling.stop_token_ids),
        cache_extra=request.cache_salt.encode(),
        pooled_rows=None if request.pooling is None else state.limits.pooled_rows[request.pooling.task],
    )
    if state.pool.enable_prefix_caching:
        extend_hashes(admitted.block_hashes, admitted.token_ids, state.pool.block_size, admitted.cache_extra)
    state.num_admitted += 1
    state.requests[request.request_id] = admitted
    state.waiting.push(admitted)
    state.service.arrive(request.tenant)
    state.deadlines.add(admitted)
    return admitted


def cancel(state: SchedulerState, request_id: str) -> RequestState | None:
    """Drop a live request and free what it holds; None if there is none. A step that is under way may still hold it:
    `settle` passes over it."""
    cancelled = state.requests.get(request_id)
    if cancelled is not None:
        state.end(cancelled)
    return cancelled


def queue_refusal(state: SchedulerState, num_tokens: int) -> QueueFull | None:
    """Why a prompt of `num_tokens` tokens would not be queued now; None if it would."""
    limits = state.limits
    slots = max(0, limits.max_running - len(state.running) - len(state.swapped))
    num_queued = max(0, len(state.waiting) - slots)
    if len(state.waiting) >= slots and num_queued >= limits.max_num_queued_reqs:
        return QueueFull(
            f"{num_queued} requests are waiting; at most {limits.max_num_queued_reqs} may.",
            remedy="Retry later.",
            retry_after=state.retry_after(state.num_waiting_tokens),
        )
    waiting_tokens = state.num_waiting_tokens
    if waiting_tokens and waiting_tokens + num_tokens > limits.max_num_queued_tokens:
        return QueueFull(
            f"{waiting_tokens} tokens are waiting and the prompt has {num_tokens}; "
            f"at most {limits.max_num_queued_tokens} may wait.",
            remedy="Retry later, or send a shorter prompt.",
            retry_after=state.retry_after(waiting_tokens),
        )
    return None


def _check_request(state: SchedulerState, request: EngineRequest) -> None:
    num_tokens, limits = len(request.prompt_token_ids), state.limits
    if request.request_id in state.requests:
        raise InvalidParameter(
            f"request_id {request.request_id!r} is in use by a request that is not done.",
            param="request_id",
            remedy="Choose another, or wait for that one to end.",
        )
    if num_tokens == 0:
        raise InvalidParameter("The prompt is empty.", param="prompt", remedy="Give at least one token.")
    generates = request.pooling is None
    if num_tokens + generates > limits.max_model_len:
        raise PromptTooLong(
            f"The prompt has {num_tokens} tokens; the context holds {limits.max_model_len}"
            f"{', output included' if generates else ''}.",
            param="prompt",
            remedy="Shorten the prompt, or raise max_model_len if the model allows it.",
        )
    if limits.whole_prompts and num_tokens > limits.max_num_batched_tokens:
        raise PromptTooLong(
            f"The prompt has {num_tokens} tokens; this model needs a whole prompt in one step, which holds "
            f"{limits.max_num_batched_tokens}.",
            param="prompt",
            remedy="Shorten the prompt, or raise max_num_batched_tokens.",
        )
    if num_tokens > state.token_capacity:
        raise PromptTooLong(
            f"The prompt has {num_tokens} tokens; the KV cache holds {state.token_capacity} "
            f"({state.pool.num_usable} blocks of {state.pool.block_size}).",
            param="prompt",
            remedy="Shorten the prompt, or give the KV cache more memory (kv_cache_memory).",
        )
