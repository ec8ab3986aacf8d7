"""Gives the device one step after the other: swaps, forward pass, sampling or pooling."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Protocol

import torch
from torch import Tensor

from quire.cache.ledger import HEAD_ROWS
from quire.core.errors import EngineError, QuireError
from quire.core.pooling import PoolingParams
from quire.core.request import TokenLogprobs
from quire.engine.decode_loop import DecodeLoop, runs_alone
from quire.engine.graphs import Graphs
from quire.engine.inputs import BatchBuilder, needs_prompt_logprobs, pending_rows, wanted_rows
from quire.engine.padded import PaddedSteps
from quire.engine.readback import Readback, Reading
from quire.engine.seats import Seats
from quire.engine.warm_up import LargestStep, warm_up
from quire.models.load import LoadedModel
from quire.nn.host_kv import HostKV
from quire.nn.kv import KVCache
from quire.nn.pooling import PooledSoFar
from quire.ops.draw import NOT_FINITE, table_of
from quire.ops.moving import to_device
from quire.ops.sampling import SamplingRow, not_finite
from quire.sched.settle import StepResult
from quire.sched.state import ScheduledChunk, Step


@dataclass(frozen=True, slots=True)
class RunOutput:
    """`results` of the requests that went well; `failures` of those whose own numbers went wrong."""

    results: dict[str, StepResult] = field(default_factory=dict)
    failures: dict[str, QuireError] = field(default_factory=dict)


class Launched(Protocol):
    """A step that the device has been given."""

    def wait(self) -> RunOutput: ...


@dataclass(frozen=True, slots=True)
class Done:
    """One whose results are here already."""

    output: RunOutput

    def wait(self) -> RunOutput:
        return self.output


@dataclass(frozen=True, slots=True)
class Drawing:
    """One whose tokens are on their way: number `places[i]` of those read is `sampled[i]`'s."""

    sampled: Sequence[ScheduledChunk]
    places: Sequence[int]
    reading: Reading

    def wait(self) -> RunOutput:
        output, tokens = RunOutput(), self.reading.wait()
        for chunk, place in zip(self.sampled, self.places, strict=True):
            token_id = tokens[place]
            if token_id == NOT_FINITE:
                output.failures[chunk.state.request_id] = not_finite(chunk.start + chunk.num_tokens)
            else:
                output.results[chunk.state.request_id] = StepResult((token_id,))
        return output


@dataclass(frozen=True, slots=True, kw_only=True)
class Ahead:
    """How a runner goes ahead of what it has told. `steps`: how many may be launched before an earlier one is waited
    for. `seats`: requests that run at once at most; `longest`: their tokens. `padded`: the largest step with prompts in
    it that is padded, to be captured; 0: none is."""

    steps: int
    seats: int
    longest: int
    graphs: Graphs
    padded: int = 0


class Runner:
    """Owns the model's device state: weights, KV cache, host KV for swapping and, if it goes `ahead`, the seats."""

    def __init__(
        self,
        *,
        model: LoadedModel,
        kv: KVCache,
        host_kv: HostKV | None,
        eos_token_ids: tuple[int, ...],
        ahead: Ahead | None = None,
    ) -> None:
        self._decoder = model.decoder
        self._kernels = model.decoder.kernels
        self._pooler = model.decoder.pooling
        self._kv = kv
        self._host_kv = host_kv
        self._eos_token_ids = eos_token_ids
        self._device = kv.data.device
        self._batches = BatchBuilder(kv.block_size, self._device, kv.num_groups)
        self._seats: Seats | None = None
        self._decode: DecodeLoop | None = None
        self._padded: PaddedSteps | None = None
        self.steps_ahead = 0
        """How many steps may be launched before the oldest one's results are taken in."""
        if ahead is not None and self._pooler is None:
            self.steps_ahead = ahead.steps
            blocks = -(-ahead.longest // kv.block_size)
            self._seats = Seats(ahead.seats, blocks, kv.num_groups, self._device)
            self._readback = Readback(ahead.seats, self._device, ahead.steps + 1)
            if runs_alone(model.decoder):
                self._decode = DecodeLoop(model.decoder, kv, self._seats, ahead.graphs, ahead.longest)
                if ahead.padded:
                    self._padded = PaddedSteps(
                        model.decoder,
                        kv,
                        ahead.graphs,
                        tokens=ahead.padded,
                        requests=ahead.seats,
                        longest=ahead.longest,
                    )

    def warm_up(self, step: LargestStep, clock: Callable[[], float]) -> None:
        """Before anything is launched: see `quire.engine.warm_up`."""
        parts = [part for part in (self._decode, self._padded) if part is not None]
        captures = chain.from_iterable(part.captures() for part in parts)
        warm_up(self._decoder, self._kv, step, captures, clock)

    def launch(self, step: Step) -> Launched:
        """Begin to compute `step`. The KV of every scheduled row will be in the cache before a later step begins."""
        if self._host_kv is not None:
            self._host_kv.swap_out(step.swap_out)
            self._host_kv.swap_in(step.swap_in)
        chunks = step.scheduled
        if not chunks:
            return Done(RunOutput())
        if self._decode is not None and self._decode.takes(chunks):
            places, tokens_s = self._decode.step(chunks)
            return Drawing(chunks, places, self._readback.start(tokens_s))
        batch = self._batches.build(chunks)
        if self._seats is not None:
            self._seats.fill(batch.token_ids_t, pending_rows(chunks))
        if self._padded is not None and self._padded.takes(batch):
            hidden_sh = self._padded.forward(batch)
        else:
            hidden_sh = self._decoder.forward(batch, self._kv)
        if self._pooler is not None:
            return Done(self._pool(chunks, hidden_sh))
        if self._seats is None:
            return Done(self._sample(chunks, hidden_sh))
        return self._sample_ahead(self._seats, chunks, hidden_sh)

    @torch.inference_mode()
    def _sample_ahead(self, seats: Seats, chunks: Sequence[ScheduledChunk], hidden_sh: Tensor) -> Launched:
        """On the device, where that does for all who sample; the tokens stay there for the next step, either way."""
        sampled = [chunk for chunk in chunks if chunk.samples]
        if len(sampled) == len(hidden_sh) and all(chunk.state.drawable for chunk in sampled):
            if not sampled:
                return Done(RunOutput())
            tokens_r = torch.cat(
                [
                    self._draw(sampled[first : first + HEAD_ROWS], hidden_sh[first : first + HEAD_ROWS])
                    for first in range(0, len(sampled), HEAD_ROWS)
                ]
            )
            seats.keep(sampled, tokens_r)
            return Drawing(sampled, range(len(sampled)), self._readback.start(tokens_r))
        output = self._sample(chunks, hidden_sh)
        if sampled:  # those that failed included: until this step is settled, they run on
            tokens = [_token_of(chunk, output) for chunk in sampled]
            seats.keep(sampled, to_device(torch.tensor(tokens, dtype=torch.int64), self._device))
        return Done(output)

    def _draw(self, sampled: Sequence[ScheduledChunk], hidden_sh: Tensor) -> Tensor:
        positions = to_device(torch.tensor([chunk.start + chunk.num_tokens for chunk in sampled]), self._device)
        table = table_of([chunk.state.request.sampling for chunk in sampled], self._device)
        return self._kernels.draw(self._decoder.logits(hidden_sh), table, positions)

    def _pool(self, chunks: Sequence[ScheduledChunk], hidden_sh: Tensor) -> RunOutput:
        """Of an engine whose every request is for pooling."""
        assert self._pooler is not None
        output = RunOutput()
        done: list[tuple[str, PoolingParams, PooledSoFar]] = []
        row = 0
        for chunk in chunks:
            state, num_rows = chunk.state, len(wanted_rows(chunk))
            asked = state.request.pooling
            # From its beginning on a prompt is pooled anew, whatever came of it before a preemption.
            so_far = state.pooled_so_far if chunk.start else None
            assert asked is not None
            assert so_far is None or isinstance(so_far, PooledSoFar)
            if num_rows:
                so_far = self._pooler.add(asked, so_far, hidden_sh[row : row + num_rows])
                row += num_rows
            if chunk.samples:
                assert so_far is not None
                done.append((state.request_id, asked, so_far))
            else:
                output.results[state.request_id] = StepResult(pooled_so_far=so_far)
        for (request_id, _, _), pooled in zip(done, self._pooler.finish([entry[1:] for entry in done]), strict=True):
            if isinstance(pooled, QuireError):
                output.failures[request_id] = pooled
            else:
                output.results[request_id] = StepResult(pooled=pooled)
        return output

    def _sample(self, chunks: Sequence[ScheduledChunk], hidden_sh: Tensor) -> RunOutput:
        output = RunOutput()
        sampled: list[ScheduledChunk] = []
        rows: list[int] = []
        row = 0
        for chunk in chunks:
            if needs_prompt_logprobs(chunk):
                self._tell_prompt_logprobs(chunk, hidden_sh[row : row + chunk.num_tokens], output)
                row += chunk.num_tokens
            elif chunk.samples:
                row += 1
            if chunk.samples and chunk.state.request_id not in output.failures:
                sampled.append(chunk)
                rows.append(row - 1)
        if len(rows) != hidden_sh.shape[0]:
            hidden_sh = hidden_sh[rows]
        if len(rows) <= HEAD_ROWS:
            self._sample_rows(sampled, hidden_sh, output)
        else:
            for first in range(0, len(rows), HEAD_ROWS):
                piece = slice(first, first + HEAD_ROWS)
                self._sample_rows(sampled[piece], hidden_sh[piece], output)
        return output

    def _sample_rows(self, sampled: Sequence[ScheduledChunk], hidden_sh: Tensor, output: RunOutput) -> None:
        if not sampled:
            return
        logits_sv = self._decoder.logits(hidden_sh)
        tokens = self._kernels.sample(logits_sv, [self._sampling_row(chunk) for chunk in sampled])
        for chunk, token in zip(sampled, tokens, strict=True):
            request = chunk.state.request
            if isinstance(token, QuireError):
                output.failures[request.request_id] = token
                continue
            told = output.results.get(request.request_id)
            output.results[request.request_id] = StepResult(
                token_ids=[token.token_id],
                logprobs=[token] if request.sampling.logprobs is not None else None,
                prompt_logprobs=None if told is None else told.prompt_logprobs,
            )

    def _sampling_row(self, chunk: ScheduledChunk) -> SamplingRow:
        state = chunk.state
        return SamplingRow(
            sampling=state.request.sampling,
            position=chunk.start + chunk.num_tokens,
            token_ids=state.token_ids,
            num_prompt_tokens=state.num_prompt_tokens,
            eos_token_ids=self._eos_token_ids,
        )

    def _tell_prompt_logprobs(self, chunk: ScheduledChunk, hidden_nh: Tensor, output: RunOutput) -> None:
        """The row at position p tells how likely token p + 1 was; the last prompt token's row tells of none."""
        state = chunk.state
        num_top = state.request.sampling.prompt_logprobs
        assert num_top is not None
        targets = state.token_ids[chunk.start + 1 : min(chunk.start + chunk.num_tokens + 1, state.num_prompt_tokens)]
        entries: list[TokenLogprobs] = []
        try:
            for first in range(0, len(targets), HEAD_ROWS):
                piece = targets[first : first + HEAD_ROWS]
                logits_sv = self._decoder.logits(hidden_nh[first : first + len(piece)])
                entries.extend(self._kernels.token_logprobs(logits_sv, piece, num_top))
        except EngineError as error:  # this prompt's numbers are not finite; the other requests go on
            output.failures[state.request_id] = error
        else:
            output.results[state.request_id] = StepResult(prompt_logprobs=entries)


def _token_of(chunk: ScheduledChunk, output: RunOutput) -> int:
    result = output.results.get(chunk.state.request_id)
    return 0 if result is None or not result.token_ids else result.token_ids[0]
