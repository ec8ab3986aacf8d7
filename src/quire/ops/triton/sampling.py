"""`sample` and `token_logprobs` by Triton: one upload and one download for all rows of a step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from quire.core.errors import QuireError
from quire.core.request import TokenLogprobs
from quire.core.sampling import SamplingParams
from quire.ops import sampling as definition
from quire.ops.draw import MAX_TOP_K, NOT_FINITE, DrawTable
from quire.ops.logits_processing import changes_logits, forbidden_ids
from quire.ops.sampling import SamplingRow, not_finite, nothing_left
from quire.ops.target import Target
from quire.ops.triton.drawing import Drawing, dense
from quire.ops.triton.kernels.logits import edit_kernel
from quire.ops.triton.launch import Launch

_TILE = 1024
_ROWS_AT_ONCE = 32
"""Rows of which alternatives are sought together: that takes twice the memory of their logits."""
_FIELDS = 4
"""What is known of a row beside alternatives: the largest logit, the weight of all tokens, its token's logit, rank."""
_LOW = 2**32 - 1
_ALIGNMENT = 16


class TritonSampling:
    """Of one engine, in one stream: its calls share memory (see `Drawing`)."""

    def __init__(self, target: Target) -> None:
        self._launch: Launch = target.launch
        self._drawing = Drawing(target)

    def draw(self, logits_sv: Tensor, table: DrawTable, position_s: Tensor) -> Tensor:
        return self._drawing.draw(logits_sv, table, position_s)

    def sample(self, logits_sv: Tensor, rows: Sequence[SamplingRow]) -> list[TokenLogprobs | QuireError]:
        """Rows with typical_p are sampled by the definition, on the host: its sums have to be made token by token."""
        assert logits_sv.shape[0] == len(rows), (logits_sv.shape, len(rows))
        if not rows:
            return []
        logits_sv, vocab = dense(logits_sv), logits_sv.shape[1]
        token_s, raw_s = self._tokens(logits_sv, rows)
        told = [i for i, row in enumerate(rows) if row.sampling.logprobs is not None and not _on_host(row.sampling)]
        num_top = min(vocab, max((rows[i].sampling.logprobs or 0 for i in told), default=0))
        found = torch.stack((token_s, raw_s)).double().flatten()
        if told:
            [index_r] = _upload([np.array(told, dtype=np.int64)], logits_sv.device)
            told_r = token_s[index_r].clamp(min=0)  # of a row that gives an error, anything
            found = torch.cat((found, self._describe(logits_sv[index_r], told_r, num_top).flatten()))
        on_host = found.cpu().numpy()
        drawn_s, first_s = on_host[: 2 * len(rows)].reshape(2, -1).astype(np.int64).tolist()
        about = dict(zip(told, on_host[2 * len(rows) :].reshape(len(told), _FIELDS + 2 * num_top), strict=True))
        tokens: list[TokenLogprobs | QuireError] = []
        for i, row in enumerate(rows):
            if first_s[i] == NOT_FINITE:
                tokens.append(not_finite(row.position))
            elif _on_host(row.sampling):
                tokens += definition.sample(logits_sv[i : i + 1].cpu(), [row])
            elif drawn_s[i] == NOT_FINITE:
                tokens.append(nothing_left(row))
            elif i in about:
                tokens.append(_told(about[i], drawn_s[i], row.sampling.logprobs or 0))
            else:
                tokens.append(TokenLogprobs(drawn_s[i], 0.0, 0))
        return tokens

    def token_logprobs(self, logits_sv: Tensor, token_ids: Sequence[int], num_top: int) -> list[TokenLogprobs]:
        assert logits_sv.shape[0] == len(token_ids), (logits_sv.shape, len(token_ids))
        if not token_ids:
            return []
        vocab = logits_sv.shape[1]
        if not 0 <= min(token_ids) <= max(token_ids) < vocab:
            raise IndexError(f"a token id is outside of the vocabulary of {vocab}")
        [token_s] = _upload([np.array(token_ids, dtype=np.int64)], logits_sv.device)
        rows = self._describe(dense(logits_sv), token_s, min(vocab, num_top)).cpu().numpy()
        finite = np.isfinite(rows[:, 0])
        if not finite.all():
            raise not_finite(int(np.argmin(finite)))
        return [_told(row, token_id, num_top) for row, token_id in zip(rows, token_ids, strict=True)]

    def _tokens(self, logits_sv: Tensor, rows: Sequence[SamplingRow]) -> tuple[Tensor, Tensor]:
        """Tokens drawn, and of the same logits before any change the likeliest; `NOT_FINITE` in either."""
        changed = [i for i, row in enumerate(rows) if _changes(row)]
        plain = [_GREEDY if row.sampling.greedy or _on_host(row.sampling) else row.sampling for row in rows]
        heads, words = _pack_changes(rows, changed)
        uploaded = _upload([*_columns(plain, rows), heads, words], logits_sv.device)
        seed, position_s, top_p, temperature, min_p, top_k, heads_d, words_d = uploaded
        table = DrawTable(temperature=temperature, min_p=min_p, top_k=top_k, top_p=top_p, seed=seed)
        raw_s, edited_sv = None, logits_sv
        if changed:
            greedy = DrawTable.greedy(len(rows), logits_sv.device)
            raw_s = self._drawing.choose(logits_sv, greedy, position_s, draws=False, truncates=False)
            edited_sv = logits_sv.clone(memory_format=torch.contiguous_format)
            arguments = (logits_sv, logits_sv.stride(0), edited_sv, logits_sv.shape[1], heads_d, words_d)
            self._launch(edit_kernel, (len(changed),), *arguments, TILE=_TILE)
        token_s = self._drawing.choose(
            edited_sv,
            table,
            position_s,
            draws=any(sampling is not _GREEDY for sampling in plain),
            truncates=any(map(_truncates, plain)),
        )
        return token_s, token_s if raw_s is None else raw_s

    def _describe(self, logits_sv: Tensor, token_s: Tensor, num_top: int) -> Tensor:
        """float64 `[s, 4 + 2 num_top]`: `_FIELDS`, ids of the largest logits, best first, and these."""
        parts = []
        for first in range(0, len(token_s), _ROWS_AT_ONCE):
            x_sv, token_s1 = logits_sv[first : first + _ROWS_AT_ONCE], token_s[first : first + _ROWS_AT_ONCE, None]
            most_s, total_s = self._drawing.totals(x_sv)
            own_s1 = x_sv.gather(1, token_s1)
            rank_s = (x_sv > own_s1).sum(dim=1) + 1
            top_sk = _top_ids(x_sv, num_top)
            fields = torch.stack((most_s, total_s, own_s1[:, 0].double(), rank_s.double()), dim=1)
            parts.append(torch.cat((fields, top_sk.double(), x_sv.gather(1, top_sk).double()), dim=1))
        return torch.cat(parts)


_GREEDY = SamplingParams(temperature=0.0, seed=0)


def _on_host(sampling: SamplingParams) -> bool:
    return sampling.typical_p < 1.0 and not sampling.greedy


def _truncates(sampling: SamplingParams) -> bool:
    return sampling.min_p > 0.0 or sampling.top_k > 0 or sampling.top_p < 1.0


def _changes(row: SamplingRow) -> bool:
    return not _on_host(row.sampling) and changes_logits(row.sampling, len(row.token_ids) - row.num_prompt_tokens)


def _columns(plain: Sequence[SamplingParams], rows: Sequence[SamplingRow]) -> list[NDArray[Any]]:
    """A `DrawTable`'s columns and positions."""
    assert all(sampling.seed is not None for sampling in plain), "the front end sets the seed"
    return [
        np.array([sampling.seed for sampling in plain], dtype=np.int64),
        np.array([row.position for row in rows], dtype=np.int64),
        np.array([sampling.top_p for sampling in plain], dtype=np.float64),
        np.array([sampling.temperature for sampling in plain], dtype=np.float32),
        np.array([sampling.min_p for sampling in plain], dtype=np.float32),
        np.array([min(max(sampling.top_k, 0), MAX_TOP_K) for sampling in plain], dtype=np.int32),
    ]


def _pack_changes(rows: Sequence[SamplingRow], changed: Sequence[int]) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """What `edit_kernel` reads: its `heads` and `words`."""
    heads: list[int] = []
    words: list[NDArray[np.int32]] = []
    begin = 0
    for i in changed:
        row, sampling = rows[i], rows[i].sampling
        allowed = sampling.allowed_token_ids
        forbidden = forbidden_ids(sampling, row.token_ids, row.num_prompt_tokens, row.eos_token_ids)
        repeated, (output, taken) = _repeated(row), _taken(row)
        lists = (
            _ids(allowed or ()),
            _ids(forbidden),
            _ids(list(sampling.logit_bias)),
            np.array(list(sampling.logit_bias.values()), dtype=np.float32).view(np.int32),
            repeated,
            output,
            taken.view(np.int32),
        )
        words += lists
        penalty = int(np.float32(sampling.repetition_penalty).view(np.int32))
        lengths = (-1 if allowed is None else len(allowed), len(forbidden), len(sampling.logit_bias), len(repeated))
        heads += (i, begin, *lengths, penalty, len(output))
        begin += sum(map(len, lists))
    return np.array(heads, dtype=np.int32), np.concatenate(words) if words else np.empty(0, dtype=np.int32)


def _repeated(row: SamplingRow) -> NDArray[np.int32]:
    """Ids that the penalty for repetition concerns, each once."""
    return _ids(row.token_ids if row.sampling.repetition_penalty != 1.0 else (), distinct=True)


def _taken(row: SamplingRow) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """Ids of the output, each once, and what is added to their logits."""
    sampling = row.sampling
    if not sampling.frequency_penalty and not sampling.presence_penalty:
        return _ids(()), np.empty(0, dtype=np.float32)
    ids, counts = np.unique(_ids(row.token_ids[row.num_prompt_tokens :]), return_counts=True)
    amounts = np.float32(sampling.frequency_penalty) * counts.astype(np.float32) + np.float32(sampling.presence_penalty)
    return ids, -amounts


def _ids(token_ids: Sequence[int], *, distinct: bool = False) -> NDArray[np.int32]:
    ids = np.fromiter(token_ids, dtype=np.int32, count=len(token_ids))
    return np.unique(ids) if distinct else ids


def _upload(arrays: Sequence[NDArray[Any]], device: torch.device) -> list[Tensor]:
    """The same on the device, in one copy. Each begins at a multiple of 16 bytes, however many rows there are: for
    pointers that do not, Triton compiles other kernels."""
    sizes = [-(-array.nbytes // _ALIGNMENT) * _ALIGNMENT for array in arrays]
    begins = (np.cumsum(sizes) - sizes).tolist()
    together = np.zeros(sum(sizes), dtype=np.uint8)
    for begin, array in zip(begins, arrays, strict=True):
        together[begin : begin + array.nbytes] = array.view(np.uint8)
    whole = torch.from_numpy(together)
    if device.type != "cpu":
        whole = whole.pin_memory().to(device, non_blocking=True)
    return [
        whole[begin : begin + array.nbytes].view(torch.from_numpy(array[:0]).dtype)
        for begin, array in zip(begins, arrays, strict=True)
    ]


def _top_ids(logits_sv: Tensor, num_top: int) -> Tensor:
    """Ids of the largest, best first, of equal ones the lower first: by keys of which no two are equal."""
    bits_sv = (logits_sv + 0.0).view(torch.int32)  # there is one zero then
    ordered_sv = (bits_sv ^ ((bits_sv >> 31) & 0x7FFFFFFF)).long()
    id_v = torch.arange(logits_sv.shape[1], device=logits_sv.device)
    keys_sk = ((ordered_sv << 32) + (_LOW - id_v)).topk(num_top, dim=1).values
    return _LOW - (keys_sk & _LOW)


def _told(row: NDArray[np.float64], token_id: int, num_top: int) -> TokenLogprobs:
    """From a row of `_describe`; logarithms are the host's, as the definition's are."""
    most, total, own, rank = row[:_FIELDS].tolist()
    ids, values = np.split(row[_FIELDS:], 2)
    count = min(num_top, len(ids))
    logprobs = (np.concatenate(([own], values[:count])) - most - math.log(total)).astype(np.float32).tolist()
    return TokenLogprobs(token_id, logprobs[0], int(rank), tuple(ids[:count].astype(int).tolist()), tuple(logprobs[1:]))
