"""Small tokenizers of the kinds that checkpoints have, trained or written down here."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Backend

from quire.text.tokenizer import Tokenizer

CORPUS = [
    "The quick brown fox jumps over the lazy dog. The dog sleeps; the fox does not.",
    "Hello, world! Hello there, how are you today? I am fine, thank you.",
    "你好,世界。你好吗?我很好。 こんにちは世界。 Привет, мир! Как дела?",
    "naïve café déjà vu — €5 and £6, 100% … 😀 👍🏽 👩‍👩‍👧 family",
    "def f(x):\n    return x + 1\n\n\tprint(f(2))  # code",
    "مرحبا بالعالم  नमस्ते दुनिया  안녕하세요 세계",
]
SPECIAL = ["<|bos|>", "<|im_start|>", "<|im_end|>", "<|eos|>"]


def byte_level() -> Backend:
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    backend.add_tokens(["<tool>", "two words"])
    backend.post_processor = processors.TemplateProcessing(
        single="<|bos|> $A", special_tokens=[("<|bos|>", backend.token_to_id("<|bos|>"))]
    )
    return backend


def sentencepiece() -> Backend:
    """Llama 2's shape: text with U+2581 for spaces, bytes for what has no token."""
    specials = ["<unk>", "<s>", "</s>"]
    pieces = specials + [f"<0x{byte:02X}>" for byte in range(256)]
    letters = sorted(set("".join(CORPUS[:2]) + "\u2581éß世"))
    pieces += [letter for letter in letters if letter != " "]
    merges = [("t", "h"), ("th", "e"), ("h", "e"), ("l", "l"), ("\u2581", "the"), ("\u2581", "t"), ("o", "w")]
    merges += [("he", "ll"), ("hell", "o"), ("\u2581", "\u2581"), ("\u2581", "w"), ("r", "l"), ("\u2581", "hello")]
    pieces += [left + right for left, right in merges]
    vocab = {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}
    backend = Backend(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in specials])
    backend.add_tokens([AddedToken("<tool>", normalized=False, special=False)])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return backend


def metaspace() -> Backend:
    backend = Backend(models.BPE(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False)
    backend.train_from_iterator(CORPUS, trainer)
    return backend


def word_piece() -> Backend:
    backend = Backend(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=300, special_tokens=["[UNK]", "[CLS]", "[SEP]"], show_progress=False)
    backend.train_from_iterator(CORPUS, trainer)
    return backend


KINDS = {
    "byte_level": (byte_level, {"bos_token": "<|bos|>", "eos_token": "<|eos|>", "pad_token": "<|eos|>"}),
    "sentencepiece": (sentencepiece, {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}),
    "metaspace": (metaspace, {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}),
    "word_piece": (word_piece, {"unk_token": "[UNK]", "eos_token": "[SEP]"}),
}


@pytest.fixture(scope="session")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A checkpoint directory per kind of tokenizer."""
    made: dict[str, Path] = {}
    for kind, (build, named) in KINDS.items():
        directory = tmp_path_factory.mktemp(kind)
        build().save(str(directory / "tokenizer.json"))
        (directory / "tokenizer_config.json").write_text(json.dumps(named))
        made[kind] = directory
    return made


@pytest.fixture(scope="session")
def tokenizers_by_kind(directories: dict[str, Path]) -> dict[str, Tokenizer]:
    return {kind: Tokenizer.load(directory) for kind, directory in directories.items()}


@pytest.fixture(params=sorted(KINDS))
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def tokenizer(kind: str, tokenizers_by_kind: dict[str, Tokenizer]) -> Tokenizer:
    return tokenizers_by_kind[kind]


@pytest.fixture
def byte_level_tokenizer(tokenizers_by_kind: dict[str, Tokenizer]) -> Tokenizer:
    return tokenizers_by_kind["byte_level"]
