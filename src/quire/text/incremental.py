"""Token ids to text, one token at a time, without decoding anything twice.

The pieces put together are what `Tokenizer.decode` makes of all the ids. Two ways, by what the tokenizer's decoder is:

* Byte-level: the text is the tokens' bytes, read as UTF-8. An incremental UTF-8 decoder holds back what is not yet a
  whole character, and no more.
* Everything else: what a token adds depends on the token before it (the first one loses its leading space, for
  example), never on earlier ones. So each token is decoded together with its predecessor, and what the predecessor
  gives alone is taken off. `<0xNN>` tokens are the exception: a run of them is read as a whole, and if any of it is
  not UTF-8 all of it becomes U+FFFD, so a run is held back until it ends.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import Protocol

from quire.text.tokenizer import Tokenizer

# A UTF-8 character has at most four bytes, hence at most four tokens.
_CHARACTER_TOKENS = 4
_PROMPT_TAIL = 32


class Incremental(Protocol):
    """`push` takes one more token and returns the text that is certain by now; `flush` returns the rest."""

    def push(self, token_id: int) -> str: ...

    def flush(self) -> str: ...


def incremental_decoder(
    tokenizer: Tokenizer,
    prompt_token_ids: Sequence[int],
    *,
    skip_special_tokens: bool,
    spaces_between_special_tokens: bool,
) -> Incremental:
    """A decoder for what follows the prompt; the prompt's own text is not returned."""
    skipped = tokenizer.special_ids if skip_special_tokens else frozenset[int]()
    tail = [i for i in prompt_token_ids[-_PROMPT_TAIL:] if i not in skipped]
    if tokenizer.is_byte_level:
        return _ByteLevel(tokenizer, tail, skipped)
    joined = skip_special_tokens or spaces_between_special_tokens
    apart = frozenset[int]() if joined else tokenizer.added_ids
    return _Windowed(tokenizer, tail, skipped, apart)


class _ByteLevel:
    def __init__(self, tokenizer: Tokenizer, tail: Sequence[int], skipped: frozenset[int]) -> None:
        self._tokenizer = tokenizer
        self._skipped = skipped
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        # A prompt may end within a character; the first generated token then completes it.
        self._decoder.decode(b"".join(map(tokenizer.token_bytes, tail[-_CHARACTER_TOKENS:])))

    def push(self, token_id: int) -> str:
        if token_id in self._skipped:
            return ""
        return self._decoder.decode(self._tokenizer.token_bytes(token_id))

    def flush(self) -> str:
        return self._decoder.decode(b"", final=True)


class _Windowed:
    """`_before` is what was last turned into text (one token, but for a prompt's end), `_pending` what came after."""

    def __init__(
        self, tokenizer: Tokenizer, tail: Sequence[int], skipped: frozenset[int], apart: frozenset[int]
    ) -> None:
        self._tokenizer = tokenizer
        self._skipped = skipped
        self._apart = apart
        self._before, self._pending = _split_prompt_tail(tokenizer, tail)

    def push(self, token_id: int) -> str:
        if token_id in self._skipped:
            return ""
        last = (self._pending or self._before)[-1:]
        if token_id in self._apart and last and last[0] in self._apart:
            text = self.flush() + self._decode([token_id])
            self._before = [token_id]
            return text
        self._pending.append(token_id)
        if self._tokenizer.is_byte_piece(token_id):
            return ""
        text = self._added_text()
        # Other decoders may leave half a character as U+FFFD; it is not held for longer than a character may be.
        if text.endswith("\N{REPLACEMENT CHARACTER}") and len(self._pending) < _CHARACTER_TOKENS:
            return ""
        self._before, self._pending = [token_id], []
        return text

    def flush(self) -> str:
        if not self._pending:
            return ""
        text = self._added_text()
        self._before, self._pending = self._pending[-1:], []
        return text

    def _added_text(self) -> str:
        before = self._decode(self._before) if self._before else ""
        return self._decode(self._before + self._pending)[len(before) :]

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=False)


def _split_prompt_tail(tokenizer: Tokenizer, tail: Sequence[int]) -> tuple[list[int], list[int]]:
    """The prompt's last text token with the bytes that follow it, and what of these bytes is half a character."""
    start = len(tail)
    while start and tokenizer.is_byte_piece(tail[start - 1]):
        start -= 1
    utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
    utf8.decode(b"".join(map(tokenizer.token_bytes, tail[start:])))
    half = len(tail) - len(utf8.getstate()[0])
    return list(tail[max(start - 1, 0) : half]), list(tail[half:])
