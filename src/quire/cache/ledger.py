"""How large the KV pool is, by construction: what there is, less what everything else takes.

No trial allocation and no profiling run: each row of the ledger is a formula over the model's shapes and the limits of
a step, so that `plan` can print it before a weight is read.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import psutil

from quire.cache.groups import KVGroups, most_held, token_capacity
from quire.core.errors import NotEnoughMemory

GIB = 1024**3
RESERVE = 100
"""One block in so many is kept from newcomers while others run."""
HEAD_ROWS = 128
"""Most rows that go through the output head at once, however many want logits: bounds them by the vocabulary alone."""
USEFUL_LEN = 256
"""A cache that cannot hold one sequence of this many tokens (or of the model's whole context) is refused."""
MOST_CAPTURED_TOKENS = 2048
"""Of a step that is captured as a graph."""
KERNELS_BYTES = 256 * 2**20
"""What kernels keep for themselves on a GPU: their code, sums of a step that is cut for many processors, libraries."""
MAX_SEQUENCES_KEPT = 2
"""The pool never holds more than this many times what all running sequences take at full length."""


def activation_bytes(
    *,
    max_num_batched_tokens: int,
    hidden_size: int,
    intermediate_size: int,
    attention_size: int,
    kv_size: int,
    vocab_size: int,
    dtype_bytes: int,
) -> int:
    """Bound on what a forward pass holds at one time, in bytes.

    Per token: the residual stream, its normalised copy and a sub-layer's output, and the wider of the two sub-layers'
    inner values (`attention_size` = heads x head dim, for queries and outputs; `kv_size` = KV heads x head dim, for K
    and V; gate, up, the activation and what it is made of). Per row of the head: its logits, once in pieces and once
    put together, and in float32. Rows are sampled one by one, with some ten copies of one row (changed, as weights,
    sorted, summed up in float64).
    """
    inner = max(2 * attention_size + 2 * kv_size, 4 * intermediate_size)
    per_token = (3 * hidden_size + inner) * max(dtype_bytes, 4)
    rows = min(HEAD_ROWS, max_num_batched_tokens)
    return max_num_batched_tokens * per_token + vocab_size * (rows * (2 * dtype_bytes + 4) + 64)


@dataclass(frozen=True, slots=True, kw_only=True)
class KVLedger:
    """Sizes one engine's KV pool. Sizes are in bytes, lengths in tokens.

    * `memory_available`: what could be allocated (`available_memory()`) if weights and tables were not in memory.
    * `table_bytes`: of the rotary positions' cosines and sines. `captured_bytes`: of captured steps, which have
      activations of their own, and of what kernels keep for themselves.
    * `memory_utilization`: share of what is left after weights and activations that the pool may take;
      `kv_cache_memory` names the pool's size instead.
    * `kv_bytes_per_block`: of the layers of one group. `step_tokens`: the most that a step computes.
    * `longest`: the model's context. `required_len`: what one sequence must hold, if the operator asked for a
      length; otherwise the pool may hold less than `longest`, down to `USEFUL_LEN`.
    """

    memory_available: int
    weight_bytes: int
    activation_bytes: int
    kv_bytes_per_block: int
    groups: KVGroups
    step_tokens: int
    block_size: int
    longest: int
    max_num_seqs: int
    memory_utilization: float = 0.5
    kv_cache_memory: int | None = None
    required_len: int | None = None
    table_bytes: int = 0
    captured_bytes: int = 0

    @property
    def memory_left(self) -> int:
        """After weights, tables, activations and captured steps."""
        taken = self.weight_bytes + self.table_bytes + self.activation_bytes + self.captured_bytes
        return self.memory_available - taken

    @property
    def kv_budget(self) -> int:
        if self.kv_cache_memory is not None:
            return self.kv_cache_memory
        return max(0, int(self.memory_left * self.memory_utilization))

    @property
    def num_blocks(self) -> int:
        """Blocks of the pool, the null block included."""
        length = self.required_len or self.longest
        in_step = self.blocks_for(length, self.step_tokens) - self.blocks_for(length)
        most = MAX_SEQUENCES_KEPT * self.max_num_seqs * self.blocks_for(length) + in_step + 1
        return min(most, self.kv_budget // self.kv_bytes_per_block)

    @property
    def kv_bytes(self) -> int:
        return self.num_blocks * self.kv_bytes_per_block

    @property
    def max_model_len(self) -> int:
        """The longest prompt plus output that one sequence can have."""
        return min(self.required_len or self.longest, self.capacity)

    @property
    def capacity(self) -> int:
        """Tokens, up to the model's context, that the pool holds of one sequence."""
        limit = max(self.required_len or 0, self.longest)
        return token_capacity(self.groups.sights, max(0, self.num_blocks - 1), self.block_size, limit)

    def blocks_for(self, num_tokens: int, step_tokens: int = 1) -> int:
        """Blocks, of all groups, that a sequence of `num_tokens` tokens holds at most at one time, if a step computes
        `step_tokens` of them."""
        return most_held(self.groups.sights, num_tokens, self.block_size, step_tokens)

    def num_sequences(self, num_tokens: int, num_blocks: int) -> int:
        """Sequences of so many tokens that run at once in `num_blocks` blocks, as the scheduler lets them in: the last
        of them computes its prompt in the largest steps, while the others decode, and leaves the `RESERVE` free. One
        alone may take smaller steps, and needs no reserve."""
        usable, decoding = num_blocks - 1, self.blocks_for(num_tokens)
        others = (usable - usable // RESERVE - self.blocks_for(num_tokens, self.step_tokens)) // decoding
        return min(self.max_num_seqs, others + 1) if others > 0 else int(decoding <= usable)

    @property
    def smallest_len(self) -> int:
        """What `max_model_len` must reach for the engine to start."""
        return self.required_len or min(self.longest, USEFUL_LEN)

    def check(self) -> None:
        """Raises `NotEnoughMemory`, with the whole ledger, unless the pool fits and is of use."""
        if self.kv_cache_memory is not None and self.kv_cache_memory > self.memory_left:
            problem = f"A KV cache of {_size(self.kv_cache_memory)} does not fit: {_size(self.memory_left)} are left."
        elif self.max_model_len < self.smallest_len:
            problem = (
                f"The KV cache would hold {self.max_model_len} tokens; one sequence needs {self.smallest_len} "
                f"({_size(self._bytes_for(self.smallest_len))})."
            )
        else:
            return
        ledger = "\n".join(f"  {name:<34}{_size(value):>14}" for name, value in self.rows())
        raise NotEnoughMemory(
            f"{problem}\n{ledger}",
            param="max_model_len" if self.required_len else "memory_utilization",
            remedy="Lower max_model_len or max_num_batched_tokens, raise memory_utilization, or free memory.",
        )

    def rows(self) -> list[tuple[str, int]]:
        """The ledger, in bytes, from what there is to what is left."""
        return [
            ("memory available", self.memory_available),
            ("weights", self.weight_bytes),
            ("rotary positions", self.table_bytes),
            ("activations of one step", self.activation_bytes),
            *([("captured steps, kernels", self.captured_bytes)] if self.captured_bytes else []),
            ("left for the KV cache", self.memory_left),
            ("KV cache budget", self.kv_budget),
            ("KV cache", self.kv_bytes),
            ("KV cache per block", self.kv_bytes_per_block),
            ("unused", self.memory_left - self.kv_bytes),
        ]

    def _bytes_for(self, num_tokens: int) -> int:
        return (self.blocks_for(num_tokens) + 1) * self.kv_bytes_per_block


def available_memory(cgroup_root: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")) -> int:
    """Bytes this process may still allocate: what the machine has, or what the tightest cgroup around us leaves.

    Page cache that the kernel would give back (inactive files) counts as available.
    """
    return min([psutil.virtual_memory().available, *_cgroup_rooms(cgroup_root, membership)])


def _cgroup_rooms(root: Path, membership: Path) -> list[int]:
    """What each cgroup from ours up to the root leaves, for version 2 and for version 1's memory controller."""
    rooms: list[int] = []
    for line in _text(membership).splitlines():
        _number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if not controllers:
            names, base = ("memory.max", "memory.current", "inactive_file"), root
        elif "memory" in controllers.split(","):
            names, base = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"), root / "memory"
        else:
            continue
        group = base / path.strip("/")
        for directory in [group, *group.parents]:
            room = _room(directory, *names)
            if room is not None:
                rooms.append(room)
            if directory == base:
                break
    return rooms


def _room(directory: Path, limit_file: str, usage_file: str, inactive_key: str) -> int | None:
    limit, usage = _text(directory / limit_file).strip(), _text(directory / usage_file).strip()
    if not limit.isdigit() or not usage.isdigit():
        return None  # "max", or no such controller here
    inactive = 0
    for line in _text(directory / "memory.stat").splitlines():
        key, _, value = line.partition(" ")
        if key == inactive_key:
            inactive = int(value)
    return max(0, int(limit) - int(usage) + inactive)


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def _size(num_bytes: int) -> str:
    return f"{num_bytes / GIB:.2f} GiB" if abs(num_bytes) >= GIB // 10 else f"{num_bytes / 2**20:.2f} MiB"
