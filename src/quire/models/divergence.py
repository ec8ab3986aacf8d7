"""How far one model's predictions are from another's, token by token of given texts.

Legend: s positions, v vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quire.cache.ledger import HEAD_ROWS
from quire.models.load import LoadedModel
from quire.models.sequences import BLOCK_SIZE, in_batches, lay_out, num_blocks

BATCH_TOKENS = 2048


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenText:
    """Token ids, and from which of them on predictions count: the first `start` are a prompt, which nobody predicts."""

    token_ids: Sequence[int]
    start: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Divergence:
    """Over `positions` predictions. `kl_*` is KL(reference || model) in nats; `top1_agreement` the share of positions
    where both find the same token likeliest; perplexities are of the texts' own tokens."""

    positions: int
    kl_mean: float
    kl_p99: float
    top1_agreement: float
    perplexity: float
    reference_perplexity: float


@torch.inference_mode()
def compare(model: LoadedModel, reference: LoadedModel, texts: Sequence[TokenText]) -> Divergence:
    """Both models read every text. Memory is bounded by a batch and by `HEAD_ROWS` rows of logits."""
    kl, agree, own, theirs = [], [], [], []
    starts = {id(text.token_ids): text.start for text in texts}
    for batch in in_batches([text.token_ids for text in texts], BATCH_TOKENS):
        targets = torch.tensor([token for ids in batch for token in [*ids[1:], 0]])
        counted = torch.tensor([starts[id(ids)] - 1 <= at < len(ids) - 1 for ids in batch for at in range(len(ids))])
        rows = counted.nonzero()[:, 0]
        found, expected = (_log_probabilities(each, batch, rows) for each in (model, reference))
        for q_sv, p_sv, target_s in zip(found, expected, torch.split(targets[rows], HEAD_ROWS), strict=True):
            kl.append((p_sv.exp() * (p_sv - q_sv)).sum(1))
            agree.append(p_sv.argmax(1) == q_sv.argmax(1))
            own.append(q_sv.gather(1, target_s[:, None])[:, 0])
            theirs.append(p_sv.gather(1, target_s[:, None])[:, 0])
    kl_s = torch.cat(kl).double()
    return Divergence(
        positions=len(kl_s),
        kl_mean=float(kl_s.mean()),
        kl_p99=float(kl_s.sort().values[int(0.99 * (len(kl_s) - 1))]),
        top1_agreement=float(torch.cat(agree).double().mean()),
        perplexity=float((-torch.cat(own).double().mean()).exp()),
        reference_perplexity=float((-torch.cat(theirs).double().mean()).exp()),
    )


def _log_probabilities(model: LoadedModel, batch: Sequence[Sequence[int]], rows: Tensor) -> Iterator[Tensor]:
    kv = model.new_kv_cache(num_blocks(batch), BLOCK_SIZE)
    hidden_se = model.decoder.forward(lay_out(batch), kv)[rows]
    for piece in torch.split(hidden_se, HEAD_ROWS):
        yield model.decoder.logits(piece).log_softmax(-1)
