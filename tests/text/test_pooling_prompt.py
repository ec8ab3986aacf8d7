"""What pooling models read: prompts of the checkpoint, pairs, and what truncation leaves of them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace

import pytest
import tokenizers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from quire.core.errors import BadValue, InvalidParameter, PromptTooLong, UnsupportedTask
from quire.core.model_info import ModelInfo
from quire.core.pooling import PoolingInfo, PoolingTask
from quire.text.pooling_prompt import NamedPrompts, PoolingEncoder, Truncation, named_prompts
from quire.text.prompt import PromptEncoder
from quire.text.template import ChatTemplate
from quire.text.tokenizer import Tokenizer

SOURCE = "{% for m in messages %}<|im_start|>{{ m.role }} {{ m.content }}<|im_end|>{% endfor %}so"
INFO = ModelInfo(
    max_model_len=64,
    vocab_size=426,
    block_size=16,
    num_blocks=8,
    eos_token_ids=(3,),
    dtype="float32",
    architecture="Tiny",
    weight_bytes=1,
    kv_bytes_per_token=1,
)
SCORER = PoolingInfo(tasks=(PoolingTask.SCORE,), pair="template")
WHOLE = Truncation()


@pytest.fixture(scope="module")
def template() -> Iterator[ChatTemplate]:
    made = ChatTemplate({"default": SOURCE}, {})
    yield made
    made.close()


@pytest.fixture(scope="module")
def tokenizer(tokenizers_by_kind: dict[str, Tokenizer]) -> Tokenizer:
    return tokenizers_by_kind["byte_level"]


@pytest.fixture(scope="module")
def scorer(tokenizer: Tokenizer, template: ChatTemplate) -> PoolingEncoder:
    return PoolingEncoder(PromptEncoder(tokenizer, template, replace(INFO, pooling=SCORER)), NamedPrompts())


def pair_text(query: str, document: str) -> str:
    return f"<|im_start|>query {query}<|im_end|><|im_start|>document {document}<|im_end|>so"


texts = st.text("abc dogthe fox漢🙂\n", min_size=1, max_size=60)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(query=st.sampled_from(["q", "the fox", "漢"]), document=texts, room=st.integers(1, 30))
def test_a_template_keeps_its_end_whatever_is_cut(scorer, tokenizer, query, document, room):
    limit = len(tokenizer.encode(pair_text(query, ""), add_special_tokens=False)) + room
    encoded = scorer.encode_pair(query, document, Truncation(max_tokens=limit), "documents[0]")
    assert len(encoded.token_ids) <= limit
    text = tokenizer.decode(encoded.token_ids, skip_special_tokens=False)
    kept = text.partition("document ")[2].removesuffix("<|im_end|>so")
    assert document.startswith(kept)
    assert text == pair_text(query, kept)
    whole = tokenizer.encode(pair_text(query, document), add_special_tokens=False)
    assert kept == document or len(whole) > limit


def test_a_template_that_leaves_no_room(scorer, tokenizer):
    limit = len(tokenizer.encode(pair_text("the fox", ""), add_special_tokens=False)) - 1
    with pytest.raises(PromptTooLong, match="documents") as refused:
        scorer.encode_pair("the fox", "dog " * 30, Truncation(max_tokens=limit), "documents[0]")
    assert refused.value.param == "truncate_prompt_tokens"


class Counting:
    """A tokenizer of the library that knows how many characters it has been given."""

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        self.backend = backend
        self.num_read = 0

    def __getattr__(self, name: str) -> object:
        return getattr(self.backend, name)

    def encode(self, text: str, pair: str | None = None, **options: bool) -> tokenizers.Encoding:
        self.num_read += len(text) + len(pair or "")
        return self.backend.encode(text, pair, **options)


@pytest.mark.parametrize("kind", ["byte_level", "sentencepiece", "word_piece"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_of_a_text_that_is_far_too_long_little_is_read(directories, template, kind, side):
    counting = Counting(tokenizers.Tokenizer.from_file(str(directories[kind] / "tokenizer.json")))
    tokenizer = Tokenizer(counting, {})
    info = replace(INFO, max_model_len=128, vocab_size=100_000, pooling=SCORER)
    by_template = PoolingEncoder(PromptEncoder(tokenizer, template, info), NamedPrompts())
    apart = replace(info, pooling=PoolingInfo(tasks=(PoolingTask.SCORE,), pair="tokens"))
    joining = PoolingEncoder(PromptEncoder(tokenizer, None, apart), NamedPrompts())
    long = "the dog and the fox " * 400_000
    beginning, end = long[:4000], long[-4000:]
    kept = end if side == "left" else beginning
    cut = by_template.truncation(-1, side)
    assert joining.encode(long, cut, "input") == joining.encode(kept, cut, "input")
    assert joining.encode_pair(long, "fox", cut, "input") == joining.encode_pair(kept, "fox", cut, "input")
    assert joining.encode_pair("fox", long, cut, "input") == joining.encode_pair("fox", kept, cut, "input")
    by_head = by_template.encode_pair("fox", beginning, cut, "input")
    assert by_template.encode_pair("fox", long, cut, "input") == by_head
    assert by_template.head(long, 10**9) == by_template.head(beginning, 10**9) != long
    assert by_template.head(long, 3) == by_template.head(beginning, 3)
    with pytest.raises(PromptTooLong, match="truncate_prompt_tokens leaves"):
        by_template.encode_pair(long, "fox", cut, "input")
    for refused in (by_template, joining):
        with pytest.raises(PromptTooLong, match="characters"):
            refused.encode_pair(long, "fox", WHOLE, "input")
    assert counting.num_read < 200_000 < len(long) / 10


def test_ids_that_the_model_has_not(scorer):
    for ids in ([426], [-1], [1, True]):
        with pytest.raises(InvalidParameter, match="token id") as refused:
            scorer.encode(ids, WHOLE, "input[4]")
        assert refused.value.param == "input"


def test_ids_are_cut_without_special_tokens(scorer):
    assert scorer.encode(list(range(9)), scorer.truncation(4, "left"), "input").token_ids == [5, 6, 7, 8]
    assert scorer.encode(list(range(9)), scorer.truncation(4, None), "input").token_ids == [0, 1, 2, 3]
    assert len(scorer.encode([1] * 99, scorer.truncation(-1, None), "input").token_ids) == 64


@pytest.mark.parametrize("length", [0, -2, 65, 2**70])
def test_a_length_out_of_bounds(scorer, length):
    with pytest.raises(InvalidParameter, match="between 1 and") as refused:
        scorer.truncation(length, None)
    assert refused.value.param == "truncate_prompt_tokens"


def test_a_model_that_generates_reads_nothing_here(tokenizer):
    with pytest.raises(UnsupportedTask, match="generates text"):
        PoolingEncoder(PromptEncoder(tokenizer, None, INFO), NamedPrompts())


def test_prompts_of_the_checkpoint(tmp_path):
    assert named_prompts(tmp_path) == NamedPrompts()
    file = tmp_path / "config_sentence_transformers.json"
    file.write_text(json.dumps({"prompts": {"query": "Q: ", "document": ""}, "default_prompt_name": "query"}))
    named = named_prompts(tmp_path)
    assert [named.get(name) for name in (None, "query", "document")] == ["Q: ", "Q: ", ""]
    with pytest.raises(InvalidParameter, match="document, query"):
        named.get("passage")
    file.write_text(json.dumps({"__version__": {}, "prompts": {"query": "Q: "}, "default_prompt_name": None}))
    assert named_prompts(tmp_path).get(None) == ""


@pytest.mark.parametrize("bad", [{"prompts": ["a"]}, {"prompts": {"a": 1}}, {"default_prompt_name": "a"}])
def test_prompts_that_are_none(tmp_path, bad):
    (tmp_path / "config_sentence_transformers.json").write_text(json.dumps(bad))
    with pytest.raises(BadValue, match="config_sentence_transformers"):
        named_prompts(tmp_path)
