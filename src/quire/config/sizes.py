"""Sizes that hang on what an engine runs on, where the configuration leaves them open."""

from __future__ import annotations

from dataclasses import dataclass

from quire.config.engine import EngineConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """As the fields of `EngineConfig` of these names."""

    max_num_seqs: int
    max_num_batched_tokens: int
    memory_utilization: float


# On a GPU a weight is read for 256 rows in the time that it takes for one, and nobody else needs the memory.
_CPU = Sizes(max_num_seqs=64, max_num_batched_tokens=1024, memory_utilization=0.5)
_GPU = Sizes(max_num_seqs=256, max_num_batched_tokens=8192, memory_utilization=0.9)


def sizes_of(config: EngineConfig, *, gpu: bool) -> Sizes:
    default = _GPU if gpu else _CPU
    return Sizes(
        max_num_seqs=config.max_num_seqs or default.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens or default.max_num_batched_tokens,
        memory_utilization=config.memory_utilization or default.memory_utilization,
    )
