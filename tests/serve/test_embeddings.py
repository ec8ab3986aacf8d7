"""/v1/embeddings, /pooling and /classify, over an engine whose numbers are known."""

from __future__ import annotations

import base64
import contextlib
import shutil
import socket
import struct
import threading

import openai
import pytest

from quire.serve import pooling
from quire.serve.supervision import Supervision

EMBEDDER = {"FAKE_ENGINE_POOLING": '{"tasks": ["embed"], "embedding_size": 8}'}


def value(served, name: str, *labels: str) -> float:
    lines = served.get("/metrics")[1].decode().splitlines()
    return sum(
        float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name) and all(x in line for x in labels)
    )


def unpacked(text: str) -> list[float]:
    data = base64.b64decode(text, validate=True)
    return list(struct.unpack(f"<{len(data) // 4}f", data))


@pytest.mark.parametrize("encoding", ["float", "base64", openai.NOT_GIVEN])
def test_the_official_client(embedder, numbers, encoding):
    answer = embedder.client().embeddings.create(model="tiny", input=["abc", "de"], encoding_format=encoding)
    assert (answer.object, answer.model) == ("list", "tiny")
    assert [(item.object, item.index) for item in answer.data] == [("embedding", 0), ("embedding", 1)]
    found = [item.embedding for item in answer.data]
    if encoding == "base64":
        found = [unpacked(each) for each in found]
    assert found == [numbers(list(text), 8) for text in (b"abc", b"de")]
    assert (answer.usage.prompt_tokens, answer.usage.total_tokens) == (5, 5)


def test_every_form_of_input(embedder, numbers):
    ids = [list(b"abc"), list(b"de")]
    for given, wanted in (("abc", ids[:1]), (ids[0], ids[:1]), (["abc", "de"], ids), (ids, ids)):
        status, answer = embedder.post("/v1/embeddings", {"input": given})
        assert status == 200, answer
        assert [item["embedding"] for item in answer["data"]] == [numbers(each, 8) for each in wanted]


def test_a_conversation(embedder, numbers):
    body = {"messages": [{"role": "user", "content": "x"}]}
    tokens = embedder.post("/tokenize", body | {"add_generation_prompt": False})[1]["tokens"]
    answer = embedder.post("/v1/embeddings", body)[1]
    assert answer["data"][0]["embedding"] == numbers(tokens, 8)
    assert answer["usage"]["prompt_tokens"] == len(tokens)
    with_prompt = embedder.post("/tokenize", body)[1]["tokens"]
    answer = embedder.post("/v1/embeddings", body | {"add_generation_prompt": True})[1]
    assert answer["data"][0]["embedding"] == numbers(with_prompt, 8)


def test_dimensions(embedder, numbers):
    answer = embedder.client().embeddings.create(model="tiny", input="abc", dimensions=4)
    assert answer.data[0].embedding == numbers(list(b"abc"), 4, dimensions=4)
    same = embedder.client().embeddings.create(model="tiny", input="abc", dimensions=8)
    assert same.data[0].embedding == numbers(list(b"abc"), 8)
    with pytest.raises(openai.BadRequestError, match=r"Take one of 2, 4\."):
        embedder.client().embeddings.create(model="tiny", input="abc", dimensions=3)


@pytest.mark.parametrize("name", ["normalize", "use_activation"])
def test_normalisation_is_the_engines(embedder, numbers, name):
    for choice in (True, False):
        answer = embedder.post("/v1/embeddings", {"input": "abc", name: choice})[1]
        assert answer["data"][0]["embedding"] == numbers(list(b"abc"), 8, normalize=choice)


@pytest.mark.parametrize(
    ("fields", "kept"),
    [
        ({"truncate_prompt_tokens": 3}, "abc"),
        ({"truncate_prompt_tokens": 3, "truncation_side": "left"}, "def"),
        ({"truncate_prompt_tokens": 9}, "abcdef"),
        ({"truncate_prompt_tokens": -1}, "abcdef"),
    ],
)
def test_truncation(embedder, numbers, fields, kept):
    for given in ("abcdef", list(b"abcdef")):
        answer = embedder.post("/v1/embeddings", {"input": given} | fields)[1]
        assert answer["data"][0]["embedding"] == numbers(list(kept.encode()), 8)
        assert answer["usage"]["prompt_tokens"] == len(kept)


def test_an_input_as_long_as_the_context_and_longer_ones(embedder):
    for length, fields in ((4096, {}), (5000, {"truncate_prompt_tokens": -1})):
        status, answer = embedder.post("/v1/embeddings", {"input": "x" * length} | fields)
        assert (status, answer["usage"]["prompt_tokens"]) == (200, 4096)
    for given in ("x" * 4097, [5] * 4097, ["a", "x" * 4097]):
        status, answer = embedder.post("/v1/embeddings", {"input": given})
        error = answer["error"]
        assert (status, error["code"], error["param"]) == (400, "context_length_exceeded", "input")
        assert "4097 tokens" in error["message"]
        assert "4096 tokens" in error["message"]
        assert ("input[1]" in error["message"]) == (given[0] == "a")
    status, answer = embedder.post("/v1/embeddings", {"input": "x" * 100_000})
    assert (status, answer["error"]["param"]) == (400, "input")
    assert "100000 characters" in answer["error"]["message"]


REFUSED = {
    "input": [],
    "encoding_format": "int8",
    "endianness": "big",
    "embed_dtype": "float16",
    "truncate_prompt_tokens": 5000,
    "dimensions": 0,
    "prompt_name": "query",
    "chat_template_kwargs": {"a": 1},
    "add_generation_prompt": True,
    "priority": 2**40,
    "cache_salt": "x" * 300,
    "deadline_ms": -1,
    "request_id": "a b",
    "truncation_side": "middle",
}


@pytest.mark.parametrize("param", REFUSED)
def test_what_cannot_be_served_is_refused_by_name(embedder, param):
    status, answer = embedder.post("/v1/embeddings", {"input": "abc"} | {param: REFUSED[param]})
    assert (status, answer["error"]["param"]) == (400, param), answer


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "input"),
        ({"input": "a", "messages": [{"role": "user", "content": "x"}]}, "input"),
        ({"input": ["a", 5]}, "input"),
        ({"input": [5, 260]}, "input"),
        ({"input": [[]]}, "input"),
        ({"input": ""}, "input"),
        ({"input": ["a"] * 2049}, "input"),
        ({"input": [[1] * 4000] * 251}, "input"),
        ({"messages": []}, "messages"),
        ({"input": "a", "normalize": True, "use_activation": False}, "normalize"),
        ({"messages": [{"role": "user", "content": "x"}], "prompt_name": "query"}, "prompt_name"),
    ],
)
def test_inputs_that_are_none(embedder, body, param):
    status, answer = embedder.post("/v1/embeddings", body)
    assert (status, answer["error"]["param"]) == (400, param), answer


def test_a_large_call_is_submitted_in_parts(serving, numbers):
    with serving(engine_environment=EMBEDDER, supervision=Supervision(max_in_flight=512)) as running:
        status, answer = running.post("/v1/embeddings", {"input": [[index % 256] for index in range(2048)]})
        assert status == 200
        assert [item["index"] for item in answer["data"]] == list(range(2048))
        assert [item["embedding"] for item in answer["data"][1000:1300]] == [
            numbers([index % 256], 8) for index in range(1000, 1300)
        ]
        status, answer = running.post("/v1/embeddings", {"input": ["a"] * 600 + ["!refuse"] + ["!wait"] * 600})
        assert (status, answer["error"]["code"]) == (400, "context_length_exceeded")
        assert len(submitted(running)) == 2048 + 1024  # the rest of the call never came


def test_unknown_fields_are_named(embedder):
    raw = embedder.client().embeddings.with_raw_response.create(
        model="tiny", input="a", extra_body={"late_chunking": True}
    )
    assert raw.headers["x-quire-ignored-fields"] == "late_chunking"


def test_the_size_of_an_answer_is_bounded(embedder, monkeypatch):
    monkeypatch.setattr(pooling, "MAX_NUMBERS", {"float": 31, "base64": 32})
    body = {"input": ["a"] * 4}
    status, answer = embedder.post("/v1/embeddings", body)
    assert (status, answer["error"]["param"]) == (400, "input")
    assert "32 numbers" in answer["error"]["message"]
    assert embedder.post("/v1/embeddings", body | {"encoding_format": "base64"})[0] == 200
    assert embedder.post("/pooling", {"input": "abcd", "task": "token_embed"})[0] == 400


# --- /pooling -------------------------------------------------------------------------------------------------------


def test_pooling_by_task(embedder, numbers):
    ids = list(b"abc")
    flat = numbers(ids, 24, task="token_embed")
    by_token = [flat[0:8], flat[8:16], flat[16:24]]
    for fields in ({}, {"task": "token_embed"}):
        answer = embedder.post("/pooling", {"input": "abc"} | fields)[1]
        assert answer["data"] == [{"index": 0, "object": "pooling", "data": by_token}]
    answer = embedder.post("/pooling", {"input": "abc", "encoding_format": "base64"})[1]
    assert unpacked(answer["data"][0]["data"]) == flat
    answer = embedder.post("/pooling", {"input": ["abc"], "task": "embed", "dimensions": 2})[1]
    assert answer["data"][0]["data"] == numbers(ids, 2, dimensions=2)
    assert answer["usage"] == {"prompt_tokens": 3, "total_tokens": 3}


def test_pooling_of_a_classifier(classifier, numbers):
    ids = list(b"ab")
    answer = classifier.post("/pooling", {"input": "ab"})[1]
    flat = numbers(ids, 6, task="token_classify")
    assert answer["data"][0]["data"] == [flat[:3], flat[3:]]
    answer = classifier.post("/pooling", {"input": "ab", "task": "classify", "use_activation": False})[1]
    assert answer["data"][0]["data"] == numbers(ids, 3, task="classify", activation=False)
    status, answer = classifier.post("/pooling", {"input": "ab", "dimensions": 3})
    assert (status, answer["error"]["param"]) == (400, "dimensions")


# --- /classify ------------------------------------------------------------------------------------------------------


def test_classify(classifier, numbers):
    answer = classifier.post("/classify", {"input": ["ab", "cd", "e"], "use_activation": True})[1]
    assert answer["object"] == "list"
    for index, (text, item) in enumerate(zip(("ab", "cd", "e"), answer["data"], strict=True)):
        probs = numbers(list(text.encode()), 3, task="classify", activation=True)
        label = ["no", "yes", "perhaps"][probs.index(max(probs))]
        assert item == {"index": index, "label": label, "probs": probs, "num_classes": 3}


def test_classes_without_names(serving, numbers):
    environment = {"FAKE_ENGINE_POOLING": '{"tasks": ["classify"]}'}
    with serving(engine_environment=environment) as running:
        answer = running.post("/classify", {"input": "a"})[1]
        probs = numbers(list(b"a"), 1, task="classify")
        assert answer["data"] == [{"index": 0, "label": None, "probs": probs, "num_classes": 1}]


# --- which model does what ------------------------------------------------------------------------------------------

ROUTES = {
    "/v1/embeddings": {"input": "a"},
    "/pooling": {"input": "a"},
    "/classify": {"input": "a"},
    "/score": {"text_1": "a", "text_2": "b"},
    "/v1/score": {"text_1": "a", "text_2": "b"},
    "/rerank": {"query": "a", "documents": ["b"]},
    "/v1/rerank": {"query": "a", "documents": ["b"]},
    "/v2/rerank": {"query": "a", "documents": ["b"]},
}


@pytest.mark.parametrize("path", ROUTES)
def test_a_model_that_generates_says_so(served, path):
    status, answer = served.post(path, ROUTES[path])
    assert (status, answer["error"]["code"]) == (400, "unsupported_task")
    assert "generates text" in answer["error"]["message"]


def test_a_pooling_model_does_not_generate(embedder, classifier):
    for path, body in (
        ("/v1/completions", {"prompt": "a"}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}]}),
    ):
        status, answer = embedder.post(path, body)
        assert (status, answer["error"]["code"]) == (400, "unsupported_task")
        assert "embed, token_embed" in answer["error"]["message"]
    assert embedder.post("/tokenize", {"prompt": "ab"})[1]["tokens"] == [97, 98]
    assert [model["id"] for model in embedder.client().models.list().model_dump()["data"]] == ["tiny", "tiny-alias"]


def test_a_task_that_the_model_has_not_is_named(embedder, classifier, reranker):
    for running, path, wanted in (
        (classifier, "/v1/embeddings", "classify, token_classify"),
        (embedder, "/classify", "embed, token_embed"),
        (reranker, "/v1/embeddings", "score"),
        (classifier, "/score", "classify, token_classify"),
        (classifier, "/rerank", "classify, token_classify"),
    ):
        status, answer = running.post(path, ROUTES[path])
        assert (status, answer["error"]["code"]) == (400, "unsupported_task")
        assert wanted in answer["error"]["message"]
    assert embedder.post("/v1/embeddings", {"input": "a", "model": "other"})[0] == 404


def test_a_prompt_of_the_checkpoint(serving, model_dir, tmp_path, numbers):
    directory = shutil.copytree(model_dir, tmp_path / "model")
    (directory / "config_sentence_transformers.json").write_text(
        '{"prompts": {"query": "Q: ", "document": ""}, "default_prompt_name": "document"}'
    )
    with serving(model_dir=directory, engine_environment=EMBEDDER) as running:
        for fields, text in (({}, b"a"), ({"prompt_name": "query"}, b"Q: a"), ({"prompt_name": "document"}, b"a")):
            answer = running.post("/v1/embeddings", {"input": "a"} | fields)[1]
            assert answer["data"][0]["embedding"] == numbers(list(text), 8)
        status, answer = running.post("/v1/embeddings", {"input": "a", "prompt_name": "passage"})
        assert (status, answer["error"]["param"]) == (400, "prompt_name")
        assert "document, query" in answer["error"]["message"]


# --- when things go wrong -------------------------------------------------------------------------------------------


def submitted(served) -> list[str]:
    return [event[1] for event in served.events() if event[0] == "submit"]


def test_one_failing_input_fails_the_call_and_cancels_the_rest(embedder):
    status, answer = embedder.post("/v1/embeddings", {"input": ["!wait", "!refuse"]})
    assert (status, answer["error"]["code"]) == (400, "context_length_exceeded")
    waiting = submitted(embedder)[-2]
    embedder.until(lambda: ["cancel", waiting] in embedder.events(), "the cancel of the other input")


def test_a_refusal_says_when_to_come_back(embedder):
    with pytest.raises(openai.RateLimitError) as refused:
        embedder.client().embeddings.create(model="tiny", input="!full")
    assert refused.value.response.headers["retry-after"] == "4"


@contextlib.contextmanager
def held(served, body: bytes):
    """A call that has got to the engine and whose client waits."""
    before = len(submitted(served))
    with socket.create_connection(served.address, timeout=20) as connection:
        connection.sendall(b"POST /v1/embeddings HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(body) + body)
        served.until(lambda: len(submitted(served)) == before + body.count(b"!"), "the submits")
        yield


def test_a_client_that_leaves_cancels_all_its_inputs(embedder):
    before = len(submitted(embedder))
    with held(embedder, b'{"input": ["!wait a", "!wait b", "!wait c"]}'):
        mine = set(submitted(embedder)[before:])
    embedder.until(lambda: {e[1] for e in embedder.events() if e[0] == "cancel"} >= mine, "the cancels")


def test_a_call_of_more_than_may_be_in_flight_at_once(serving, numbers):
    with serving(engine_environment=EMBEDDER, supervision=Supervision(max_in_flight=2)) as running:
        status, answer = running.post("/v1/embeddings", {"input": ["a", "b", "c"]})
        assert status == 200, answer
        assert [item["embedding"] for item in answer["data"]] == [numbers(list(t), 8) for t in (b"a", b"b", b"c")]
        with held(running, b'{"input": "!wait"}'):
            status, answer = running.post("/v1/embeddings", {"input": ["a", "b"]})
            assert (status, answer["error"]["code"]) == (429, "queue_full")
            assert len(submitted(running)) == 4  # of that call, none
        assert value(running, "vllm:admission_rejections_total", "queue_full") == 1


@pytest.mark.parametrize("told", ["3", "1024"])
def test_a_call_of_more_than_the_engines_queue_takes(serving, numbers, told):
    """Whether the engine said so or, as when others use it as well, refuses what the front end took for little."""
    environment = EMBEDDER | {"FAKE_ENGINE_QUEUE": "3", "FAKE_ENGINE_QUEUE_TOLD": told}
    with serving(engine_environment=environment) as running:
        status, answer = running.post("/v1/embeddings", {"input": [[index] for index in range(40)]})
        assert status == 200, answer
        assert [item["embedding"] for item in answer["data"]] == [numbers([index], 8) for index in range(40)]
        assert told != "3" or len(submitted(running)) == 40
        assert value(running, "vllm:admission_rejections_total", "queue_full") == 0


def test_a_call_of_more_tokens_than_the_engines_queue_takes(serving, numbers):
    with serving(engine_environment=EMBEDDER | {"FAKE_ENGINE_TOKENS_TOLD": "10"}) as running:
        given = [[1] * 6, [2] * 4, [3] * 12, [4]]
        answer = running.post("/v1/embeddings", {"input": given})[1]
        assert [item["embedding"] for item in answer["data"]] == [numbers(each, 8) for each in given]


def test_a_queue_that_others_fill_refuses_the_call(serving):
    with serving(engine_environment=EMBEDDER | {"FAKE_ENGINE_QUEUE": "1"}) as running:
        with held(running, b'{"input": "!wait"}'):
            status, answer = running.post("/v1/embeddings", {"input": ["a", "b"]})
            assert (status, answer["error"]["code"]) == (429, "queue_full")
        running.until(lambda: any(event[0] == "cancel" for event in running.events()), "the cancel")
        assert running.post("/v1/embeddings", {"input": ["a", "b"]})[0] == 200


def test_tenant_priority_and_deadline_reach_the_engine(embedder):
    body = {"input": "a", "priority": -3}
    assert embedder.post("/v1/embeddings", body, x_quire_tenant="team-a")[0] == 200
    assert [event for event in embedder.events() if event[0] == "submit"][-1][2:] == ["team-a", "-3"]


@pytest.mark.parametrize("spell", ["!nan", "!none"])
def test_a_broken_result_is_the_servers_fault(embedder, spell):
    status, answer = embedder.post("/v1/embeddings", {"input": spell})
    assert (status, answer["error"]["code"]) == (500, "engine_error")


def test_an_engine_that_dies_is_replaced_and_the_call_answered(serving, numbers):
    with serving(engine_environment=EMBEDDER) as running:
        answer = running.post("/v1/embeddings", {"input": ["abc", "!crash"]})[1]
        assert [item["embedding"] for item in answer["data"]] == [numbers(list(t), 8) for t in (b"abc", b"!crash")]
        assert len([event for event in running.events() if event[0] == "start"]) == 2


def test_metrics_count_prompts_and_no_generation(embedder):
    counted = {
        "vllm:request_prompt_tokens_sum": 5,
        "vllm:request_prompt_tokens_count": 2,
        "vllm:request_success_total": 2,
        "vllm:e2e_request_latency_seconds_count": 2,
        "vllm:request_queue_time_seconds_count": 2,
        "vllm:request_generation_tokens_count": 0,
        "vllm:time_to_first_token_seconds_count": 0,
        "vllm:request_params_n_count": 0,
    }
    before = {name: value(embedder, name) for name in counted}
    embedder.post("/v1/embeddings", {"input": ["abc", "de"]})
    assert {name: value(embedder, name) - before[name] for name in counted} == counted


def test_many_calls_at_once_do_not_mix(embedder, numbers):
    found: dict[int, list] = {}

    def ask(index: int) -> None:
        answer = embedder.post("/v1/embeddings", {"input": [f"text {index} {part}" for part in range(20)]})[1]
        found[index] = [item["embedding"] for item in answer["data"]]

    threads = [threading.Thread(target=ask, args=(index,)) for index in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index in range(12):
        assert found[index] == [numbers(list(f"text {index} {part}".encode()), 8) for part in range(20)]
