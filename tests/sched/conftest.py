"""A model without weights, and a driver that takes a scheduler through its steps and checks it at each.

`FakeModel` keeps, for every slot of KV memory, the token prefix that was written there, and for which group of layers.
A real row of K and V is a function of exactly that, so a block that is shared, overwritten, swapped, freed too early or
addressed wrongly shows up as a row that reads another context than its own. A row reads all that its group's layers can
see, which is decided here token by token.
"""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import msgpack
import pytest

from quire.cache.groups import ALL_OF_THE_PAST, Sight
from quire.cache.journal import CacheJournal
from quire.cache.pool import BlockPool
from quire.core.pooling import Pooled
from quire.core.prefix import ROOT, block_hash
from quire.core.request import EngineOutput, EngineRequest, FinishReason, TokenLogprobs
from quire.sched.admit import admit, cancel
from quire.sched.apply import apply
from quire.sched.decide import Decision, decide
from quire.sched.settle import StepResult, settle
from quire.sched.state import SchedulerLimits, SchedulerState, Step
from quire.wire.kv_events import KVEventBatch, encode_batch

VOCAB = 7
EOS = 6


def digest(salt: str, tokens: tuple[int, ...]) -> int:
    return int.from_bytes(hashlib.blake2b(repr((salt, tokens)).encode(), digest_size=6).digest(), "big")


def next_token(salt: str, tokens: tuple[int, ...]) -> int:
    """The model: a deterministic function of the whole prefix, and of what the salt stands for."""
    return digest(salt, tokens) % VOCAB


def logprob_of(salt: str, tokens: tuple[int, ...], token_id: int) -> TokenLogprobs:
    return TokenLogprobs(token_id, -float(digest(salt, tokens) % 1000), 1)


class FakeModel:
    """Slots of device and host memory, each holding the prefix hash that was written last."""

    def __init__(self, block_size: int, sights: Sequence[Sight]) -> None:
        self.block_size = block_size
        self.sights = sights
        self.device: dict[int, int] = {}
        self.host: dict[int, int] = {}
        self.drawn: dict[tuple[str, int, int], int] = {}

    def run(self, step: Step) -> dict[str, StepResult]:
        self._copy(step.swap_out, self.device, self.host)
        self._copy(step.swap_in, self.host, self.device)
        written: set[int] = set()
        for chunk in step.scheduled:
            self._write(chunk, written)
        return {chunk.state.request_id: self._read(chunk) for chunk in step.scheduled}

    def tokens(self, chunk) -> tuple[int, ...]:
        """What is known up to the chunk's end, and what an earlier step drew but was not settled yet."""
        known, key = tuple(chunk.state.token_ids), (chunk.state.request_id, chunk.epoch)
        missing = range(len(known), chunk.start + chunk.num_tokens)
        return known + tuple(self.drawn[*key, position] for position in missing)

    def slot(self, chunk, group: int, position: int) -> int:
        block_id = chunk.state.block_tables[group][position // self.block_size]
        assert block_id != 0
        return block_id * self.block_size + position % self.block_size

    def _copy(self, pairs, source: dict[int, int], target: dict[int, int]) -> None:
        assert len({to for _, to in pairs}) == len(pairs)
        for from_block, to_block in pairs:
            for offset in range(self.block_size):
                value = source.get(from_block * self.block_size + offset)
                if value is not None:
                    target[to_block * self.block_size + offset] = value

    def _write(self, chunk, written: set[int]) -> None:
        assert chunk.num_tokens >= 1
        if chunk.first_slot_cached:
            assert chunk.num_tokens == 1
            return
        tokens, salt = self.tokens(chunk), chunk.state.request.cache_salt
        for group in range(len(self.sights)):
            for position in range(chunk.start, chunk.start + chunk.num_tokens):
                slot = self.slot(chunk, group, position)
                assert slot not in written, "two rows of one step write to one slot"
                written.add(slot)
                self.device[slot] = digest(f"{salt} {group}", tokens[: position + 1])

    def _read(self, chunk) -> StepResult:
        request, tokens = chunk.state.request, self.tokens(chunk)
        salt, end = request.cache_salt, chunk.start + chunk.num_tokens
        for group, sight in enumerate(self.sights):
            rows = range(chunk.start, end)
            for position in (past for past in range(end) if any(can_see(sight, row, past) for row in rows)):
                found = self.device.get(self.slot(chunk, group, position))
                expected = digest(f"{salt} {group}", tokens[: position + 1])
                assert found == expected, f"{request.request_id} reads wrong KV of group {group} at {position}"
        assert chunk.samples == (end == len(tokens))
        if request.pooling is not None:
            return self._pool(chunk)
        prompt_logprobs = None
        if request.sampling.prompt_logprobs is not None:
            last = min(end, chunk.state.num_prompt_tokens - 1)
            prompt_logprobs = [logprob_of(salt, tokens[: p + 1], tokens[p + 1]) for p in range(chunk.start, last)]
        if not chunk.samples:
            return StepResult(prompt_logprobs=prompt_logprobs)
        token_id = next_token(salt, tokens)
        self.drawn[request.request_id, chunk.epoch, end] = token_id
        logprobs = [logprob_of(salt, tokens, token_id)] if request.sampling.logprobs is not None else None
        return StepResult([token_id], logprobs, prompt_logprobs)

    def _pool(self, chunk) -> StepResult:
        """The digests of the rows that the request needs, which are whole only if none was lost and none came twice."""
        state, end = chunk.state, chunk.start + chunk.num_tokens
        wanted = {"first": [0], "last": [state.num_prompt_tokens - 1], "all": range(state.num_prompt_tokens)}
        known = [] if chunk.start == 0 else list(state.pooled_so_far or ())
        for position in range(chunk.start, end):
            if position in wanted[state.pooled_rows]:
                known.append(digest(state.request.cache_salt, tuple(state.token_ids[: position + 1])))
        if not chunk.samples:
            return StepResult(pooled_so_far=tuple(known))
        return StepResult(pooled=Pooled(num_rows=len(known), num_columns=1, data=repr(known).encode()))


def can_see(sight: Sight, row: int, past: int) -> bool:
    """Whether a layer's token at position `row` sees the one at `past`: what the words mean, token by token."""
    if past > row:
        return False
    if sight.window is not None:
        return row - past < sight.window
    return sight.chunk is None or row // sight.chunk == past // sight.chunk


@dataclass
class Expected:
    token_ids: list[int]
    finish_reason: FinishReason
    stop_reason: int | None


def alone(request: EngineRequest, limits: SchedulerLimits, capacity: int) -> Expected:
    """What the request generates by itself: the specification of stopping, one token at a time."""
    sampling, out = request.sampling, []
    while True:
        token = next_token(request.cache_salt, (*request.prompt_token_ids, *out))
        out.append(token)
        may_stop = len(out) >= sampling.min_tokens
        if may_stop and not sampling.ignore_eos and token in limits.eos_token_ids:
            return Expected(out, FinishReason.STOP, None)
        if may_stop and token in sampling.stop_token_ids:
            return Expected(out, FinishReason.STOP, token)
        total = len(request.prompt_token_ids) + len(out)
        if len(out) == sampling.max_tokens or total == limits.max_model_len or total > capacity:
            return Expected(out, FinishReason.LENGTH, None)


@dataclass
class Told:
    """Everything that was said about one request."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list = field(default_factory=list)
    last: EngineOutput | None = None


class Mirror:
    """A router's view of the cache, from events alone: what it holds, and of which tokens and salt each block is."""

    def __init__(self, block_size: int, num_groups: int) -> None:
        self.block_size = block_size
        self.num_groups = num_groups
        self.cached: list[set[bytes]] = [set() for _ in range(num_groups)]
        self.salts: dict[bytes, str] = {}

    def follow(self, payload: bytes) -> None:
        for tag, *fields in msgpack.unpackb(payload)[1]:
            hashes, group = fields[0], (fields[8] if tag == "BlockStored" else fields[2]) or 0
            if tag == "BlockRemoved":
                assert set(hashes) <= self.cached[group], "removed without being there"
                self.cached[group] -= set(hashes)
            else:
                assert tag == "BlockStored"
                self.store(group, hashes, *fields[1:])

    def store(
        self, group, hashes, parent, token_ids, block_size, lora, medium, name, extra_keys, group_idx, kind, window
    ):
        assert block_size == self.block_size
        assert medium == "GPU"
        assert len(token_ids) == len(hashes) * block_size
        assert not set(hashes) & self.cached[group], "stored twice"
        assert (group_idx is None) == (kind is None)
        for number, (named, extra) in enumerate(zip(hashes, extra_keys or [None] * len(hashes))):
            assert not (extra and parent), "only the first block of a text names the salt"
            salt = extra[0] if extra else self.salts.get(parent, "")
            tokens = token_ids[number * block_size : (number + 1) * block_size]
            if parent is None or parent in self.salts:
                assert named == block_hash(parent or ROOT, tokens, salt.encode())
                self.salts[named] = salt
            else:
                assert kind not in (None, "full_attention"), "a block of no text"
            parent = named
        self.cached[group] |= set(hashes)


class Driver:
    """Takes a scheduler through its steps, one second each, and checks after every one. `ahead`: so many steps are
    decided and run before the results of an earlier one are taken in."""

    def __init__(
        self,
        limits: SchedulerLimits,
        *,
        num_blocks: int,
        block_size: int,
        host_blocks: int = 0,
        cache: bool = True,
        sights: Sequence[Sight] = (ALL_OF_THE_PAST,),
        ahead: int = 0,
    ):
        swap_pool = BlockPool(host_blocks + 1, block_size, False) if host_blocks else None
        self.journal = CacheJournal(block_size, sights)
        pool = BlockPool(num_blocks + 1, block_size, cache, sights, self.journal)
        self.mirror = Mirror(block_size, len(sights))
        self.state = SchedulerState(limits, pool, swap_pool)
        self.model = FakeModel(block_size, sights)
        self.now = 0.0
        self.requests: dict[str, EngineRequest] = {}
        self.told: dict[str, Told] = {}
        self.ahead = ahead
        self.in_flight: list[tuple[Step, dict[str, StepResult]]] = []
        self.steps: list[Step] = []
        self.decisions: list[Decision] = []

    def submit(self, request: EngineRequest):
        admitted = admit(self.state, request, self.now)
        self.requests[request.request_id] = request
        self.told[request.request_id] = Told()
        self.state.check_integrity()
        return admitted

    def step(self, *, while_running: Callable[[], object] = lambda: None) -> Step:
        before = pickle.dumps(self.state)
        decision = decide(self.state, self.now)
        assert pickle.dumps(self.state) == before, "decide changed the state"
        assert decision.num_free is not None  # `apply` compares it with the pool
        return self.carry_out(decision, while_running)

    def carry_out(self, decision: Decision, while_running: Callable[[], object] = lambda: None) -> Step:
        state, limits = self.state, self.state.limits
        self.check_order_of_return(decision)
        step = apply(state, decision, self.now)
        state.check_integrity()
        assert all(deadline.time > decision.now for deadline in state.deadlines.entries)
        assert step.num_tokens <= limits.max_num_batched_tokens
        assert len(step.scheduled) <= len(state.running) <= limits.max_num_seqs
        assert len({chunk.state.request_id for chunk in step.scheduled}) == len(step.scheduled)
        for chunk in step.scheduled:
            self.check_written_blocks(chunk)
        results = self.model.run(step)
        self.in_flight.append((step, results))
        while_running()
        self.now += 1.0
        while len(self.in_flight) > (self.ahead if step.scheduled else 0):
            for output in settle(state, *self.in_flight.pop(0), self.now):
                self.hear(output)
        state.check_integrity()
        self.check_events()
        self.steps.append(step)
        self.decisions.append(decision)
        return step

    def check_events(self) -> None:
        """Whoever follows the events knows what is cached."""
        self.mirror.follow(encode_batch(KVEventBatch(self.now, self.journal.take(), 0)))
        assert self.mirror.cached == [self.state.pool.cached_hashes(group) for group in range(self.mirror.num_groups)]

    def check_order_of_return(self, decision: Decision) -> None:
        """Swapped requests come back in the order of the policy, and before any that waits."""
        state, refused = self.state, {late for late, _ in decision.refused}
        back = [entry.state for entry in decision.entries if entry.swap_in]
        left = [item for item in state.swapped.values() if item not in refused and item not in back]
        ranks = [[state.policy.rank(item, state.service.tokens) for item in group] for group in (back, left)]
        assert not (back and left) or max(ranks[0]) < min(ranks[1])
        assert not left or len(back) == len(decision.entries)

    def check_written_blocks(self, chunk) -> None:
        """What is written to is nobody else's, and not what others may be reading by its hash."""
        size, state = self.state.pool.block_size, chunk.state
        if not chunk.first_slot_cached:
            pool = self.state.pool
            for table, cached in zip(state.block_tables, pool.match(state.block_hashes)):
                written = table[chunk.start // size : -(-(chunk.start + chunk.num_tokens) // size)]
                assert all(pool.references(block_id) == 1 for block_id in written)
                assert not set(written) & set(cached)

    def hear(self, output: EngineOutput) -> None:
        told = self.told[output.request_id]
        assert told.last is None, "an output after the last one"
        assert output.token_ids or output.finish_reason
        told.token_ids += output.token_ids
        told.logprobs += output.logprobs or []
        if output.prompt_logprobs is not None:
            assert not told.prompt_logprobs, "prompt logprobs came twice"
            assert len(told.token_ids) <= 1, "prompt logprobs came after the first token"
            told.prompt_logprobs = list(output.prompt_logprobs)
        if output.finish_reason is not None:
            told.last = output

    def cancel(self, request_id: str):
        return cancel(self.state, request_id)

    def finish(self, max_steps: int = 5000) -> None:
        for _ in range(max_steps):
            if not self.state.has_work:
                break
            self.step()
        assert not self.state.has_work, "the scheduler does not come to an end"
        assert self.state.pool.num_free == self.state.pool.num_usable

    def check_answers(self, but: set[str] = frozenset()) -> None:
        """Each request was answered once, with what it gets alone; those in `but`, with the beginning of that."""
        for request_id, request in self.requests.items():
            told = self.told[request_id]
            expected = alone(request, self.state.limits, self.state.token_capacity)
            if request_id in but:
                assert told.token_ids == expected.token_ids[: len(told.token_ids)]
                continue
            assert told.last is not None, f"{request_id} was not answered"
            assert told.last.error is None
            assert told.token_ids == expected.token_ids
            assert (told.last.finish_reason, told.last.stop_reason) == (expected.finish_reason, expected.stop_reason)
            self.check_logprobs(request, told)

    def check_logprobs(self, request: EngineRequest, told: Told) -> None:
        salt, tokens = request.cache_salt, (*request.prompt_token_ids, *told.token_ids)
        first = len(request.prompt_token_ids)
        every = [None, *(logprob_of(salt, tokens[:p], tokens[p]) for p in range(1, len(tokens)))]
        assert told.logprobs == (every[first:] if request.sampling.logprobs is not None else [])
        assert told.prompt_logprobs == (every[:first] if request.sampling.prompt_logprobs is not None else [])


@pytest.fixture(scope="session")
def driver_class() -> type[Driver]:
    return Driver


@pytest.fixture(scope="session")
def expected_alone() -> Callable[..., Expected]:
    return alone
