"""All layers in one call give what the ops give one by one, to the bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import quire
from conformance.cases import CASES
from conformance.oracle import save
from quire.models.load import LoadedModel, load_model
from quire.nn.batch import ForwardBatch
from quire.ops.cpu.library import usable_isas

TINY = Path(quire.__file__).parent / "assets" / "quire_tiny"
BLOCK_SIZE = 16
STANDARD = {
    "AquilaForCausalLM",
    "AquilaModel",
    "BaiChuanForCausalLM",
    "BaichuanForCausalLM",
    "Ernie4_5ForCausalLM",
    "ExaoneForCausalLM",
    "GlmForCausalLM",
    "HeliumForCausalLM",
    "IQuestCoderForCausalLM",
    "InternLM2ForCausalLM",
    "InternLM3ForCausalLM",
    "InternLMForCausalLM",
    "LlamaForCausalLM",
    "QWenLMHeadModel",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    "SeedOssForCausalLM",
    "XverseForCausalLM",
}
"""Pre-norm attention and a gated feed-forward block with silu, one rotation for all layers, and nothing else."""

pytestmark = pytest.mark.skipif(not usable_isas(), reason="this installation has no compiled kernels")


def batch(prompts: list[list[int]], starts: list[int]) -> ForwardBatch:
    """The rest of each prompt from its start on, every row wanted of the first, the last one of the others."""
    blocks_of = [-(-len(prompt) // BLOCK_SIZE) for prompt in prompts]
    table = torch.zeros(len(prompts), max(blocks_of), dtype=torch.int64)
    first_block, token_ids, positions, slots, query_start, rows = 1, [], [], [], [0], []
    for index, (prompt, start) in enumerate(zip(prompts, starts, strict=True)):
        table[index, : blocks_of[index]] = torch.arange(first_block, first_block + blocks_of[index])
        here = range(start, len(prompt))
        token_ids += prompt[start:]
        positions += here
        slots += [first_block * BLOCK_SIZE + position for position in here]
        query_start.append(len(token_ids))
        rows += range(query_start[-2], query_start[-1]) if index == 0 else [query_start[-1] - 1]
        first_block += blocks_of[index]
    return ForwardBatch(
        token_ids_t=torch.tensor(token_ids),
        positions_t=torch.tensor(positions),
        slots_t=torch.tensor(slots),
        query_start=tuple(query_start),
        context_lens=tuple(map(len, prompts)),
        block_table_rb=table,
        logits_rows_s=torch.tensor(rows),
    )


def logits(model: LoadedModel, *, stacked: bool) -> list[torch.Tensor]:
    """Of a prefill, and of a step that mixes decoding with more prefill."""
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(0, 1000, (n,), generator=generator).tolist() for n in (70, 5, 33)]
    kv = model.new_kv_cache(40, BLOCK_SIZE)
    stack = model.decoder.stack
    assert stack is not None
    model.decoder.stack = stack if stacked else None
    first = [prompt[:size] for prompt, size in zip(prompts, (40, 4, 1), strict=True)]
    # The same blocks in both steps: the first step's table is the second one's.
    steps = [(first, [0, 0, 0]), (prompts, [40, 4, 1])]
    whole = batch(prompts, [0, 0, 0])
    found = []
    for tokens, starts in steps:
        step = batch(prompts, starts)
        keep = [len(prompt) for prompt in tokens]
        if tokens is first:
            step = _shortened(whole, keep)
        found.append(model.decoder.logits(model.decoder.forward(step, kv)))
    model.decoder.stack = stack
    return found


def _shortened(step: ForwardBatch, keep: list[int]) -> ForwardBatch:
    rows = [row for i, n in enumerate(keep) for row in range(step.query_start[i], step.query_start[i] + n)]
    starts = [0]
    for n in keep:
        starts.append(starts[-1] + n)
    return ForwardBatch(
        token_ids_t=step.token_ids_t[rows],
        positions_t=step.positions_t[rows],
        slots_t=step.slots_t[rows],
        query_start=tuple(starts),
        context_lens=tuple(keep),
        block_table_rb=step.block_table_rb,
        logits_rows_s=torch.tensor([end - 1 for end in starts[1:]]),
    )


def test_a_model_of_another_build_goes_op_by_op(tmp_path: Path) -> None:
    """Those whose blocks are standard have a stack, the others have none, whatever differs."""
    stacked = {}
    for case in CASES:
        if not case.variant:
            directory = tmp_path / case.id
            save(case, directory, dtype=torch.bfloat16)
            stacked[case.architecture] = load_model(directory, threads=1).decoder.stack is not None
    assert {name for name, has_stack in stacked.items() if has_stack} == STANDARD


@pytest.mark.parametrize("kv_cache_dtype", ["auto", "int8", "fp8"])
@pytest.mark.parametrize("quantization", [None, "int8", "int4", "fp8"])
@pytest.mark.parametrize("isa", usable_isas())
def test_the_stack_gives_the_bits_of_the_ops(isa: str, quantization: str | None, kv_cache_dtype: str) -> None:
    model = load_model(
        TINY, dtype="bfloat16", quantization=quantization, isa=isa, threads=2, kv_cache_dtype=kv_cache_dtype
    )
    for one, other in zip(logits(model, stacked=True), logits(model, stacked=False), strict=True):
        assert torch.isfinite(one).all()
        assert torch.equal(one, other)
