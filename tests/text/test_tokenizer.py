from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from quire.core.errors import BadValue, CheckpointError, InvalidParameter, MissingFile
from quire.text.tokenizer import Tokenizer

PROPERTY = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=40) | st.lists(
    st.sampled_from(["<|im_start|>", "<|eos|>", "<s>", "<tool>", "two words", "hello", " the", "😀", "\n", "世界"])
).map("".join)


@pytest.fixture(scope="session")
def oracles(directories: dict[str, Path]) -> dict[str, PreTrainedTokenizerFast]:
    return {
        kind: PreTrainedTokenizerFast(
            tokenizer_file=str(path / "tokenizer.json"), **json.loads((path / "tokenizer_config.json").read_text())
        )
        for kind, path in directories.items()
    }


@given(text=TEXT, special=st.booleans())
@PROPERTY
def test_encode_is_what_transformers_does(kind, tokenizer, oracles, text, special):
    assert tokenizer.encode(text, add_special_tokens=special) == oracles[kind].encode(text, add_special_tokens=special)


@given(data=st.data(), skip=st.booleans())
@PROPERTY
def test_decode_is_what_transformers_does(kind, tokenizer, oracles, data, skip):
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=30))
    expected = oracles[kind].decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False)
    assert tokenizer.decode(ids, skip_special_tokens=skip) == expected


@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=60))
@PROPERTY
def test_byte_level_bytes_are_the_texts_bytes(byte_level_tokenizer, text):
    ids = byte_level_tokenizer.encode(text, add_special_tokens=False)
    assert b"".join(map(byte_level_tokenizer.token_bytes, ids)) == text.encode()


def test_sentencepiece_bytes(tokenizers_by_kind):
    tokenizer = tokenizers_by_kind["sentencepiece"]
    ids = tokenizer.encode("the 😀 café", add_special_tokens=False)
    assert b"".join(map(tokenizer.token_bytes, ids)) == " the 😀 café".encode()
    assert tokenizer.token_bytes(3 + 0xF0) == b"\xf0"
    assert tokenizer.token_text(3 + 0xF0) == "\N{REPLACEMENT CHARACTER}"


def test_ids_outside_the_vocabulary_have_no_text(tokenizer):
    assert tokenizer.token_bytes(tokenizer.vocab_size) == b""
    assert tokenizer.token_bytes(-1) == b""
    assert tokenizer.token_text(2**40) == ""


def test_named_tokens(tokenizers_by_kind):
    tokenizer = tokenizers_by_kind["byte_level"]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (0, 3, 3)
    assert tokenizer.special_ids == {0, 1, 2, 3}
    assert len(tokenizer.added_ids) == 6
    assert tokenizers_by_kind["word_piece"].bos_token_id is None


def test_configuration_adds_tokens_as_transformers_does(directories, tmp_path):
    shutil.copy(directories["byte_level"] / "tokenizer.json", tmp_path)
    size = Tokenizer.load(tmp_path).vocab_size
    added = {
        str(size + 1): {"content": "<|later|>", "special": True},
        str(size): {"content": "<plain>", "special": False, "normalized": False},
    }
    # EOS is a plain token of the vocabulary; PAD is new.
    config = {
        "added_tokens_decoder": added,
        "eos_token": "the",
        "pad_token": {"__type": "AddedToken", "content": "<|pad|>"},
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = Tokenizer.load(tmp_path)
    oracle = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    text = "the <plain> <|later|><|pad|> fox"
    assert tokenizer.encode(text) == oracle.encode(text)
    assert tokenizer.pad_token_id == oracle.pad_token_id
    assert tokenizer.eos_token_id == oracle.eos_token_id
    ids = oracle.encode(text, add_special_tokens=False)
    assert tokenizer.decode(ids) == oracle.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def test_special_tokens_map_is_read(directories, tmp_path):
    shutil.copy(directories["byte_level"] / "tokenizer.json", tmp_path)
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"eos_token": {"content": "<|im_end|>"}}))
    assert Tokenizer.load(tmp_path).eos_token_id == 2


def test_spaces_between_special_tokens(tokenizers_by_kind):
    tokenizer = tokenizers_by_kind["word_piece"]
    ids = [1, 2, *tokenizer.encode("dog"), 2]
    spaced = tokenizer.decode(ids, skip_special_tokens=False)
    assert spaced == "[CLS] [SEP] dog [SEP]"
    joined = tokenizer.decode(ids, skip_special_tokens=False, spaces_between_special_tokens=False)
    assert joined == "[CLS][SEP] dog [SEP]"


def test_missing_and_corrupt_files_are_named(directories, tmp_path):
    with pytest.raises(MissingFile, match=r"tokenizer\.json"):
        Tokenizer.load(tmp_path)
    whole = (directories["byte_level"] / "tokenizer.json").read_bytes()
    for broken in (b"", whole[: len(whole) // 2], b"[]", b"\xff\xfe", b'{"version": "1.0"}'):
        (tmp_path / "tokenizer.json").write_bytes(broken)
        with pytest.raises(BadValue, match=r"tokenizer\.json"):
            Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes(whole)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json"):
        Tokenizer.load(tmp_path)


def test_half_a_surrogate_pair_is_the_callers_fault(tokenizer):
    with pytest.raises(InvalidParameter, match="surrogate"):
        tokenizer.encode("a\ud83d")


def test_a_checkpoints_truncation_and_padding_do_not_apply(directories, tmp_path):
    state = json.loads((directories["byte_level"] / "tokenizer.json").read_text())
    state["truncation"] = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    (tmp_path / "tokenizer.json").write_text(json.dumps(state))
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.decode(tokenizer.encode("The quick brown fox")) == "The quick brown fox"
