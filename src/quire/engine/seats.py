"""What the device itself knows of the requests that decode, so that a steady step needs nothing from the host.

A running request has a seat: a row of buffers that stay where they are. It holds how many tokens there are, the one
drawn last, where its blocks are, and how it samples. A decode step reads all of that, and moves it on. The host keeps a
mirror of what it believes stands there, and before a step sends what is to be different: who joined or left, new
blocks.

Legend: s seats, b blocks of the longest request.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from quire.core.sampling import SamplingParams
from quire.ops.draw import DrawTable, table_of
from quire.ops.moving import to_device
from quire.sched.state import Phase, RequestState, ScheduledChunk


@dataclass(slots=True)
class Seat:
    """What the host believes of one row. `token_at`: the position of the token that it holds; -1: of no use. `tables`:
    the owner's, of each of which it has the first `filled` blocks. `params`: how it samples."""

    owner: RequestState | None = None
    epoch: int = 0
    token_at: int = -1
    length: int = 0
    tables: list[list[int]] = field(default_factory=list)
    filled: int = 0
    params: SamplingParams | None = None

    @property
    def is_free(self) -> bool:
        return self.owner is None or self.owner.phase is not Phase.RUNNING

    def holds(self, chunk: ScheduledChunk) -> bool:
        """Whether its token is the chunk's last."""
        at = chunk.start + chunk.num_tokens - 1
        return self.owner is chunk.state and self.epoch == chunk.epoch and self.token_at == at

    def is_ready(self, chunk: ScheduledChunk) -> bool:
        """Whether nothing is to be sent before this chunk of its owner is decoded."""
        start, tables = chunk.start, chunk.state.block_tables
        return (
            self.token_at == start
            and self.length == start + 1
            and self.tables is tables
            and self.filled == len(tables[0])
        )


@dataclass(slots=True)
class _News:
    """What is to be sent: seats and their lengths, seats and their tokens, places in the flattened tables of each
    group and their blocks, seats and their parameters."""

    lengths: list[tuple[int, int]] = field(default_factory=list)
    tokens: list[tuple[int, int]] = field(default_factory=list)
    blocks: list[list[tuple[int, int]]] = field(default_factory=list)
    params: list[tuple[int, SamplingParams]] = field(default_factory=list)


class Seats:
    """Of `count` requests with `num_blocks` blocks each at most, in the tables of `num_groups` groups of layers."""

    def __init__(self, count: int, num_blocks: int, num_groups: int, device: torch.device) -> None:
        self._device = device
        self._seats = [Seat() for _ in range(count)]
        self._of: dict[RequestState, int] = {}
        self._taking_part: list[int] = []
        """Seats whose length is not 0."""
        self.token_s = torch.zeros(count, dtype=torch.int64, device=device)
        self.length_s = torch.zeros(count, dtype=torch.int32, device=device)
        """Tokens that there are, the one held included; 0 of a seat that takes no part in the next step."""
        self.tables_sb = [torch.zeros(count, num_blocks, dtype=torch.int64, device=device) for _ in range(num_groups)]
        self.params = DrawTable.greedy(count, device)

    def fill(self, ids_t: Tensor, rows: Sequence[tuple[int, ScheduledChunk]]) -> None:
        """Puts the tokens that only the device knows into their rows of `ids_t`."""
        if not rows:
            return
        seats = []
        for _, chunk in rows:
            seat = self._of[chunk.state]
            assert self._seats[seat].holds(chunk), "a token is pending that nobody drew"
            seats.append(seat)
        drawn_r = self.token_s.index_select(0, self._upload(seats))
        # What is not finite was drawn as a negative number; the request will be told so.
        ids_t.index_copy_(0, self._upload([row for row, _ in rows]), drawn_r.clamp_(min=0))

    def keep(self, chunks: Sequence[ScheduledChunk], tokens_r: Tensor) -> None:
        """Takes in what was drawn for each chunk, outside of a captured step."""
        seats = [self._seat_of(chunk) for chunk in chunks]
        for seat, chunk in zip(seats, chunks, strict=True):
            self._seats[seat].token_at = chunk.start + chunk.num_tokens
        self.token_s.index_copy_(0, self._upload(seats), tokens_r)

    def prepare(self, chunks: Sequence[ScheduledChunk]) -> tuple[list[int], int]:
        """Sends what a decode step over these needs: one row each. Their seats, and how many seats from the first on
        the step has to run over: those of others are empty in it."""
        seats = [self._seat_of(chunk) for chunk in chunks]
        if max(seats) >= 2 * len(chunks):
            self._move_down(chunks, seats)
        news = _News(blocks=[[] for _ in self.tables_sb])
        for seat, chunk in zip(seats, chunks, strict=True):
            if not self._seats[seat].is_ready(chunk):
                self._compare(seat, chunk, news)
        if seats != self._taking_part:
            for seat in set(self._taking_part).difference(seats):  # a step may run over more than it has to
                self._seats[seat].length = 0
                news.lengths.append((seat, 0))
            self._taking_part = seats
        self._send(news)
        return seats, max(seats) + 1

    def advance(self, seats: Sequence[int]) -> None:
        """After a decode step over these has been started."""
        for seat in seats:
            known = self._seats[seat]
            known.length += 1
            known.token_at += 1

    def empty(self) -> None:
        """Nobody takes part any more, until `prepare` says otherwise."""
        self.length_s.zero_()
        for seat in self._taking_part:
            self._seats[seat].length = 0
        self._taking_part = []

    def _move_down(self, chunks: Sequence[ScheduledChunk], seats: list[int]) -> None:
        """Who sits beyond twice as many seats as are needed gets a free one among those: a step runs over all seats up
        to the last that takes part."""
        enough = 2 * len(chunks)
        moves: list[tuple[int, int]] = []
        for place, (chunk, seat) in enumerate(zip(chunks, seats, strict=True)):
            if seat < enough:
                continue
            free = next((number for number in range(enough) if self._seats[number].is_free), None)
            if free is None:
                break
            known, there = self._seats[seat], self._seats[free]
            if there.owner is not None:
                del self._of[there.owner]
            self._of[chunk.state] = seats[place] = free
            self._seats[free] = Seat(
                owner=known.owner,
                epoch=known.epoch,
                token_at=known.token_at,
                length=there.length,
                params=there.params,
            )
            self._seats[seat] = Seat(length=known.length, params=known.params)
            moves.append((seat, free))
        if moves:
            from_m, to_m = self._upload(moves).unbind(1)
            self.token_s.index_copy_(0, to_m, self.token_s.index_select(0, from_m))

    def _compare(self, seat: int, chunk: ScheduledChunk, news: _News) -> None:
        known, state = self._seats[seat], chunk.state
        length = chunk.start + 1
        if known.length != length:
            known.length = length
            news.lengths.append((seat, length))
        if not known.holds(chunk):
            assert length == len(state.token_ids), "a token is pending that nobody drew"
            known.token_at = chunk.start
            news.tokens.append((seat, state.token_ids[chunk.start]))
        tables = state.block_tables
        if known.tables is not tables:
            known.tables, known.filled = tables, 0
        if known.filled != len(tables[0]):
            width = self.tables_sb[0].shape[1]
            for group, table in enumerate(tables):
                places = range(seat * width + known.filled, seat * width + len(table))
                news.blocks[group].extend(zip(places, table[known.filled :], strict=True))
            known.filled = len(tables[0])
        sampling = state.request.sampling
        if known.params is not sampling:
            known.params = sampling
            news.params.append((seat, sampling))

    def _send(self, news: _News) -> None:
        self._scatter(self.length_s, news.lengths)
        self._scatter(self.token_s, news.tokens)
        for table_sb, blocks in zip(self.tables_sb, news.blocks, strict=True):
            if blocks:
                self._scatter(table_sb.view(-1), blocks)
        if news.params:
            seats = self._upload([seat for seat, _ in news.params])
            self.params.put(seats, table_of([sampling for _, sampling in news.params], self._device))

    def _scatter(self, target: Tensor, entries: Sequence[tuple[int, int]]) -> None:
        if entries:
            places, values = self._upload(entries).unbind(1)
            target.index_copy_(0, places, values.to(target.dtype))

    def _upload(self, numbers: Sequence[int] | Sequence[tuple[int, int]]) -> Tensor:
        return to_device(torch.from_numpy(np.asarray(numbers, np.int64)), self._device)

    def _seat_of(self, chunk: ScheduledChunk) -> int:
        """The request's own, or the lowest that is free."""
        state = chunk.state
        seat = self._of.get(state)
        if seat is not None:
            known = self._seats[seat]
            if known.epoch != chunk.epoch:
                known.epoch, known.token_at = chunk.epoch, -1
            return seat
        # Requests that run are never more than there are seats.
        seat = next(number for number, known in enumerate(self._seats) if known.is_free)
        before = self._seats[seat].owner
        if before is not None:
            del self._of[before]
        self._of[state] = seat
        self._seats[seat] = Seat(
            owner=state, epoch=chunk.epoch, length=self._seats[seat].length, params=self._seats[seat].params
        )
        return seat
