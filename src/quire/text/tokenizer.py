"""Text to token ids and back, over the `tokenizers` library.

What a checkpoint says about its tokens lies in `tokenizer.json` (vocabulary, splitting, which special tokens an
encoding gets), `tokenizer_config.json` and `special_tokens_map.json` (names of BOS, EOS, PAD; more special tokens).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Literal

import tokenizers

from quire.core.errors import BadValue, InvalidParameter, MissingFile
from quire.core.json_file import read_optional_json_object
from quire.text.byte_tokens import TokenBytes, decoder_kinds

NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")

Side = Literal["left", "right"]

CHARACTERS_PER_TOKEN = 64
"""A text of which so many tokens are kept is read to that many characters for each, or to as many as the longest token
has. What is behind cannot be among them, unless characters before it make hardly any tokens, such as long blanks."""

_SURROGATE = re.compile("[\ud800-\udfff]")


class Tokenizer:
    """A checkpoint's tokenizer. Immutable after loading, but for memoised bytes of tokens; safe to share by threads.

    `encode` holds no lock of Python's while it works, so long texts are best encoded in a worker thread.
    """

    def __init__(
        self, backend: tokenizers.Tokenizer, named_tokens: Mapping[str, str], *, truncation_side: Side = "right"
    ) -> None:
        self._backend = backend
        self.truncation_side: Side = truncation_side
        # Padding and truncation that a checkpoint was trained with are not ours to apply to a request.
        backend.no_padding()
        backend.no_truncation()
        self.named_tokens = dict(named_tokens)
        added = backend.get_added_tokens_decoder()
        self.added_ids: frozenset[int] = frozenset(added)
        self.special_ids: frozenset[int] = frozenset(i for i, token in added.items() if token.special)
        self._kinds = decoder_kinds(backend)
        self._bytes = TokenBytes(backend, self._kinds, {i: token.content for i, token in added.items()})

    @classmethod
    def load(cls, directory: Path) -> Tokenizer:
        """Reads a checkpoint directory; raises a `CheckpointError` that names the file."""
        path = directory / "tokenizer.json"
        try:
            backend = tokenizers.Tokenizer.from_buffer(path.read_bytes())
        except (FileNotFoundError, NotADirectoryError):
            raise MissingFile(
                f"{path} is missing.",
                remedy="quire needs the fast tokenizer's file; fetch it, or name another directory with tokenizer.",
            ) from None
        except (OSError, ValueError) as error:
            raise BadValue(f"{path} cannot be read: {error}.", remedy="Fetch the file again.") from None
        config = read_optional_json_object(directory / "tokenizer_config.json")
        named = read_named_tokens(directory)
        _add_configured_tokens(backend, config, named)
        side: Side = "left" if config.get("truncation_side") == "left" else "right"
        return cls(backend, named, truncation_side=side)

    # --- facts ----------------------------------------------------------------------------------------------

    @property
    def vocab_size(self) -> int:
        """How many tokens there are, added ones included."""
        return self._backend.get_vocab_size(with_added_tokens=True)

    @property
    def bos_token_id(self) -> int | None:
        return self._named_id("bos_token")

    @property
    def eos_token_id(self) -> int | None:
        return self._named_id("eos_token")

    @property
    def pad_token_id(self) -> int | None:
        return self._named_id("pad_token")

    @cached_property
    def longest_token_chars(self) -> int:
        """Characters of the longest token: no text of n characters has fewer than n / this tokens.

        Reads the whole vocabulary, once, when first asked.
        """
        return max((len(token) for token in self._backend.get_vocab(with_added_tokens=True)), default=1)

    @property
    def is_byte_level(self) -> bool:
        """Whether decoding is nothing but joining `token_bytes` and reading them as UTF-8."""
        return self._kinds == {"ByteLevel"}

    def is_byte_piece(self, token_id: int) -> bool:
        """Whether this is a `<0xNN>` token, whose text is known only together with its neighbours."""
        return "ByteFallback" in self._kinds and self._bytes.is_byte_piece(token_id)

    # --- text to ids and back -------------------------------------------------------------------------------

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text. Special tokens written out in the text become their ids."""
        _check_unicode(text)
        ids: list[int] = self._backend.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def encode_to_fit(
        self,
        text: str,
        pair: str | None = None,
        *,
        max_tokens: int | None,
        side: Side | None = None,
        add_special_tokens: bool = True,
    ) -> tuple[list[int], list[int]]:
        """Token ids and token type ids of a text, or of two joined in the tokenizer's own way (`[CLS] a [SEP] b
        [SEP]`, for example), of which at most `max_tokens` are kept, special ones included.

        What is too long loses tokens at `side` (by default the checkpoint's), never special ones; of two texts the
        longer one first, as of Hugging Face's `longest_first`. Raises `InvalidParameter` for a `max_tokens` that the
        special tokens fill. Only what may be kept is read: see `CHARACTERS_PER_TOKEN`.
        """
        if max_tokens is not None:
            text = self._readable(text, max_tokens, side)
            pair = None if pair is None else self._readable(pair, max_tokens, side)
        _check_unicode(text + (pair or ""))
        whole = self._backend.encode(text, pair, add_special_tokens=add_special_tokens)
        if max_tokens is None or len(whole.ids) <= max_tokens:
            return whole.ids, whole.type_ids
        num_special = self._backend.num_special_tokens_to_add(pair is not None) if add_special_tokens else 0
        if max_tokens <= num_special:
            raise InvalidParameter(
                f"truncate_prompt_tokens leaves {max_tokens} tokens, and {num_special} of them are special ones.",
                param="truncate_prompt_tokens",
                remedy=f"Set it to {num_special + 1} at least.",
            )
        # Chosen from what was encoded: the library's own truncation makes all combinations of what it cuts off.
        lengths = [whole.sequence_ids.count(of) for of in range(1 if pair is None else 2)]
        kept = _shares(lengths, max_tokens - num_special)
        at_end = (side or self.truncation_side) == "left"
        ranges = [
            range(length - count, length) if at_end else range(count)
            for length, count in zip(lengths, kept, strict=True)
        ]
        seen, fitting = [0, 0], []
        for index, of in enumerate(whole.sequence_ids):
            if of is None or seen[of] in ranges[of]:
                fitting.append(index)
            if of is not None:
                seen[of] += 1
        return [whole.ids[index] for index in fitting], [whole.type_ids[index] for index in fitting]

    def head(self, text: str, max_tokens: int) -> str:
        """The start of a text that is its first `max_tokens` tokens, but for a character of which they have a part. No
        more is read than of `CHARACTERS_PER_TOKEN`."""
        text = self._readable(text, max_tokens, "right")
        _check_unicode(text)
        offsets = self._backend.encode(text, add_special_tokens=False).offsets
        if len(offsets) <= max_tokens:
            return text
        last_end = max((end for _, end in offsets[:max_tokens]), default=0)
        return text[: min(last_end, offsets[max_tokens][0])]

    def _readable(self, text: str, max_tokens: int, side: Side | None) -> str:
        """The part of a text that is looked at where all but `max_tokens` tokens are cut off at `side`."""
        if len(text) <= (max_tokens + 1) * CHARACTERS_PER_TOKEN:
            return text  # without looking up the longest token
        count = (max_tokens + 1) * max(CHARACTERS_PER_TOKEN, self.longest_token_chars)
        return text[-count:] if (side or self.truncation_side) == "left" else text[:count]

    def decode(
        self, ids: Sequence[int], *, skip_special_tokens: bool = True, spaces_between_special_tokens: bool = True
    ) -> str:
        """The text of token ids. Ids outside the vocabulary have none.

        `spaces_between_special_tokens=False` joins neighbouring added tokens without the space that some decoders
        would put; it has no effect when special tokens are skipped.
        """
        if skip_special_tokens:
            ids = [i for i in ids if i not in self.special_ids]
        if self.is_byte_level:
            return b"".join(map(self.token_bytes, ids)).decode("utf-8", errors="replace")
        if skip_special_tokens or spaces_between_special_tokens:
            return self._decode_run(ids)
        return "".join(self._decode_run(run) for run in _split_between(ids, self.added_ids))

    def token_bytes(self, token_id: int) -> bytes:
        """The exact bytes that a token stands for; empty for an id outside the vocabulary."""
        return self._bytes[token_id]

    def token_text(self, token_id: int) -> str:
        """A token by itself as text, its leading space included; bytes that are no whole character become U+FFFD."""
        return self.token_bytes(token_id).decode("utf-8", errors="replace")

    def _decode_run(self, ids: Sequence[int]) -> str:
        text: str = self._backend.decode(list(ids), skip_special_tokens=False)
        return text

    def _named_id(self, name: str) -> int | None:
        content = self.named_tokens.get(name)
        found: int | None = None if content is None else self._backend.token_to_id(content)
        return found


def read_named_tokens(directory: Path) -> dict[str, str]:
    """The checkpoint's `bos_token`, `eos_token` and so on, as text; names that it does not set are absent."""
    named: dict[str, str] = {}
    for file in ("special_tokens_map.json", "tokenizer_config.json"):
        values = read_optional_json_object(directory / file)
        extra = values.get("extra_special_tokens")
        pairs = [(name, values.get(name)) for name in NAMED_TOKENS]
        pairs += list(extra.items()) if isinstance(extra, dict) else []
        for name, value in pairs:
            content = _content(value)
            if content is not None:
                named[name] = content
    return named


def _content(value: object) -> str | None:
    """A token is written as its text, or as an object with `content`."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) and value else None


def _add_configured_tokens(
    backend: tokenizers.Tokenizer, config: Mapping[str, object], named: Mapping[str, str]
) -> None:
    """Adds, in order of id, what the configuration has and `tokenizer.json` has not; marks named tokens special."""
    decoder = config.get("added_tokens_decoder")
    entries = [entry for entry in decoder.items() if isinstance(entry[1], dict)] if isinstance(decoder, dict) else []
    if not all(str(token_id).isdecimal() for token_id, _ in entries):
        raise BadValue("tokenizer_config.json: a key of added_tokens_decoder is not a token id.")
    known = {token.content: token for token in backend.get_added_tokens_decoder().values()}
    for _, entry in sorted(entries, key=lambda item: int(item[0])):
        content = _content(entry)
        if content is None or content in known:
            continue
        flags = {name: bool(entry.get(name, False)) for name in ("single_word", "lstrip", "rstrip", "normalized")}
        token = tokenizers.AddedToken(content, special=bool(entry.get("special", False)), **flags)
        (backend.add_special_tokens if token.special else backend.add_tokens)([token])
        known[content] = token
    missing = [text for text in named.values() if text not in known or not known[text].special]
    backend.add_special_tokens(
        [tokenizers.AddedToken(text, special=True, normalized=False) for text in dict.fromkeys(missing)]
    )


def _check_unicode(text: str) -> None:
    if _SURROGATE.search(text):
        raise InvalidParameter(
            "The text holds half of a surrogate pair, which no Unicode text does.",
            param="prompt",
            remedy="Send well-formed Unicode.",
        )


def _shares(lengths: list[int], room: int) -> list[int]:
    """How many tokens of one or two texts are kept where `room` is too little for all: the longer one loses first, and
    of two that are longer than half the room, the longer one (of equals the second) gets the odd token."""
    if len(lengths) == 1:
        return [room]
    of_shorter = min(*lengths, room // 2)
    shares = [of_shorter, room - of_shorter]
    return shares if lengths[0] <= lengths[1] else shares[::-1]


def _split_between(ids: Iterable[int], added_ids: frozenset[int]) -> list[list[int]]:
    """Cuts between every two neighbours that are both added tokens."""
    runs: list[list[int]] = []
    for is_added, group in groupby(ids, key=added_ids.__contains__):
        members = list(group)
        head = members[:1] if is_added else members
        if runs:
            runs[-1].extend(head)
        else:
            runs.append(head)
        runs.extend([member] for member in members[1:] if is_added)
    return runs
