"""What a model's steps read and compute, counted from its description: the roofline is these over the machine's limits.

Weights are read once a step, keys and values of a context once, in what they are stored as; an addition and a
multiplication are two operations. Rows of the embedding that are looked up are not counted, nor activations. Experts:
the share of them that a step's rows hit, if each row chooses evenly. Windows of attention are not taken into account.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from quire.core.kv_format import kv_block_bytes, resolve_kv_dtype
from quire.models.checkpoint import Checkpoint
from quire.models.parameters import list_parameters
from quire.models.quantization.scheme import Format
from quire.models.registry import identify
from quire.models.slots import EMBEDDING, HEAD

DTYPE_BYTES = 2
GB, TERA = 1e9, 1e12


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a machine can do: bytes copied (read plus written) and bf16 operations, a second."""

    bandwidth: float
    flops: float


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Of one step."""

    bytes: float
    operations: float

    def seconds(self, limits: Limits) -> float:
        """The least it can take."""
        return max(self.bytes / limits.bandwidth, self.operations / limits.flops)

    def bound(self, limits: Limits) -> Literal["memory", "arithmetic"]:
        return "memory" if self.bytes / limits.bandwidth > self.operations / limits.flops else "arithmetic"


@dataclass(frozen=True, kw_only=True)
class Counts:
    """Of one model: bytes and numbers of weights that every row meets, of the head, and of all experts together."""

    layers_bytes: int
    layers_elements: int
    head_bytes: int
    head_elements: int
    experts_bytes: int
    experts_elements: int
    expert_share: float
    """Of all experts, those that one row meets."""
    kv_bytes_per_token: int
    queries_size: int
    """Widths of one token's queries, all heads of all layers together."""
    vocab_size: int

    @property
    def weight_bytes(self) -> int:
        """All that is read where every expert is hit; the embedding only where it is the head as well."""
        return self.layers_bytes + self.head_bytes + self.experts_bytes

    def decode(self, batch: int, context: float) -> Cost:
        """A step of `batch` requests with `context` tokens each, the new one included."""
        tokens = batch * context
        return Cost(
            bytes=self.layers_bytes
            + self.head_bytes
            + self.experts_bytes * self._hit(batch)
            + (tokens + batch) * self.kv_bytes_per_token,
            operations=2 * batch * (self._met_elements + self.head_elements) + 4 * self.queries_size * tokens,
        )

    def prefill(self, prompt_lens: Sequence[int]) -> Cost:
        """A step that computes these prompts whole, each of which gives one row of logits."""
        rows = sum(prompt_lens)
        pairs = sum(length * (length + 1) / 2 for length in prompt_lens)
        return Cost(
            bytes=self.layers_bytes
            + self.head_bytes
            + self.experts_bytes * self._hit(rows)
            + 2 * rows * self.kv_bytes_per_token,
            operations=2 * rows * self._met_elements
            + 2 * len(prompt_lens) * self.head_elements
            + 4 * self.queries_size * pairs,
        )

    def whole(self, prompt_lens: Sequence[int], output_lens: Sequence[int], limits: Limits) -> float:
        """The least seconds for all of these requests, begun together: one prefill, then as many steps as the longest
        output has further tokens."""
        seconds = self.prefill(prompt_lens).seconds(limits)
        for step in range(1, max(output_lens)):
            contexts = [prompt + step for prompt, output in zip(prompt_lens, output_lens, strict=True) if output > step]
            seconds += self.decode(len(contexts), sum(contexts) / len(contexts)).seconds(limits)
        return seconds

    @property
    def _met_elements(self) -> float:
        return self.layers_elements + self.experts_elements * self.expert_share

    def _hit(self, rows: int) -> float:
        """The share of the experts that some row chooses."""
        return 1 - (1 - self.expert_share) ** rows


def count(directory: Path, *, quantization: Format | None = None, kv_cache_dtype: str = "auto") -> Counts:
    """Of the checkpoint in `directory`, in bfloat16 where it is not quantised. Reads no weight."""
    checkpoint = Checkpoint.open(directory)
    family, arch = identify(checkpoint.config, str(directory / "config.json"))
    nbytes = {"layers": 0, "head": 0, "experts": 0}
    elements = dict(nbytes)
    parameters = list_parameters(checkpoint, family, arch, quantization=quantization)
    has_head = any(parameter.path == HEAD for parameter in parameters)
    for parameter in parameters:
        if parameter.path == EMBEDDING and (has_head or not arch.tie_word_embeddings):
            continue
        part = "experts" if ".experts." in parameter.path else "layers"
        part = "head" if parameter.path in (EMBEDDING, HEAD) else part
        nbytes[part] += parameter.nbytes(DTYPE_BYTES, compiled=False)
        elements[part] += parameter.num_elements
    kv_dtype = resolve_kv_dtype(kv_cache_dtype, "bfloat16")
    kv_heads = [arch.heads(layer) for layer in arch.kv_layers]
    return Counts(
        layers_bytes=nbytes["layers"],
        layers_elements=elements["layers"],
        head_bytes=nbytes["head"],
        head_elements=elements["head"],
        experts_bytes=nbytes["experts"],
        experts_elements=elements["experts"],
        expert_share=0.0 if arch.experts is None else arch.experts.top_k / arch.experts.num,
        kv_bytes_per_token=sum(
            2 * heads.num_kv * kv_block_bytes(kv_dtype, block_size=1, head_dim=heads.dim) for heads in kv_heads
        ),
        queries_size=sum(arch.heads(layer).q_size for layer in range(arch.num_layers)),
        vocab_size=arch.vocab_size,
    )
