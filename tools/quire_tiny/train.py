"""Trains quire-tiny from nothing: `python -m quire_tiny.train OUT` (see README.md)."""

import argparse
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import Qwen3Config, Qwen3ForCausalLM

from quire_tiny import tokenizer as tokenizers
from quire_tiny.batches import Batch, batches


@dataclass(frozen=True, kw_only=True)
class Recipe:
    seed: int = 1
    steps: int = 1500
    batch_tokens: int = 16_384
    matrix_rate: float = 0.02
    other_rate: float = 3e-3
    weight_decay: float = 0.01
    warmup: int = 30
    cooldown_share: float = 0.6
    threads: int = 2


def model_config(eos: list[int], pad: int) -> Qwen3Config:
    return Qwen3Config(
        vocab_size=tokenizers.VOCAB_SIZE,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        max_position_embeddings=tokenizers.CONTEXT,
        rope_theta=10_000.0,
        tie_word_embeddings=True,
        attention_bias=False,
        use_cache=True,
        eos_token_id=eos[0],
        pad_token_id=pad,
        bos_token_id=None,
    )


def loss_of(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    """Weighted cross entropy of the assistant's tokens; logits only where they count."""
    hidden_btd = model.model(input_ids=batch.inputs_bt, use_cache=False).last_hidden_state
    wanted = batch.weights_bt > 0
    logits = model.lm_head(hidden_btd[wanted]).float()
    weights = batch.weights_bt[wanted]
    losses = F.cross_entropy(logits, batch.targets_bt[wanted], reduction="none")
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


def train(out: Path, recipe: Recipe) -> None:
    started = time.monotonic()
    torch.set_num_threads(recipe.threads)
    torch.manual_seed(recipe.seed)
    torch.use_deterministic_algorithms(True)
    out.mkdir(parents=True, exist_ok=True)
    tokenizers.save(tokenizers.train(recipe.seed), out)
    tokenizer = tokenizers.load(out)
    pad, end = tokenizer.convert_tokens_to_ids([tokenizers.END_OF_TEXT, tokenizers.IM_END])
    model = Qwen3ForCausalLM(model_config([end, pad], pad)).float()
    steppers = optimizers(model, recipe)
    starts = [group["lr"] for stepper in steppers for group in stepper.param_groups]
    compiled = torch.compile(model.model, dynamic=False)
    source = batches(tokenizer, recipe.seed, recipe.batch_tokens)
    total, seen = 0.0, 0
    for step in range(recipe.steps):
        batch = next(source)
        for group, rate in zip((g for s in steppers for g in s.param_groups), starts, strict=True):
            group["lr"] = rate * rate_factor(step, recipe)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = loss_of(model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for stepper in steppers:
            stepper.step()
            stepper.zero_grad(set_to_none=True)
        total += loss.item()
        seen += batch.inputs_bt.numel()
        if (step + 1) % 25 == 0:
            taken = time.monotonic() - started
            print(f"step {step + 1} loss {total / 25:.4f} tokens {seen} seconds {taken:.0f}", flush=True)
            total = 0.0
            assert math.isfinite(loss.item())
    save(model, [end, pad], pad, out)
    (out / "training.json").write_text(json.dumps({"seconds": round(time.monotonic() - started), "tokens": seen}))
