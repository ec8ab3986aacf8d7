"""Tiny random checkpoints, and batches as the engine would lay them out."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PretrainedConfig

from quire.nn.batch import ForwardBatch

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))  # for `conformance`, which is not installed

Save = Callable[..., tuple[Any, Path]]
LayOut = Callable[..., ForwardBatch]


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    """Small products: a second thread costs more than it brings, much more on a busy machine."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def save_random(tmp_path_factory: pytest.TempPathFactory) -> Save:
    """From a `transformers` config to (its model with random weights, the directory it was saved to)."""

    def save(config: PretrainedConfig, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Any, Path]:
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").to(dtype).eval()
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                # Large enough that logits differ clearly, so that greedy tokens do not hang on the last bit.
                noise = torch.randn(parameter.shape, generator=generator) * (0.15 if parameter.ndim > 1 else 0.3)
                parameter.copy_(noise + 1 if "norm" in name else noise)
        model.tie_weights()
        directory = tmp_path_factory.mktemp("checkpoint")
        model.save_pretrained(directory)
        return model, directory

    return save


@pytest.fixture(scope="session")
def lay_out() -> LayOut:
    """From parts `(token_ids, start, stop, blocks)` to the batch that computes positions start..stop-1 of each."""

    def build(parts: Sequence[tuple[Sequence[int], int, int, Sequence[int]]], block_size: int) -> ForwardBatch:
        ids, positions, slots, query_start = [], [], [], [0]
        for token_ids, start, stop, blocks in parts:
            ids += token_ids[start:stop]
            positions += range(start, stop)
            slots += [blocks[at // block_size] * block_size + at % block_size for at in range(start, stop)]
            query_start.append(len(ids))
        width = max(len(blocks) for *_, blocks in parts)
        return ForwardBatch(
            token_ids_t=torch.tensor(ids),
            positions_t=torch.tensor(positions),
            slots_t=torch.tensor(slots),
            query_start=tuple(query_start),
            context_lens=tuple(stop for _, _, stop, _ in parts),
            block_table_rb=torch.tensor([[*blocks, *[0] * (width - len(blocks))] for *_, blocks in parts]),
            logits_rows_s=torch.arange(len(ids)),
        )

    return build
