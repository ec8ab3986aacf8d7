"""The bytes that a token stands for.

Two alphabets are in use. Byte-level BPE (GPT-2) writes each byte as one printable character: the printable ones of
Latin-1 stand for themselves, the others are moved to U+0100 and up, in order. SentencePiece writes text as it is, a
space as U+2581, and a byte that has no token of its own as `<0xNN>`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping

import tokenizers

_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def byte_level_alphabet() -> dict[str, int]:
    """Character to byte, of byte-level BPE."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    moved = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(moved)}


def decoder_kinds(backend: tokenizers.Tokenizer) -> set[str]:
    """The types in the tokenizer's decoder, sequences opened up; `Fuse`, which only joins, is left out."""
    return {str(step.get("type")) for step in _decoder_steps(backend)} - {"Fuse"}


def _decoder_steps(backend: tokenizers.Tokenizer) -> list[dict[str, object]]:
    if backend.decoder is None:
        return []
    state = json.loads(backend.decoder.__getstate__())
    opened: list[dict[str, object]] = []
    waiting = [state]
    while waiting:
        step = waiting.pop(0)
        if step.get("type") == "Sequence":
            waiting[:0] = step["decoders"]
        else:
            opened.append(step)
    return opened


class TokenBytes(dict[int, bytes]):
    """Token id to bytes, worked out when first asked for: a vocabulary of 150,000 is not walked at start."""

    def __init__(self, backend: tokenizers.Tokenizer, kinds: set[str], added: Mapping[int, str]) -> None:
        super().__init__()
        self._backend = backend
        self._added = added
        self._alphabet = byte_level_alphabet() if "ByteLevel" in kinds else None
        self._byte_fallback = "ByteFallback" in kinds
        steps = _decoder_steps(backend)
        self._replacements = [pair for step in steps if (pair := _replacement(step)) is not None]

    def __missing__(self, token_id: int) -> bytes:
        token = self._backend.id_to_token(token_id) if 0 <= token_id < 2**32 else None
        if token is None:
            return b""  # not kept: ids outside the vocabulary are without number
        value = self._bytes_of(token_id, token)
        self[token_id] = value
        return value

    def is_byte_piece(self, token_id: int) -> bool:
        """Whether the token is written `<0xNN>`."""
        if len(self[token_id]) != 1 or token_id in self._added:
            return False
        return _BYTE_PIECE.fullmatch(self._backend.id_to_token(token_id) or "") is not None

    def _bytes_of(self, token_id: int, token: str) -> bytes:
        added = self._added.get(token_id)
        if added is not None:
            return added.encode()
        if self._alphabet is not None:
            values = [self._alphabet.get(character) for character in token]
            # A token with a character outside the alphabet stands for itself.
            return token.encode() if None in values else bytes(value for value in values if value is not None)
        piece = _BYTE_PIECE.fullmatch(token) if self._byte_fallback else None
        if piece is not None:
            return bytes([int(piece[1], 16)])
        for old, new in self._replacements:
            token = token.replace(old, new)
        return token.encode()


def _replacement(step: Mapping[str, object]) -> tuple[str, str] | None:
    """What one step of a decoder writes for what, if that is the same wherever the token stands."""
    match step:
        case {"type": "Replace", "pattern": {"String": str(old)}, "content": str(new)}:
            return old, new
        case {"type": "Metaspace", "replacement": str(old)}:
            return old, " "
        case {"type": "BPEDecoder", "suffix": str(old)}:
            return old, " "
        case {"type": "WordPiece", "prefix": str(old)}:
            return old, ""
        case _:
            return None
