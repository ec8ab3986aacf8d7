"""From conversations to training batches: packed rows, and the tokens whose prediction is trained."""

from collections.abc import Iterator
from dataclasses import dataclass
from random import Random

import torch
from transformers import PreTrainedTokenizerFast

from quire_tiny import conversations
from quire_tiny.tokenizer import END_OF_TEXT, IM_END, IM_START

ROW_LENGTHS = (256, 512, 1024)
PLAIN_SHARE = 0.03
LONG_SHARE = 0.4
"""How many of the documents longer than the shortest row are kept: their tokens cost the most."""


@dataclass(frozen=True)
class Batch:
    """`b` rows of `t` tokens, several documents to a row.

    `documents_bt` numbers the documents of a row (-1: padding), `targets_bt` is the next token, and `weights_bt` is how
    much predicting it matters (0: not at all).
    """

    inputs_bt: torch.Tensor
    targets_bt: torch.Tensor
    weights_bt: torch.Tensor
    positions_bt: torch.Tensor
    documents_bt: torch.Tensor


@dataclass(frozen=True)
class Document:
    ids: list[int]
    weights: list[float]

    @property
    def length(self) -> int:
        """Positions it takes in a row: its last token is only predicted."""
        return len(self.ids) - 1


class DocumentMaker:
    """Renders and tokenizes; knows which tokens are the assistant's."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, rng: Random) -> None:
        self._tokenizer, self._rng = tokenizer, rng
        self._start, self._end = tokenizer.convert_tokens_to_ids([IM_START, IM_END])
        self._assistant = tokenizer.encode("assistant\n")

    def document(self) -> Document:
        rng = self._rng
        if rng.random() < PLAIN_SHARE:
            ids = self._tokenizer.encode(conversations.plain_text(rng) + END_OF_TEXT)
            return Document(ids, [0.1] * len(ids))
        conversation = conversations.conversation(rng)
        text = self._tokenizer.apply_chat_template(
            conversation.messages, tools=list(conversation.tools) or None, tokenize=False
        )
        ids = self._tokenizer.encode(text)
        return Document(ids, self._weights(ids))

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
    """Endless batches of exactly `tokens` tokens; a document stands in a row of the shortest length that holds it."""
    rng = Random(f"train {seed}")
    maker = DocumentMaker(tokenizer, rng)
    waiting: dict[int, list[Document]] = {length: [] for length in ROW_LENGTHS}
    shortest = ROW_LENGTHS[0]
    while True:
        document = maker.document()
        if document.length > (ROW_LENGTHS[-1] if rng.random() < LONG_SHARE else shortest):
            continue
        length = _row_length(document)
        waiting[length].append(document)
        count = tokens // length
        if length > shortest:
            pools = [length, shortest]
            ready = len(waiting[length]) >= count
        else:
            pools = [shortest]
            ready = _total(waiting[shortest]) > 1.1 * tokens
        if ready:
            rows = _pack([each for pool in pools for each in waiting[pool]], length)
            yield _batch(rows[:count], length)
            for pool in pools:
                waiting[pool] = [each for row in rows[count:] for each in row if _row_length(each) == pool]


def _row_length(document: Document) -> int:
    return next(length for length in ROW_LENGTHS if document.length <= length)


def _total(documents: list[Document]) -> int:
    return sum(document.length for document in documents)


def _pack(documents: list[Document], length: int) -> list[list[Document]]:
    """First fit, longest first: long documents come to stand in the first rows, and short ones fill the gaps."""
    rows: list[list[Document]] = []
    room: list[int] = []
    for document in sorted(documents, key=lambda each: each.length, reverse=True):
        index = next((i for i, free in enumerate(room) if document.length <= free), len(rows))
        if index == len(rows):
            rows.append([])
            room.append(length)
        rows[index].append(document)
        room[index] -= document.length
    return rows


def _batch(rows: list[list[Document]], length: int) -> Batch:
    shape = (len(rows), length)
    inputs, targets = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
    weights, positions = torch.zeros(shape), torch.zeros(shape, dtype=torch.long)
    documents = torch.full(shape, -1)
    for index, row in enumerate(rows):
        first = 0
        for number, document in enumerate(row):
            span = slice(first, first + document.length)
            inputs[index, span] = torch.tensor(document.ids[:-1])
            targets[index, span] = torch.tensor(document.ids[1:])
            weights[index, span] = torch.tensor(document.weights[1:])
            positions[index, span] = torch.arange(document.length)
            documents[index, span] = number
            first += document.length
    return Batch(inputs, targets, weights, positions, documents)
