"""`sample` and `token_logprobs` by compiled kernels: one call for all rows of a step."""

from __future__ import annotations

import struct
from array import array
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from quire.core.errors import QuireError
from quire.core.request import TokenLogprobs
from quire.ops.cpu.library import kernels_module
from quire.ops.logits_processing import changes_logits, forbidden_ids, penalises
from quire.ops.op import Implementation
from quire.ops.sampling import SamplingRow, not_finite, nothing_left
from quire.ops.target import Target

# `SampleRow` in csrc/sampling/sampling.hpp, field by field.
_ROW = struct.Struct("=7d15q")
_UNCHANGED = (0, 0, -1, 0, 0, 0, 0, 0, 0, 0, 0)
_PLAIN_GREEDY = _ROW.pack(0.0, 0.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0, 0, 0, -1, *_UNCHANGED)
_RESULT = np.dtype([("token_id", "i8"), ("status", "i8"), ("rank", "i8"), ("logprob", "f8")])
_SAMPLED, _NOT_FINITE = 0, 1


class _Output:
    """Where calls write, and how that is read. Kept from call to call, and as large as the largest has needed."""

    def __init__(self) -> None:
        self.results = np.empty(0, dtype=_RESULT)
        self.top_ids = np.empty(0, dtype=np.int64)
        self.top_logprobs = np.empty(0, dtype=np.float32)
        self.max_top = 0
        self.addresses = (0, 0, 0)

    def make_room(self, rows: int, max_top: int) -> None:
        """For a call with that many rows, and alternatives per row at most."""
        self.max_top = max_top
        if rows > len(self.results) or rows * max_top > len(self.top_ids):
            self.results = np.empty(rows, dtype=_RESULT)
            self.top_ids = np.empty(rows * max_top, dtype=np.int64)
            self.top_logprobs = np.empty(rows * max_top, dtype=np.float32)
            self.addresses = (self.results.ctypes.data, self.top_ids.ctypes.data, self.top_logprobs.ctypes.data)

    def token(self, row: int, token_id: int, rank: int, logprob: float, num_top: int) -> TokenLogprobs:
        top = slice(row * self.max_top, row * self.max_top + min(num_top, self.max_top))
        return TokenLogprobs(
            token_id, logprob, rank, tuple(self.top_ids[top].tolist()), tuple(self.top_logprobs[top].tolist())
        )


class CpuSampling:
    """Over one engine's threads. Logits are float32 in any engine."""

    def __init__(self, target: Target) -> None:
        self._backend = target.cpu
        self._module: Any = kernels_module()
        self._output = _Output()

    def sample(self, logits_sv: Tensor, rows: Sequence[SamplingRow]) -> list[TokenLogprobs | QuireError]:
        num_rows, vocab = logits_sv.shape
        assert num_rows == len(rows), (num_rows, len(rows))
        ids, biases = array("q"), array("d")
        packed = b"".join([_pack(row, ids, biases) for row in rows])
        logits, output = _dense(logits_sv), self._output
        output.make_room(num_rows, min(vocab, max((row.sampling.logprobs or 0 for row in rows), default=0)))
        self._module.sample(
            self._backend,
            logits.data_ptr(),
            logits.stride(0),
            num_rows,
            vocab,
            packed,
            ids.buffer_info()[0],
            biases.buffer_info()[0],
            output.max_top,
            *output.addresses,
        )
        tokens: list[TokenLogprobs | QuireError] = []
        for row, (token_id, status, rank, logprob) in zip(rows, output.results[:num_rows].tolist(), strict=True):
            if status != _SAMPLED:
                tokens.append(not_finite(row.position) if status == _NOT_FINITE else nothing_left(row))
            elif rank == 0:
                tokens.append(TokenLogprobs(token_id, 0.0, 0))
            else:
                tokens.append(output.token(len(tokens), token_id, rank, logprob, row.sampling.logprobs or 0))
        return tokens

    def token_logprobs(self, logits_sv: Tensor, token_ids: Sequence[int], num_top: int) -> list[TokenLogprobs]:
        num_rows, vocab = logits_sv.shape
        assert num_rows == len(token_ids), (num_rows, len(token_ids))
        logits, targets, output = _dense(logits_sv), array("q", token_ids), self._output
        output.make_room(num_rows, min(vocab, num_top))
        self._module.token_logprobs(
            self._backend,
            logits.data_ptr(),
            logits.stride(0),
            num_rows,
            vocab,
            targets.buffer_info()[0],
            output.max_top,
            *output.addresses,
        )
        tokens = []
        for row, (token_id, status, rank, logprob) in enumerate(output.results[:num_rows].tolist()):
            if status != _SAMPLED:
                raise not_finite(row)
            tokens.append(output.token(row, token_id, rank, logprob, num_top))
        return tokens


def _pack(row: SamplingRow, ids: array[int], biases: array[float]) -> bytes:
    """A row's parameters in the kernel's layout; the token ids that they need go to the end of `ids`."""
    sampling = row.sampling
    greedy = sampling.greedy
    changes = changes_logits(sampling, len(row.token_ids) - row.num_prompt_tokens)
    if greedy and not changes and sampling.logprobs is None:
        return _PLAIN_GREEDY
    assert greedy or sampling.seed is not None, "the front end sets the seed"
    return _ROW.pack(
        sampling.temperature,
        sampling.min_p,
        sampling.top_p,
        sampling.typical_p,
        sampling.repetition_penalty,
        sampling.frequency_penalty,
        sampling.presence_penalty,
        max(0, sampling.top_k),
        sampling.seed or 0,
        row.position,
        -1 if sampling.logprobs is None else sampling.logprobs,
        *(_changes(row, ids, biases) if changes else _UNCHANGED),
    )


def _changes(row: SamplingRow, ids: array[int], biases: array[float]) -> tuple[int, ...]:
    """The fields from `changed` on."""
    sampling = row.sampling

    def add(token_ids: Sequence[int]) -> tuple[int, int]:
        begin = len(ids)
        ids.extend(token_ids)
        return begin, len(token_ids)

    allowed = (0, -1) if sampling.allowed_token_ids is None else add(sampling.allowed_token_ids)
    forbidden = add(forbidden_ids(sampling, row.token_ids, row.num_prompt_tokens, row.eos_token_ids))
    biased = add(list(sampling.logit_bias))
    first_bias = len(biases)
    biases.extend(sampling.logit_bias.values())
    history = add(row.token_ids) if penalises(sampling) else (0, 0)
    num_prompt = min(row.num_prompt_tokens, history[1])
    return (1, *allowed, *forbidden, *biased, first_bias, *history, num_prompt)


def _dense(logits_sv: Tensor) -> Tensor:
    assert logits_sv.dtype == torch.float32, logits_sv.dtype
    return logits_sv if logits_sv.stride(-1) == 1 or logits_sv.shape[1] == 1 else logits_sv.contiguous()


def implementations() -> list[Implementation]:
    return [
        Implementation(
            op=op,
            backend="cpu",
            build=build,
            unfit=Target.unfit_for_cpu_sampling,
            preference=100,
            note="compiled, one call per step, without sorting the vocabulary",
        )
        for op, build in (
            ("sample", lambda target: CpuSampling(target).sample),
            ("token_logprobs", lambda target: CpuSampling(target).token_logprobs),
        )
    ]
