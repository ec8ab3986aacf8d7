"""/v1/completions, as the official client sees it."""

from __future__ import annotations

import shutil
from collections.abc import AsyncIterator

import openai
import pytest

from quire.core.errors import InvalidParameter
from quire.serve.call import gather
from quire.serve.generation import Piece


def test_text(served, expected):
    answer = served.client().completions.create(model="tiny", prompt="abc", max_tokens=5, seed=2)
    assert answer.object == "text_completion"
    assert answer.choices[0].text == expected("abc", 5, seed=2)
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.prompt_tokens == 3


def test_default_length_is_openais(served):
    assert served.client().completions.create(model="tiny", prompt="abc").usage.completion_tokens == 16


def test_every_form_of_prompt(served, expected):
    client = served.client()
    forms = {"one": "abc", "texts": ["abc", "de"], "ids": list(b"abc"), "lists": [list(b"abc"), list(b"de")]}
    for name, prompt in forms.items():
        answer = client.completions.create(model="tiny", prompt=prompt, max_tokens=4, seed=0, n=2)
        prompts = ["abc", "de"] if name in ("texts", "lists") else ["abc"]
        wanted = [expected(text, 4, seed=seed) for text in prompts for seed in (0, 1)]
        assert [choice.text for choice in answer.choices] == wanted, name
        assert [choice.index for choice in answer.choices] == list(range(len(wanted)))
        assert answer.usage.prompt_tokens == sum(map(len, prompts))


def test_stream_of_several_prompts(served, expected):
    texts = {0: "", 1: ""}
    finished = set()
    usage = None
    for chunk in served.client().completions.create(
        model="tiny", prompt=["abc", "de"], max_tokens=4, seed=0, stream=True, stream_options={"include_usage": True}
    ):
        usage = chunk.usage
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            if choice.finish_reason:
                finished.add(choice.index)
    assert texts == {0: expected("abc", 4), 1: expected("de", 4)}
    assert finished == {0, 1}
    assert usage.completion_tokens == 8


def test_continuous_usage(served):
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = list(
        served.client().completions.create(model="tiny", prompt="a", max_tokens=3, stream=True, stream_options=options)
    )
    assert [chunk.usage.completion_tokens for chunk in chunks] == [1, 2, 3, 3]


def test_logprobs(served):
    answer = served.client().completions.create(model="tiny", prompt="abc", max_tokens=3, logprobs=2)
    logprobs = answer.choices[0].logprobs
    assert "".join(logprobs.tokens) == answer.choices[0].text
    assert logprobs.token_logprobs == [-0.5] * 3
    assert logprobs.text_offset == [0, 1, 2]
    assert logprobs.top_logprobs[0] == {logprobs.tokens[0]: -0.5, "A": -1.5}


def test_echo_with_logprobs_scores_the_prompt(served):
    answer = served.client().completions.create(model="tiny", prompt="abc", max_tokens=0, echo=True, logprobs=1)
    choice = answer.choices[0]
    assert choice.text == "abc"
    assert choice.finish_reason == "length"
    assert (answer.usage.completion_tokens, answer.usage.total_tokens) == (0, 3)
    assert choice.logprobs.tokens == ["a", "b", "c"]
    assert choice.logprobs.token_logprobs == [None, -1.0, -1.0]
    assert choice.logprobs.text_offset == [0, 1, 2]
    assert choice.logprobs.top_logprobs == [None, {"x": -0.25, "b": -1.0}, {"x": -0.25, "c": -1.0}]


@pytest.mark.parametrize("stream", [False, True])
def test_echo(served, expected, stream):
    request = {"model": "tiny", "prompt": "abc", "max_tokens": 3, "echo": True, "logprobs": 0, "seed": 0}
    answer = served.client().completions.create(**request, stream=stream)
    chunks = list(answer) if stream else [answer]
    assert "".join(chunk.choices[0].text for chunk in chunks) == "abc" + expected("abc", 3)
    tokens = [token for chunk in chunks for token in chunk.choices[0].logprobs.tokens]
    offsets = [offset for chunk in chunks for offset in chunk.choices[0].logprobs.text_offset]
    assert "".join(tokens) == "abc" + expected("abc", 3)
    assert offsets == [0, 1, 2, 3, 4, 5]


def test_token_ids_and_prompt_logprobs(served):
    extra = {"return_token_ids": True, "prompt_logprobs": 0}
    answer = served.client().completions.create(model="tiny", prompt="abc", max_tokens=3, extra_body=extra)
    choice = answer.choices[0]
    assert bytes(choice.model_extra["token_ids"]).decode() == choice.text
    assert choice.model_extra["prompt_token_ids"] == list(b"abc")
    assert choice.model_extra["prompt_logprobs"][0] is None


def test_stop_token_is_named(served, expected):
    text = expected("abc", 10)
    extra = {"stop_token_ids": [ord(text[4])]}
    answer = served.client().completions.create(model="tiny", prompt="abc", max_tokens=10, seed=0, extra_body=extra)
    assert answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].model_extra["stop_reason"] == ord(text[4])


def test_without_a_seed_answers_differ(served):
    client = served.client()
    answers = {client.completions.create(model="tiny", prompt="abc", max_tokens=20).choices[0].text for _ in range(3)}
    assert len(answers) == 3


def test_a_checkpoints_default_length_gives_way_to_the_prompt(serving, model_dir, tmp_path):
    directory = shutil.copytree(model_dir, tmp_path / "model")
    (directory / "generation_config.json").write_text('{"max_new_tokens": 4000}')
    with serving(model_dir=directory) as running:
        answer = running.client().completions.create(model="tiny", prompt="x" * 4076)
        assert answer.usage.completion_tokens == 20
        messages = [{"role": "user", "content": "x" * 4000}]
        assert running.client().chat.completions.create(model="tiny", messages=messages).usage.total_tokens == 4096


def test_a_text_longer_than_the_context_may_be_truncated(served, expected):
    extra = {"truncate_prompt_tokens": 2}
    answer = served.client().completions.create(
        model="tiny", prompt="x" * 60_000 + "de", max_tokens=3, seed=0, extra_body=extra
    )
    assert answer.choices[0].text == expected("de", 3)


def test_truncated_prompt(served, expected):
    extra = {"truncate_prompt_tokens": 2}
    answer = served.client().completions.create(model="tiny", prompt="abcde", max_tokens=3, seed=0, extra_body=extra)
    assert answer.choices[0].text == expected("de", 3)


REFUSED = {
    "suffix": "x",
    "response_format": {"type": "json_object"},
    "best_of": 3,
    "prompt": [],
    "logprobs": 21,
    "n": 10**9,
    "max_tokens": -1,
    "min_tokens": 99,
    "stop": ["x"] * 17,
    "prompt_logprobs": 1000,
    "use_beam_search": True,
    "cache_salt": "x" * 300,
    "seed": 2**70,
    "top_p": 0,
}


@pytest.mark.parametrize("param", REFUSED)
def test_what_cannot_be_served_is_refused_by_name(served, param):
    body = {"model": "tiny", "prompt": "abc", "max_tokens": 2} | {param: REFUSED[param]}
    status, answer = served.post("/v1/completions", body)
    assert status == 400, answer
    assert answer["error"]["param"] == param


def test_mixed_prompts_and_too_many_sequences(served):
    status, answer = served.post("/v1/completions", {"prompt": ["abc", 5]})
    assert (status, answer["error"]["param"]) == (400, "prompt")
    status, answer = served.post("/v1/completions", {"prompt": ["abc"] * 100, "n": 100})
    assert (status, answer["error"]["param"]) == (400, "prompt")


def test_a_prompt_of_unknown_tokens(served):
    with pytest.raises(openai.BadRequestError, match="260"):
        served.client().completions.create(model="tiny", prompt=[5, 260])


def test_one_failing_prompt_fails_the_call_and_cancels_the_rest(served):
    status, answer = served.post("/v1/completions", {"prompt": ["!wait", "!full"], "max_tokens": 4})
    assert (status, answer["error"]["code"]) == (429, "queue_full")
    submitted = [event[1] for event in served.events() if event[0] == "submit"]
    served.until(lambda: ["cancel", submitted[-2]] in served.events(), "the cancel of the other prompt")


def test_a_request_id_of_the_clients_own(served, expected):
    for _ in range(2):  # twice the same: the engine has to tell them apart
        extra = {"request_id": "mine"}
        answer = served.client().completions.create(model="tiny", prompt="abc", max_tokens=2, seed=0, extra_body=extra)
        assert answer.id == "cmpl-mine"
        assert answer.choices[0].text == expected("abc", 2)
    assert served.post("/v1/completions", {"prompt": "abc", "request_id": "a b"})[0] == 400


async def test_an_answer_in_memory_is_bounded():
    piece = Piece(choice=None, text="a", token_ids=[1], logprobs=None, num_logprobs=400_000)

    async def pieces(count: int) -> AsyncIterator[Piece]:
        for _ in range(count):
            yield piece

    assert await gather(pieces(2)) == [piece, piece]
    with pytest.raises(InvalidParameter, match="1000000"):
        await gather(pieces(3))
