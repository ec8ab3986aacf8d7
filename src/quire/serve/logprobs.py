"""Log-probabilities in the shapes of completions, chat completions and vLLM's `prompt_logprobs`."""

from __future__ import annotations

from collections.abc import Sequence

from quire.core.request import TokenLogprobs
from quire.text.tokenizer import Tokenizer
from quire.wire.openai import PromptLogprob, PromptLogprobs
from quire.wire.openai_chat import ChoiceLogprobs, TokenLogprob, TopLogprob
from quire.wire.openai_completions import CompletionLogprobs

LEAST = -9999.0
"""Stands for minus infinity, which JSON does not have."""


def _finite(logprob: float) -> float:
    return max(logprob, LEAST)


def chat_logprobs(tokenizer: Tokenizer, entries: Sequence[TokenLogprobs]) -> ChoiceLogprobs:
    def shown(token_id: int) -> tuple[str, list[int]]:
        return tokenizer.token_text(token_id), list(tokenizer.token_bytes(token_id))

    content = []
    for entry in entries:
        top = []
        for token_id, logprob in zip(entry.top_ids, entry.top_logprobs, strict=True):
            token, token_bytes = shown(token_id)
            top.append(TopLogprob(token=token, logprob=_finite(logprob), bytes=token_bytes))
        token, token_bytes = shown(entry.token_id)
        content.append(TokenLogprob(token=token, logprob=_finite(entry.logprob), bytes=token_bytes, top_logprobs=top))
    return ChoiceLogprobs(content=content)


def completion_logprobs(
    tokenizer: Tokenizer, entries: Sequence[tuple[int, TokenLogprobs | None]], offset: int
) -> CompletionLogprobs:
    """`entries` are (token id, its logprobs or None for a prompt's first token); `offset` is where the text starts."""
    result = CompletionLogprobs(text_offset=[], token_logprobs=[], tokens=[], top_logprobs=[])
    for token_id, entry in entries:
        text = tokenizer.token_text(token_id)
        result.tokens.append(text)
        result.text_offset.append(offset)
        offset += len(text)
        if entry is None:
            result.token_logprobs.append(None)
            result.top_logprobs.append(None)
            continue
        result.token_logprobs.append(_finite(entry.logprob))
        top: dict[str, float] = {}
        for other, logprob in zip(entry.top_ids, entry.top_logprobs, strict=True):
            top.setdefault(tokenizer.token_text(other), _finite(logprob))  # of equal texts, the likeliest
        top.setdefault(text, _finite(entry.logprob))
        result.top_logprobs.append(top)
    return result


def prompt_logprobs(tokenizer: Tokenizer, entries: Sequence[TokenLogprobs | None] | None) -> PromptLogprobs | None:
    if entries is None:
        return None
    result: PromptLogprobs = []
    for entry in entries:
        if entry is None:
            result.append(None)
            continue
        row = {
            str(token_id): PromptLogprob(
                logprob=_finite(logprob), rank=rank, decoded_token=tokenizer.token_text(token_id)
            )
            for rank, (token_id, logprob) in enumerate(zip(entry.top_ids, entry.top_logprobs, strict=True), start=1)
        }
        row[str(entry.token_id)] = PromptLogprob(
            logprob=_finite(entry.logprob), rank=entry.rank, decoded_token=tokenizer.token_text(entry.token_id)
        )
        result.append(row)
    return result
