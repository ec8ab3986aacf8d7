from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from quire.core.request import TokenLogprobs
from quire.core.sampling import SamplingParams
from quire.text.stream import TextStream
from quire.text.tokenizer import Tokenizer

PROPERTY = settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def draw_ids(data: st.DataObject, tokenizer: Tokenizer) -> list[int]:
    """Token ids with much of what is difficult: runs of bytes, half characters, special tokens side by side."""
    size = tokenizer.vocab_size
    special = sorted(tokenizer.added_ids) or [0]
    texts = st.sampled_from(["hello the 😀", "👩‍👩‍👧", "世界", " world", "é", "\N{REPLACEMENT CHARACTER}", "  "])
    encoded = texts.map(lambda text: tokenizer.encode(text, add_special_tokens=False))
    some = st.lists(st.integers(0, size - 1), max_size=4) | st.lists(st.sampled_from(special), max_size=3)
    cut = encoded.flatmap(lambda ids: st.integers(0, len(ids)).map(lambda end: ids[:end]))
    parts = data.draw(st.lists(some | encoded | cut, max_size=8))
    return [token_id for part in parts for token_id in part]


def draw_chunks(data: st.DataObject, ids: list[int]) -> list[list[int]]:
    chunks = []
    while ids:
        size = data.draw(st.integers(1, 3))
        chunks.append(ids[:size])
        ids = ids[size:]
    return chunks


@given(data=st.data(), skip=st.booleans(), spaces=st.booleans())
@PROPERTY
def test_increments_make_up_the_decoded_whole(tokenizer, data, skip, spaces):
    ids = draw_ids(data, tokenizer)
    sampling = SamplingParams(skip_special_tokens=skip, spaces_between_special_tokens=spaces)
    stream = TextStream(tokenizer, sampling)
    shown = "".join(stream.push(chunk).text for chunk in draw_chunks(data, ids)) + stream.flush().text
    assert shown == tokenizer.decode(ids, skip_special_tokens=skip, spaces_between_special_tokens=spaces)
    assert stream.text == shown


@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=60))
@PROPERTY
def test_well_formed_text_never_shows_a_replacement_character(tokenizer, text):
    if "\N{REPLACEMENT CHARACTER}" in text:
        return
    ids = tokenizer.encode(text, add_special_tokens=False)
    stream = TextStream(tokenizer, SamplingParams())
    for token_id in ids:
        assert "\N{REPLACEMENT CHARACTER}" not in stream.push([token_id]).text
    assert "\N{REPLACEMENT CHARACTER}" not in stream.flush().text


@given(data=st.data())
@PROPERTY
def test_after_a_prompt_the_increments_are_what_decoding_both_adds(tokenizer, data):
    prompt = tokenizer.encode(data.draw(st.sampled_from(["hello", "the 世界", "the 😀", "a "])))
    ids = tokenizer.encode(data.draw(st.sampled_from(["world the", "😀 the", "hello"])), add_special_tokens=False)
    stream = TextStream(tokenizer, SamplingParams(), prompt)
    shown = "".join(stream.push([token_id]).text for token_id in ids) + stream.flush().text
    assert tokenizer.decode(prompt) + shown == tokenizer.decode(prompt + ids)


@pytest.mark.parametrize("kind", ["byte_level", "sentencepiece"], indirect=True)
def test_a_character_begun_in_the_prompt_is_completed(tokenizer):
    ids = tokenizer.encode("the 😀", add_special_tokens=False)
    stream = TextStream(tokenizer, SamplingParams(), ids[:-1])
    assert stream.push(ids[-1:]).text + stream.flush().text == "😀"


def test_half_a_character_comes_with_the_flush(byte_level_tokenizer):
    ids = byte_level_tokenizer.encode("😀", add_special_tokens=False)
    stream = TextStream(byte_level_tokenizer, SamplingParams())
    assert stream.push(ids[:-1]).text == ""
    assert stream.flush().text == "\N{REPLACEMENT CHARACTER}"


# --- stop strings -------------------------------------------------------------------------------------------


def brute_force(tokenizer: Tokenizer, ids: list[int], sampling: SamplingParams) -> tuple[str, str | None, int]:
    """Text, stop string and number of tokens, by looking at all text anew after each token.

    The stop string that is complete first counts, the longest of several; before min_tokens none does.
    """

    def decoded(count: int) -> str:
        # Without half a character at the end: it is not text yet.
        return tokenizer.decode(ids[:count]).rstrip("\N{REPLACEMENT CHARACTER}") if count < len(ids) else whole

    whole = tokenizer.decode(ids)
    floor = len(decoded(sampling.min_tokens - 1)) if sampling.min_tokens else 0
    for count in range(1, len(ids) + 1):
        if count < sampling.min_tokens:
            continue
        text = decoded(count)
        for end in range(floor + 1, len(text) + 1):
            found = [stop for stop in sampling.stop if text[:end].endswith(stop)]
            if found:
                stop = max(found, key=len)
                return text[: end if sampling.include_stop_str_in_output else end - len(stop)], stop, count
    return whole, None, len(ids)


@given(data=st.data(), include=st.booleans())
@PROPERTY
def test_stop_strings_against_brute_force(byte_level_tokenizer, data, include):
    tokenizer = byte_level_tokenizer
    text = data.draw(st.text("abé😀 ", max_size=24))
    ids = tokenizer.encode(text, add_special_tokens=False)
    stops = data.draw(st.lists(st.text("abé😀 ", min_size=1, max_size=4), min_size=1, max_size=4))
    min_tokens = data.draw(st.integers(0, 6))
    if min_tokens > len(ids):
        min_tokens = 0
    sampling = SamplingParams(
        stop=stops, include_stop_str_in_output=include, min_tokens=min_tokens, max_tokens=max(len(ids), 1)
    )
    expected_text, expected_stop, expected_count = brute_force(tokenizer, ids, sampling)

    stream = TextStream(tokenizer, sampling)
    taken, stop, shown = [], None, ""
    for chunk in draw_chunks(data, ids):
        delta = stream.push(chunk)
        taken += delta.token_ids
        shown += delta.text
        assert expected_text.startswith(shown)  # nothing that a stop string takes back is ever shown
        stop = stop or delta.stop
    last = stream.flush()
    assert (shown + last.text, stop or last.stop) == (expected_text, expected_stop)
    assert taken == ids[:expected_count]
    assert stream.text == expected_text


def test_a_stop_string_over_several_tokens_is_held_back(byte_level_tokenizer):
    stream = TextStream(byte_level_tokenizer, SamplingParams(stop=["END."]))
    deltas = [stream.push([i]) for i in byte_level_tokenizer.encode("a EN ENDED END.b", add_special_tokens=False)]
    assert "".join(delta.text for delta in deltas) == "a EN ENDED "
    assert [delta.stop for delta in deltas if delta.stop] == ["END."]
    assert deltas[-1].token_ids == []  # what came after the stop string is nobody's
    assert stream.flush().text == ""


def test_only_what_may_become_a_stop_string_is_held_back(byte_level_tokenizer):
    stream = TextStream(byte_level_tokenizer, SamplingParams(stop=["x" * 1000]))
    assert stream.push(byte_level_tokenizer.encode("hello", add_special_tokens=False)).text == "hello"
    assert stream.push(byte_level_tokenizer.encode("axx", add_special_tokens=False)).text == "a"
    assert stream.flush().text == "xx"


def test_logprobs_are_cut_with_their_tokens(byte_level_tokenizer):
    ids = byte_level_tokenizer.encode("a.b", add_special_tokens=False)
    logprobs = [TokenLogprobs(token_id, -1.0, 1) for token_id in ids]
    delta = TextStream(byte_level_tokenizer, SamplingParams(stop=["."])).push(ids, logprobs)
    assert delta.logprobs == logprobs[:2]


def test_without_detokenising_there_is_no_text(byte_level_tokenizer):
    stream = TextStream(byte_level_tokenizer, SamplingParams(detokenize=False))
    delta = stream.push([5, 6, 7])
    assert (delta.text, delta.token_ids) == ("", [5, 6, 7])
    assert stream.flush().text == ""


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, "a"),
        ({"include_stop_str_in_output": True}, "a.<|im_end|>"),
        ({"ignore_eos": True}, "a<|im_end|>"),
        ({"min_tokens": 3}, "a."),
    ],
)
def test_the_text_of_an_ending_token_is_left_out(byte_level_tokenizer, options, expected):
    tokenizer = byte_level_tokenizer
    (dot,) = tokenizer.encode(".", add_special_tokens=False)
    ids = [*tokenizer.encode("a", add_special_tokens=False), dot, 2]
    sampling = SamplingParams(stop_token_ids=[dot], skip_special_tokens=False, **options)
    stream = TextStream(tokenizer, sampling, eos_token_ids=[2])
    assert stream.push(ids).text + stream.flush().text == expected
