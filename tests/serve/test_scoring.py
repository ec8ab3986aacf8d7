"""/score and /rerank, over engines whose numbers are known."""

from __future__ import annotations

import json
import math
import shutil

import pytest
import tokenizers
from tokenizers import processors

from quire.serve import pooling

DOCUMENTS = ["one", "two", "three", "four", "five"]
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'system' %}I: {{ m.content }}\n{% endif %}"
    "{% if m.role == 'query' %}Q: {{ m.content }}\n{% endif %}{% if m.role == 'document' %}D: {{ m.content }}\n"
    "{% endif %}{% endfor %}{% if tone %}tone {{ tone }}\n{% endif %}A:"
)
SCORER = {"tasks": ["score"], "embedding_size": 0}


@pytest.fixture(scope="module")
def templated(serving, model_dir, tmp_path_factory):
    directory = shutil.copytree(model_dir, tmp_path_factory.mktemp("templated") / "model")
    (directory / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE, "eos_token": "<eos>"}))
    environment = {"FAKE_ENGINE_POOLING": json.dumps(SCORER | {"pair": "template"}), "FAKE_ENGINE_CONTEXT": "100"}
    with serving(model_dir=directory, engine_environment=environment) as running:
        yield running


@pytest.fixture(scope="module")
def joined_dir(model_dir, tmp_path_factory):
    """A tokenizer that joins pairs as BERT's does, with type ids."""
    directory = shutil.copytree(model_dir, tmp_path_factory.mktemp("joined") / "model")
    backend = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
    backend.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>",
        pair="<bos> $A <eos> $B:1 <eos>:1",
        special_tokens=[("<bos>", 256), ("<eos>", 257)],
    )
    backend.save(str(directory / "tokenizer.json"))
    return directory


@pytest.fixture(scope="module")
def joined(serving, joined_dir):
    environment = {"FAKE_ENGINE_POOLING": json.dumps(SCORER | {"pair": "tokens"}), "FAKE_ENGINE_CONTEXT": "100"}
    environment["FAKE_ENGINE_TOKEN_TYPES"] = "2"
    with serving(model_dir=joined_dir, engine_environment=environment) as running:
        yield running


@pytest.fixture(scope="module")
def pair_tokens(joined_dir):
    backend = tokenizers.Tokenizer.from_file(str(joined_dir / "tokenizer.json"))

    def encode(first: str, second: str, room: int | None = None) -> dict:
        if room is not None:
            backend.enable_truncation(room)
        made = backend.encode(first, second)
        backend.no_truncation()
        return {"token_ids": made.ids, "token_type_ids": made.type_ids}

    return encode


def test_one_against_several(joined, numbers, pair_tokens):
    status, answer = joined.post("/score", {"text_1": "q", "text_2": DOCUMENTS, "use_activation": False})
    assert status == 200, answer
    assert answer["object"] == "list"
    wanted = [numbers(**pair_tokens("q", each), count=1, task="score", activation=False)[0] for each in DOCUMENTS]
    assert answer["data"] == [{"index": i, "object": "score", "score": score} for i, score in enumerate(wanted)]
    tokens = sum(len(pair_tokens("q", each)["token_ids"]) for each in DOCUMENTS)
    assert answer["usage"] == {"prompt_tokens": tokens, "total_tokens": tokens}


def test_a_model_without_token_types_gets_none(serving, joined_dir, numbers, pair_tokens):
    environment = {"FAKE_ENGINE_POOLING": json.dumps(SCORER | {"pair": "tokens"}), "FAKE_ENGINE_TOKEN_TYPES": "1"}
    with serving(model_dir=joined_dir, engine_environment=environment) as running:
        answer = running.post("/score", {"text_1": "a", "text_2": "b"})[1]
        assert answer["data"][0]["score"] == numbers(pair_tokens("a", "b")["token_ids"], 1, task="score")[0]


def test_as_many_as_there_are(joined, numbers, pair_tokens):
    queries = ["a", "b", "c", "d", "e"]
    pairs = zip(queries, DOCUMENTS, strict=True)
    wanted = [numbers(**pair_tokens(*pair), count=1, task="score")[0] for pair in pairs]
    for first, second in (("text_1", "text_2"), ("queries", "documents"), ("queries", "items"), ("data_1", "data_2")):
        answer = joined.post("/v1/score", {first: queries, second: DOCUMENTS})[1]
        assert [item["score"] for item in answer["data"]] == wanted


def test_a_pair_that_is_too_long(joined, numbers, pair_tokens):
    status, answer = joined.post("/score", {"text_1": "q" * 40, "text_2": ["short", "d" * 80]})
    assert (status, answer["error"]["code"]) == (400, "context_length_exceeded")
    assert "text_2[1] with its query has 123 tokens" in answer["error"]["message"]
    assert answer["error"]["param"] == "text_2"
    answer = joined.post("/score", {"text_1": "q" * 40, "text_2": ["d" * 80], "truncate_prompt_tokens": -1})[1]
    kept = pair_tokens("q" * 40, "d" * 80, 100)
    assert answer["data"][0]["score"] == numbers(**kept, count=1, task="score")[0]
    assert answer["usage"]["prompt_tokens"] == 100


@pytest.mark.parametrize("path", ["/rerank", "/v1/rerank", "/v2/rerank"])
def test_rerank(joined, numbers, pair_tokens, path):
    scores = [numbers(**pair_tokens("q", each), count=1, task="score")[0] for each in DOCUMENTS]
    order = sorted(range(5), key=lambda index: scores[index], reverse=True)
    answer = joined.post(path, {"query": "q", "documents": DOCUMENTS})[1]
    assert answer["results"] == [
        {"index": i, "relevance_score": scores[i], "document": {"text": DOCUMENTS[i]}} for i in order
    ]
    assert answer["id"].startswith("rerank-")
    assert answer["model"] == "tiny"
    objects = [{"text": text} for text in DOCUMENTS]
    body = {"query": "q", "documents": objects, "top_n": 2, "return_documents": False}
    answer = joined.post(path, body)[1]
    assert answer["results"] == [{"index": i, "relevance_score": scores[i]} for i in order[:2]]
    for top_n in (0, 99):
        assert len(joined.post(path, body | {"top_n": top_n})[1]["results"]) == 5


def test_equal_documents_stay_in_order(joined):
    answer = joined.post("/rerank", {"query": "q", "documents": ["same", "other", "same", "same"]})[1]
    order = [item["index"] for item in answer["results"]]
    assert [index for index in order if index != 1] == [0, 2, 3]
    scores = [item["relevance_score"] for item in answer["results"]]
    assert scores == sorted(scores, reverse=True)


def test_documents_are_cut(joined, numbers, pair_tokens):
    body = {"query": "q", "documents": ["abcdef"], "max_tokens_per_doc": 3}
    answer = joined.post("/rerank", body)[1]
    assert answer["results"][0]["relevance_score"] == numbers(**pair_tokens("q", "abc"), count=1, task="score")[0]
    assert answer["results"][0]["document"]["text"] == "abcdef"


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/score", {}, "text_1"),
        ("/score", {"text_1": "a"}, "text_1"),
        ("/score", {"text_1": "a", "documents": "b"}, "text_1"),
        ("/score", {"text_1": "a", "text_2": "b", "items": "c"}, "text_1"),
        ("/score", {"text_1": [], "text_2": "b"}, "text_1"),
        ("/score", {"text_1": "a", "text_2": []}, "text_2"),
        ("/score", {"queries": ["a", "b"], "documents": ["a", "b", "c"]}, "queries"),
        ("/score", {"queries": ["a", "b"], "documents": "c"}, "queries"),
        ("/score", {"text_1": "a", "text_2": ["b"] * 2049}, "text_2"),
        ("/score", {"text_1": "a" * 17000, "text_2": ["b"] * 1000}, "text_2"),
        ("/score", {"text_1": "a", "text_2": "b", "instruction": "x"}, "instruction"),
        ("/score", {"text_1": "a", "text_2": "b", "truncate_prompt_tokens": 3}, "truncate_prompt_tokens"),
        ("/rerank", {"query": "a", "documents": []}, "documents"),
        ("/rerank", {"query": "a"}, "documents"),
        ("/rerank", {"query": "a", "documents": [{"title": "x"}]}, "documents"),
        ("/rerank", {"query": "a", "documents": ["b"], "top_n": -1}, "top_n"),
        ("/rerank", {"query": "a", "documents": ["b"], "max_tokens_per_doc": 0}, "max_tokens_per_doc"),
        ("/rerank", {"query": "a", "documents": ["b"], "chat_template_kwargs": {"a": 1}}, "chat_template_kwargs"),
    ],
)
def test_what_cannot_be_scored_is_refused_by_name(joined, path, body, param):
    status, answer = joined.post(path, body)
    assert (status, answer["error"]["param"]) == (400, param), answer


@pytest.mark.parametrize("field", ["instruction", "chat_template_kwargs"])
def test_what_goes_into_every_prompt_of_a_template_counts_for_each(templated, monkeypatch, field):
    monkeypatch.setattr(pooling, "MAX_CHARACTERS", 1000)
    long = "x" * 60 if field == "instruction" else {"tone": "x" * 60}
    for count, accepted in ((10, True), (13, True), (20, False)):
        body = {"query": "q", "documents": ["d"] * count, field: long, "truncate_prompt_tokens": 100}
        status, answer = templated.post("/rerank", body)
        assert (status == 200) == accepted, answer
    assert (status, answer["error"]["param"]) == (400, "documents")
    assert "characters in all prompts" in answer["error"]["message"]
    # The same without it.
    assert templated.post("/rerank", {"query": "q", "documents": ["d"] * 20})[0] == 200


# --- pairs through the chat template --------------------------------------------------------------------------------


def test_pairs_through_the_template(templated, numbers):
    for fields, text in (
        ({}, "Q: a\nD: b\nA:"),
        ({"instruction": "judge"}, "I: judge\nQ: a\nD: b\nA:"),
        ({"chat_template_kwargs": {"tone": "dry"}}, "Q: a\nD: b\ntone dry\nA:"),
    ):
        answer = templated.post("/score", {"text_1": "a", "text_2": "b"} | fields)[1]
        assert answer["data"][0]["score"] == numbers(list(text.encode()), 1, task="score")[0]


def test_only_the_document_is_cut_in_a_template(templated, numbers):
    body = {"query": "who?", "documents": ["d" * 200, "short"], "truncate_prompt_tokens": 40}
    answer = templated.post("/rerank", body)[1]
    scores = {item["index"]: item["relevance_score"] for item in answer["results"]}
    text = "Q: who?\nD: " + "d" * (40 - 14) + "\nA:"
    assert len(text) == 40
    assert scores[0] == numbers(list(text.encode()), 1, task="score")[0]
    assert answer["usage"]["prompt_tokens"] == 40 + 19
    status, answer = templated.post("/rerank", body | {"query": "q" * 50})
    assert (status, answer["error"]["param"]) == (400, "truncate_prompt_tokens")
    status, answer = templated.post("/rerank", {"query": "q", "documents": ["d" * 200]})
    assert (status, answer["error"]["code"]) == (400, "context_length_exceeded")
    assert answer["error"]["param"] == "documents"


def test_a_template_that_knows_no_pairs(reranker, numbers):
    # The fixture's template writes every role, and so serves.
    text = "query\na\ndocument\nb\n"
    status, answer = reranker.post("/score", {"text_1": "a", "text_2": "b"})
    assert status == 200
    assert answer["usage"]["prompt_tokens"] == len(text) + 4


def test_a_template_that_leaves_the_pair_out(serving, model_dir, tmp_path):
    directory = shutil.copytree(model_dir, tmp_path / "model")
    template = "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}A:"
    (directory / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    environment = {"FAKE_ENGINE_POOLING": json.dumps(SCORER | {"pair": "template"})}
    with serving(model_dir=directory, engine_environment=environment) as running:
        status, answer = running.post("/score", {"text_1": "query", "text_2": "document"})
        assert (status, answer["error"]["code"]) == (400, "unsupported_task")
        assert "--chat-template" in answer["error"]["message"]


def test_a_template_of_the_operators_joins_pairs(serving, joined_dir, tmp_path, numbers):
    (tmp_path / "pairs.jinja").write_text(TEMPLATE)
    environment = {"FAKE_ENGINE_POOLING": json.dumps(SCORER | {"pair": "tokens"})}
    with serving(
        model_dir=joined_dir, engine_environment=environment, chat_template=tmp_path / "pairs.jinja"
    ) as running:
        answer = running.post("/score", {"text_1": "a", "text_2": "b"})[1]
        assert answer["data"][0]["score"] == numbers(list(b"Q: a\nD: b\nA:"), 1, task="score")[0]


# --- models that embed ----------------------------------------------------------------------------------------------


def test_an_embedder_scores_by_cosine(embedder, numbers):
    def cosine(a: list[float], b: list[float]) -> float:
        return math.fsum(x * y for x, y in zip(a, b, strict=True)) / math.hypot(*a) / math.hypot(*b)

    query, documents = numbers(list(b"q"), 8), [numbers(list(text.encode()), 8) for text in DOCUMENTS]
    before = len(embedder.events())
    answer = embedder.post("/score", {"text_1": "q", "text_2": DOCUMENTS})[1]
    assert len(embedder.events()) - before == 6  # the query once
    assert [item["score"] for item in answer["data"]] == pytest.approx([cosine(query, each) for each in documents])
    assert answer["usage"]["prompt_tokens"] == 1 + sum(map(len, DOCUMENTS))
    answer = embedder.post("/score", {"text_1": DOCUMENTS, "text_2": DOCUMENTS})[1]
    assert [item["score"] for item in answer["data"]] == pytest.approx([1.0] * 5)
    status, answer = embedder.post("/rerank", {"query": "q", "documents": ["a"], "instruction": "x"})
    assert (status, answer["error"]["param"]) == (400, "instruction")


def test_one_failing_pair_fails_the_call_and_cancels_the_rest(joined):
    status, answer = joined.post("/rerank", {"query": "q", "documents": ["!wait", "!refuse"]})
    assert (status, answer["error"]["code"]) == (400, "context_length_exceeded")
    waiting = [event[1] for event in joined.events() if event[0] == "submit"][-2]
    joined.until(lambda: ["cancel", waiting] in joined.events(), "the cancel of the other pair")
