"""From conversations to training batches: rows of like length, and the tokens whose prediction is trained."""

from collections.abc import Iterator
from dataclasses import dataclass
from random import Random

import torch
from transformers import PreTrainedTokenizerFast

from quire_tiny import conversations
from quire_tiny.tokenizer import END_OF_TEXT, IM_END, IM_START

ROW_LENGTHS = (64, 96, 128, 192, 256, 384, 512, 768)
PLAIN_SHARE = 0.03
IGNORED = -100


@dataclass(frozen=True)
class Batch:
    """`b` rows of `t` tokens. `targets_bt` is the next token, or `IGNORED`; each row weighs its answers alike."""

    inputs_bt: torch.Tensor
    targets_bt: torch.Tensor
    weights_bt: torch.Tensor


Row = tuple[list[int], list[float]]


class RowMaker:
    """Renders and tokenizes; knows which tokens of a row are the assistant's."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, rng: Random) -> None:
        self._tokenizer, self._rng = tokenizer, rng
        self._start, self._end = tokenizer.convert_tokens_to_ids([IM_START, IM_END])
        self._assistant = tokenizer.encode("assistant\n")

    def row(self) -> Row:
        """Token ids, and how much the prediction of each matters (0: not at all)."""
        rng = self._rng
        if rng.random() < PLAIN_SHARE:
            text = "".join(conversations.plain_text(rng) + END_OF_TEXT for _ in range(rng.randint(1, 8)))
            ids = self._tokenizer.encode(text)
            return ids, [0.1] * len(ids)
        conversation = conversations.conversation(rng)
        text = self._tokenizer.apply_chat_template(
            conversation.messages, tools=list(conversation.tools) or None, tokenize=False
        )
        ids = self._tokenizer.encode(text)
        return ids, self._weights(ids)

    def _weights(self, ids: list[int]) -> list[float]:
        """An answer of n tokens weighs n ** 0.5 in all, so that long ones do not drown short ones."""
        weights = [0.0] * len(ids)
        header = len(self._assistant)
        position = 0
        while position < len(ids):
            if ids[position] == self._start and ids[position + 1 : position + 1 + header] == self._assistant:
                first = position + 1 + header
                last = ids.index(self._end, first)
                weights[first : last + 1] = [(last + 1 - first) ** -0.5] * (last + 1 - first)
                position = last
            position += 1
        return weights


def batches(tokenizer: PreTrainedTokenizerFast, seed: int, tokens: int) -> Iterator[Batch]:
    """Endless batches of about `tokens` tokens, padding included."""
    rng = Random(f"train {seed}")
    maker = RowMaker(tokenizer, rng)
    pad = tokenizer.convert_tokens_to_ids(END_OF_TEXT)
    waiting: dict[int, list[Row]] = {length: [] for length in ROW_LENGTHS}
    while True:
        ids, weights = maker.row()
        length = next((each for each in ROW_LENGTHS if len(ids) - 1 <= each), None)
        if length is None:
            continue
        rows = waiting[length]
        rows.append((ids, weights))
        if len(rows) * length >= tokens:
            yield _batch(rows, length, pad)
            waiting[length] = []


def _batch(rows: list[Row], length: int, pad: int) -> Batch:
    inputs, targets, row_weights = [], [], []
    for ids, weights in rows:
        fill = length + 1 - len(ids)
        inputs.append(ids[:-1] + [pad] * fill)
        targets.append([t if w else IGNORED for t, w in zip(ids[1:], weights[1:], strict=True)] + [IGNORED] * fill)
        row_weights.append(weights[1:] + [0.0] * fill)
    return Batch(torch.tensor(inputs), torch.tensor(targets), torch.tensor(row_weights))
