from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from quire.core.errors import BadValue, CheckpointError, InvalidParameter, PromptTooLong, TemplateError
from quire.core.model_info import ModelInfo
from quire.core.request import Deadlines
from quire.core.sampling import SamplingParams
from quire.text.defaults import eos_token_ids, generation_defaults
from quire.text.prompt import PromptEncoder
from quire.text.template import ChatTemplate
from quire.text.tokenizer import Tokenizer

SOURCE = "{% for m in messages %}<|im_start|>{{ m.role }} {{ m.content }}<|im_end|>{% endfor %}{{ extra }}"
MESSAGES = [{"role": "user", "content": [{"type": "text", "text": "hello"}]}]


def model_info(**changes: object) -> ModelInfo:
    values: dict[str, object] = {
        "max_model_len": 64,
        "vocab_size": 426,
        "block_size": 16,
        "num_blocks": 8,
        "eos_token_ids": (3,),
        "dtype": "float32",
        "architecture": "Tiny",
        "weight_bytes": 1,
        "kv_bytes_per_token": 1,
    }
    return ModelInfo(**(values | changes))


@pytest.fixture(scope="module")
def template() -> Iterator[ChatTemplate]:
    made = ChatTemplate({"default": SOURCE}, {})
    yield made
    made.close()


@pytest.fixture
def encoder(byte_level_tokenizer: Tokenizer, template: ChatTemplate) -> PromptEncoder:
    return PromptEncoder(byte_level_tokenizer, template, model_info())


FREE = SamplingParams(max_tokens=None)


def test_text_and_ids(encoder, byte_level_tokenizer):
    ids = byte_level_tokenizer.encode("hello")
    assert encoder.encode_text("hello", FREE) == ids
    assert encoder.encode_text("hello", FREE, add_special_tokens=False) == ids[1:]
    assert encoder.encode_text(ids, FREE) == ids


def test_truncation_keeps_the_last_tokens(encoder, byte_level_tokenizer):
    text = "hello " * 60
    ids = byte_level_tokenizer.encode(text)
    assert len(ids) > 64
    assert encoder.encode_text(text, SamplingParams(truncate_prompt_tokens=5)) == ids[-5:]
    assert encoder.encode_text(ids, SamplingParams(truncate_prompt_tokens=5)) == ids[-5:]


@pytest.mark.parametrize("prompt", ["", []])
def test_an_empty_prompt_is_refused(encoder, prompt):
    with pytest.raises(InvalidParameter, match="empty"):
        encoder.encode_text(prompt, FREE, add_special_tokens=False)


@pytest.mark.parametrize("bad", [426, -1, 2**40, True, "x", 1.0])
def test_ids_that_the_model_has_not(encoder, bad):
    with pytest.raises(InvalidParameter, match="token id") as refusal:
        encoder.encode_text([1, bad], FREE)
    assert refusal.value.param == "prompt"


def test_length_is_checked_with_the_wanted_output(encoder):
    assert len(encoder.encode_text([1] * 60, SamplingParams(max_tokens=4))) == 60
    with pytest.raises(PromptTooLong, match=r"60 tokens.*5 more.*64 tokens.*at most 4") as refusal:
        encoder.encode_text([1] * 60, SamplingParams(max_tokens=5))
    assert refusal.value.code == "context_length_exceeded"
    assert len(encoder.encode_text([1] * 63, FREE)) == 63
    with pytest.raises(PromptTooLong, match="64 tokens"):
        encoder.encode_text([1] * 64, FREE)


def test_a_text_far_too_long_is_refused_by_its_characters(encoder):
    with pytest.raises(PromptTooLong, match="8000000 characters"):
        encoder.encode_text("a" * 8_000_000, FREE)


def test_a_long_text_may_be_truncated(encoder):
    truncated = SamplingParams(truncate_prompt_tokens=5, max_tokens=None)
    assert len(encoder.encode_text("ab " * 10_000, truncated)) == 5


def test_no_text_that_fits_is_refused_by_its_characters(byte_level_tokenizer):
    longest = max(range(420), key=lambda i: len(byte_level_tokenizer.token_text(i)))
    text = byte_level_tokenizer.token_text(longest) * 8
    ids = byte_level_tokenizer.encode(text, add_special_tokens=False)
    encoder = PromptEncoder(byte_level_tokenizer, None, model_info(max_model_len=len(ids) + 1))
    assert encoder.encode_text(text, FREE, add_special_tokens=False) == ids


def test_chat_goes_through_the_template(encoder, byte_level_tokenizer):
    text = "<|im_start|>user hello<|im_end|>more"
    assert encoder.chat_text(MESSAGES, template_kwargs={"extra": "more"}) == text
    ids = encoder.encode_chat(MESSAGES, FREE, template_kwargs={"extra": "more"})
    assert ids == byte_level_tokenizer.encode(text, add_special_tokens=False)
    with_bos = encoder.encode_chat(MESSAGES, FREE, template_kwargs={"extra": "more"}, add_special_tokens=True)
    assert with_bos == [0, *ids]


def test_chat_that_cannot_be(encoder, byte_level_tokenizer):
    with pytest.raises(InvalidParameter, match="messages") as refusal:
        encoder.encode_chat(MESSAGES, FREE, template_kwargs={"messages": []})
    assert refusal.value.param == "chat_template_kwargs"
    with pytest.raises(InvalidParameter, match="no chat template"):
        PromptEncoder(byte_level_tokenizer, None, model_info()).encode_chat(MESSAGES, FREE)
    refusing = ChatTemplate({"default": "{{ raise_exception('not so') }}"}, {})
    with pytest.raises(TemplateError, match="not so"):
        PromptEncoder(byte_level_tokenizer, refusing, model_info()).encode_chat(MESSAGES, FREE)
    refusing.close()


def requests(encoder, sampling, prompt=(5, 6, 7), **options):
    return encoder.engine_requests("r", prompt, sampling, arrival_time=1.5, fresh_seed=lambda: 99, **options)


def test_one_request(encoder):
    deadlines = Deadlines(total_ms=5)
    (request,) = requests(encoder, FREE, priority=2, tenant="t", cache_salt="s", deadlines=deadlines)
    assert (request.request_id, request.prompt_token_ids, request.arrival_time) == ("r", (5, 6, 7), 1.5)
    assert (request.priority, request.tenant, request.cache_salt) == (2, "t", "s")
    assert request.deadlines is deadlines
    assert request.sampling.seed == 99
    assert request.sampling.max_tokens == 61


def test_n_is_unfolded(encoder):
    children = requests(encoder, SamplingParams(n=3, seed=7, max_tokens=4))
    assert [child.request_id for child in children] == ["r-0", "r-1", "r-2"]
    assert [child.sampling.seed for child in children] == [7, 8, 9]
    assert {child.sampling.n for child in children} == {1}
    # The first of several is what one alone would be.
    assert requests(encoder, SamplingParams(seed=7, max_tokens=4))[0].sampling == children[0].sampling


def test_bad_words_with_and_without_a_space(encoder, byte_level_tokenizer):
    (request,) = requests(encoder, SamplingParams(bad_words=["the", " fox"]))
    expected = [
        tuple(byte_level_tokenizer.encode(text, add_special_tokens=False)) for text in ("the", " the", "fox", " fox")
    ]
    assert list(request.sampling.bad_words_token_ids) == expected


@pytest.mark.parametrize(
    ("sampling", "param"),
    [
        (SamplingParams(logit_bias={426: 1.0}), "logit_bias"),
        (SamplingParams(allowed_token_ids=[1, 426]), "allowed_token_ids"),
        (SamplingParams(stop_token_ids=[500]), "stop_token_ids"),
        (SamplingParams(logprobs=21), "logprobs"),
        (SamplingParams(prompt_logprobs=21), "prompt_logprobs"),
    ],
)
def test_sampling_that_the_model_or_server_has_not(encoder, sampling, param):
    with pytest.raises(InvalidParameter) as refusal:
        requests(encoder, sampling)
    assert refusal.value.param == param
    assert refusal.value.remedy


def test_more_output_than_there_is_room_for(encoder):
    with pytest.raises(PromptTooLong, match="max_tokens asks for 62"):
        requests(encoder, SamplingParams(max_tokens=62))
    with pytest.raises(PromptTooLong, match="min_tokens asks for 62"):
        requests(encoder, SamplingParams(max_tokens=None, min_tokens=62))


# --- what the checkpoint recommends -------------------------------------------------------------------------


def test_generation_defaults(tmp_path):
    assert generation_defaults(tmp_path) == {}
    config = {"temperature": 0.6, "top_p": 0.95, "top_k": 20, "min_p": None, "max_new_tokens": 99, "num_beams": 4}
    (tmp_path / "generation_config.json").write_text(json.dumps(config | {"do_sample": True}))
    expected = {"temperature": 0.6, "top_p": 0.95, "top_k": 20, "max_tokens": 99}
    assert generation_defaults(tmp_path) == expected
    (tmp_path / "generation_config.json").write_text(json.dumps(config | {"do_sample": False}))
    assert generation_defaults(tmp_path) == expected | {"temperature": 0.0}


@pytest.mark.parametrize("entry", ['{"top_p": 1.5}', '{"temperature": NaN}', '{"top_k": "x"}', "[]", "{"])
def test_bad_defaults_are_named(tmp_path, entry):
    (tmp_path / "generation_config.json").write_text(entry)
    with pytest.raises(CheckpointError, match=r"generation_config\.json"):
        generation_defaults(tmp_path)


def test_eos_token_ids(tmp_path):
    assert eos_token_ids(tmp_path) == ()
    (tmp_path / "config.json").write_text(json.dumps({"text_config": {"eos_token_id": 7}}))
    assert eos_token_ids(tmp_path) == (7,)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [3, 2]}))
    assert eos_token_ids(tmp_path) == (3, 2)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": "x"}))
    with pytest.raises(BadValue, match="eos_token_id"):
        eos_token_ids(tmp_path)


@pytest.mark.parametrize("where", ["tokenizer_config.json", "tokenizer.json"])
def test_the_tokenizers_own_eos_is_among_them(tmp_path, where):
    added = {"id": 41, "content": "<end>"}
    entry = {"added_tokens_decoder": {"41": added}} if where == "tokenizer_config.json" else {"added_tokens": [added]}
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"eos_token": {"content": "<end>"}}))
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 7}))
    (tmp_path / where).write_text(json.dumps(entry))
    assert eos_token_ids(tmp_path) == (7, 41)
