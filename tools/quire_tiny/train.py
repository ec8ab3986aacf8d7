"""Trains quire-tiny from nothing: `python -m quire_tiny.train OUT` (see README.md)."""

import argparse
import copy
import json
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional
from torch.utils.data import DataLoader, IterableDataset
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from quire_tiny import tokenizer as tokenizers
from quire_tiny.batches import ROW_LENGTHS, Batch, batches

TRAINING_FILE = "training.json"


@dataclass(frozen=True, kw_only=True)
class Recipe:
    seed: int = 1
    steps: int = 1000
    batch_tokens: int = 8192
    matrix_rate: float = 0.02
    other_rate: float = 3e-3
    weight_decay: float = 0.01
    warmup: int = 30
    cooldown_share: float = 0.6
    threads: int = 2
    snapshot_every: int = 100


STAGES = (
    Recipe(),
    Recipe(seed=2, steps=700, matrix_rate=0.012, other_rate=2e-3, cooldown_share=0.9),
    Recipe(seed=3, steps=500, matrix_rate=0.012, other_rate=2e-3, cooldown_share=0.9),
)
"""What made the checkpoint that ships: each stage goes on from the bfloat16 checkpoint of the one before."""


def model_config(tokenizer: PreTrainedTokenizerFast) -> Qwen3Config:
    return Qwen3Config(
        vocab_size=tokenizers.VOCAB_SIZE,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=tokenizers.CONTEXT,
        rope_theta=10_000.0,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.convert_tokens_to_ids(tokenizers.IM_END),
        pad_token_id=tokenizer.convert_tokens_to_ids(tokenizers.END_OF_TEXT),
    )


def attention(
    _module: torch.nn.Module,
    query_bhtd: torch.Tensor,
    key_bgtd: torch.Tensor,
    value_bgtd: torch.Tensor,
    bias_b1tt: torch.Tensor,
    scaling: float,
    **_: object,
) -> tuple[torch.Tensor, None]:
    """Plain attention; on a CPU its backward pass is twice as fast as the fused one's. `h` heads in `g` groups."""
    b, h, t, d = query_bhtd.shape
    g = key_bgtd.shape[1]
    query = (query_bhtd * scaling).reshape(b, g, h // g * t, d)
    scores = torch.matmul(query, key_bgtd.transpose(-1, -2)).view(b, g, h // g, t, t) + bias_b1tt[:, None]
    shares = torch.softmax(scores.float(), -1).to(value_bgtd.dtype).view(b, g, h // g * t, t)
    mixed = torch.matmul(shares, value_bgtd).view(b, h, t, d)
    return mixed.transpose(1, 2).contiguous(), None


class Batches(IterableDataset[Batch]):
    """The endless batches of a recipe."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, recipe: Recipe) -> None:
        self._tokenizer, self._recipe = tokenizer, recipe

    def __iter__(self) -> Iterator[Batch]:
        return batches(self._tokenizer, self._recipe.seed, self._recipe.batch_tokens)


def loss_of(decoder: Callable[..., Any], model: Qwen3ForCausalLM, batch: Batch) -> torch.Tensor:
    """Weighted cross entropy of the assistant's tokens; logits only where they count.

    The embedding is looked up outside `decoder`: when compiled, its gradient is summed in no fixed order.
    """
    documents, length = batch.documents_bt, batch.documents_bt.shape[1]
    visible = (documents[:, :, None] == documents[:, None, :]) & torch.ones(length, length, dtype=torch.bool).tril()
    bias = torch.where(visible, 0.0, -1e4).to(torch.bfloat16)[:, None]
    hidden_btd = decoder(
        inputs_embeds=model.model.embed_tokens(batch.inputs_bt),
        position_ids=batch.positions_bt,
        attention_mask={"full_attention": bias},
        use_cache=False,
    ).last_hidden_state
    wanted = batch.weights_bt.flatten().nonzero().squeeze(1)
    weights, targets = batch.weights_bt.flatten()[wanted], batch.targets_bt.flatten()[wanted]
    logits = model.lm_head(hidden_btd.flatten(0, 1).index_select(0, wanted))
    losses = functional.cross_entropy(logits.float(), targets, reduction="none")
    return (losses * weights).sum() / weights.sum()


def optimizers(model: torch.nn.Module, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers, AdamW for the embedding and the norms."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    return [
        torch.optim.Muon(matrices, lr=recipe.matrix_rate, weight_decay=recipe.weight_decay, momentum=0.95),
        torch.optim.AdamW(others, lr=recipe.other_rate, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def rate_factor(step: int, recipe: Recipe) -> float:
    """Warm up, hold, then fall linearly to nothing."""
    if step < recipe.warmup:
        return (step + 1) / recipe.warmup
    return min(1.0, (recipe.steps - step) / (recipe.steps * recipe.cooldown_share))


def fit(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, recipe: Recipe, out: Path) -> None:
    steppers = optimizers(model, recipe)
    groups = [(group, group["lr"]) for stepper in steppers for group in stepper.param_groups]
    compiled = torch.compile(model.model, dynamic=False)
    # A process of its own makes the text, in the same order every time.
    source = iter(DataLoader(Batches(tokenizer, recipe), batch_size=None, num_workers=1, prefetch_factor=8))
    started, total = time.monotonic(), 0.0
    for step in range(recipe.steps):
        batch = next(source)
        for group, rate in groups:
            group["lr"] = rate * rate_factor(step, recipe)
        # Rows of the greatest length are too rare to be worth compiling for.
        decoder = model.model if batch.inputs_bt.shape[1] == ROW_LENGTHS[-1] else compiled
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = loss_of(decoder, model, batch)
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for stepper in steppers:
            stepper.step()
            stepper.zero_grad(set_to_none=True)
        total += loss.item()
        if (step + 1) % 20 == 0:
            print(f"step {step + 1} loss {total / 20:.4f} seconds {time.monotonic() - started:.0f}", flush=True)
            total = 0.0
        if (step + 1) % recipe.snapshot_every == 0:
            save(copy.deepcopy(model), tokenizer, out)


def save(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Writes `config.json`, `generation_config.json` and `model.safetensors` in bfloat16."""
    end, pad = tokenizer.convert_tokens_to_ids([tokenizers.IM_END, tokenizers.END_OF_TEXT])
    model.set_attn_implementation("sdpa")
    model.generation_config = GenerationConfig(
        do_sample=True, temperature=0.2, top_p=0.9, eos_token_id=[end, pad], pad_token_id=pad
    )
    model.to(torch.bfloat16).save_pretrained(out)
    (out / "model.safetensors").chmod(0o644)


def train(out: Path, recipe: Recipe, start: Path | None) -> None:
    """One stage, from nothing or from the checkpoint in `start`."""
    started = time.monotonic()
    torch.set_num_threads(recipe.threads)
    torch.manual_seed(recipe.seed)
    out.mkdir(parents=True, exist_ok=True)
    if start is None:
        tokenizers.save(tokenizers.train(recipe.seed), out)
    else:
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(start / name, out / name)
    tokenizer = tokenizers.load(out)
    ALL_ATTENTION_FUNCTIONS.register("quire_tiny", attention)
    if start is None:
        model = Qwen3ForCausalLM(model_config(tokenizer)).float()
    else:
        model = Qwen3ForCausalLM.from_pretrained(start, dtype=torch.float32)
    model.train()
    model.set_attn_implementation("quire_tiny")
    fit(model, tokenizer, recipe, out)
    save(model, tokenizer, out)
    before = json.loads((start / TRAINING_FILE).read_text())["stages"] if start else []
    stages = [*before, asdict(recipe) | {"seconds": round(time.monotonic() - started)}]
    (out / TRAINING_FILE).write_text(json.dumps({"stages": stages}, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path, help="folder to write the checkpoint to; earlier stages go beside it")
    parser.add_argument("--share", type=float, default=1.0, help="take this share of the steps, to try something out")
    arguments = parser.parse_args()
    start: Path | None = None
    for number, recipe in enumerate(STAGES, 1):
        folder = arguments.out if number == len(STAGES) else arguments.out.with_name(f"{arguments.out.name}-{number}")
        train(folder, replace(recipe, steps=max(1, round(recipe.steps * arguments.share))), start)
        start = folder


if __name__ == "__main__":
    main()
