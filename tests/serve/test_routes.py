"""The smaller routes: models, tokens, health, metrics, version, docs; and the API key on all of them."""

from __future__ import annotations

import json
from html.parser import HTMLParser

import jsonschema
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

import quire
from quire.serve.openapi import OPERATIONS, describe
from quire.serve.supervision import Supervision


def test_models(served):
    models = served.client().models.list().data
    assert [model.id for model in models] == ["tiny", "tiny-alias"]
    assert models[0].model_extra["max_model_len"] == 4096
    assert served.client().models.retrieve("tiny").owned_by == "quire"
    with pytest.raises(openai.NotFoundError):
        served.client().models.retrieve("other")


def test_tokenize_and_back(served):
    status, answer = served.post("/tokenize", {"prompt": "hi ß", "return_token_strs": True})
    assert status == 200
    assert answer["tokens"] == list("hi ß".encode())
    assert answer["count"] == 5
    assert answer["max_model_len"] == 4096
    assert answer["token_strs"][:3] == ["h", "i", " "]
    assert served.post("/detokenize", {"tokens": answer["tokens"]}) == (200, {"prompt": "hi ß"})


def test_tokenize_a_conversation(served):
    status, answer = served.post("/tokenize", {"messages": [{"role": "user", "content": "x"}]})
    assert status == 200
    assert bytes(token for token in answer["tokens"] if token < 256) == b"user\nx\nassistant\n"


def test_tokenize_wants_one_of_two(served):
    for body in ({}, {"prompt": "x", "messages": [{"role": "user", "content": "x"}]}):
        assert served.post("/tokenize", body)[0] == 400
    assert served.post("/detokenize", {"tokens": [9999]})[0] == 400


def test_health_ready_version(served):
    for path in ("/health", "/ready"):
        status, body = served.get(path)
        assert (status, json.loads(body)["status"]) == (200, "ok")
    assert json.loads(served.get("/version")[1]) == {"version": quire.__version__}


VLLM_METRICS = [
    "num_requests_running",
    "num_requests_waiting",
    "kv_cache_usage_perc",
    "prefix_cache_queries",
    "prefix_cache_hits",
    "num_preemptions",
    "prompt_tokens",
    "generation_tokens",
    "iteration_tokens_total",
    "request_success",
    "admission_rejections",
    "time_to_first_token_seconds",
    "inter_token_latency_seconds",
    "request_time_per_output_token_seconds",
    "e2e_request_latency_seconds",
    "request_queue_time_seconds",
    "request_prefill_time_seconds",
    "request_decode_time_seconds",
    "request_inference_time_seconds",
    "request_prompt_tokens",
    "request_generation_tokens",
    "request_max_num_generation_tokens",
    "request_params_n",
    "request_num_preemptions",
    "request_prefill_kv_computed_tokens",
    "request_params_max_tokens",
    "cache_config_info",
]


def families(served) -> dict:
    return {family.name: family for family in text_string_to_metric_families(served.get("/metrics")[1].decode())}


def value(served, name: str, **labels: str) -> float:
    family = families(served)[name.removesuffix("_total").removesuffix("_count").removesuffix("_sum")]
    return sum(
        sample.value for sample in family.samples if sample.name == name and labels.items() <= sample.labels.items()
    )


def test_metrics_have_vllms_names(served):
    found = families(served)
    assert {f"vllm:{name}" for name in VLLM_METRICS} <= found.keys()
    for family in found.values():
        for sample in family.samples:
            assert sample.labels.get("model_name") == "tiny" or family.name.startswith("quire_http_requests")


def test_labels_are_vllms(served):
    for family in families(served).values():
        for sample in family.samples:
            assert sample.labels.get("engine") == "0" or family.name.startswith("quire_http_requests")


def test_every_end_is_there_before_the_first_request(serving):
    with serving() as running:
        ends = {s.labels["finished_reason"]: s.value for s in families(running)["vllm:request_success"].samples}
    assert {reason: ends[reason] for reason in ("stop", "length", "abort", "error")} == dict.fromkeys(ends, 0.0)


def test_n_samples_are_one_request_in_vllms_histograms(served):
    counted = {
        "vllm:request_params_n_count": 2,
        "vllm:request_params_n_sum": 6,
        "vllm:request_max_num_generation_tokens_count": 2,
        "vllm:request_max_num_generation_tokens_sum": 8,
        "vllm:request_generation_tokens_count": 6,
        "vllm:request_num_preemptions_count": 6,
        "vllm:request_prefill_kv_computed_tokens_sum": 3 * (4 + 3),  # of 20 and 3 tokens; the fake caches by 16
    }
    before = {name: value(served, name) for name in counted}
    served.client().completions.create(model="tiny", prompt=["a" * 20, "abc"], max_tokens=4, n=3)
    assert {name: value(served, name) - before[name] for name in counted} == counted


def test_what_is_refused_before_it_is_submitted_is_no_abort(serving):
    with serving(supervision=Supervision(max_in_flight=1)) as running:
        assert running.post("/v1/completions", {"prompt": "abc", "n": 2})[0] == 429
        assert value(running, "vllm:admission_rejections_total", reason="queue_full") == 1
        assert value(running, "vllm:request_success_total", finished_reason="abort") == 0


def test_metrics_count(served):
    counted = {
        "vllm:request_generation_tokens_sum": 7,
        "vllm:request_prompt_tokens_sum": 3,
        "vllm:request_success_total": 1,
        "vllm:time_to_first_token_seconds_count": 1,
        "vllm:inter_token_latency_seconds_count": 6,
        "vllm:e2e_request_latency_seconds_count": 1,
        "vllm:request_params_n_count": 1,
        "vllm:request_params_max_tokens_sum": 7,
        "vllm:request_max_num_generation_tokens_sum": 7,
        "vllm:request_decode_time_seconds_count": 1,
    }
    before = {name: value(served, name) for name in counted}
    served.client().completions.create(model="tiny", prompt="abc", max_tokens=7)
    assert {name: value(served, name) - before[name] for name in counted} == counted


def test_a_request_that_a_stop_string_ends_is_in_the_histograms_of_phases(served):
    phases = [f"vllm:request_{phase}_time_seconds_count" for phase in ("queue", "prefill", "decode", "inference")]
    before = [value(served, phase) for phase in phases]
    answer = served.client().completions.create(model="tiny", prompt="!word", stop="end", max_tokens=1000)
    assert answer.choices[0].finish_reason == "stop"
    assert [value(served, phase) for phase in phases] == [count + 1 for count in before]


def test_rejections_are_counted(served):
    before = value(served, "vllm:admission_rejections_total", reason="queue_full")
    served.post("/v1/completions", {"prompt": "!full"})
    assert value(served, "vllm:admission_rejections_total", reason="queue_full") == before + 1


def test_http_requests_are_counted_by_route(served):
    before = value(served, "quire_http_requests_total", route="/v1/models/{model:path}", status="404")
    served.get("/v1/models/a")
    served.get("/v1/models/b")
    assert value(served, "quire_http_requests_total", route="/v1/models/{model:path}", status="404") == before + 2


def test_counters_survive_an_engine(serving):
    with serving() as running:

        def tokens() -> float:
            return value(running, "vllm:generation_tokens_total")

        running.client().completions.create(model="tiny", prompt="abc", max_tokens=7)
        running.until(lambda: tokens() == 7, "the engine's statistics")
        running.kill_engine()
        running.client().completions.create(model="tiny", prompt="abc", max_tokens=5)
        running.until(lambda: tokens() == 12, "the new engine's statistics")


def test_openapi_is_valid_and_complete(served):
    document = json.loads(served.get("/openapi.json")[1])
    assert document == json.loads(json.dumps(describe(OPERATIONS, with_key=False)))
    for schema in document["components"]["schemas"].values():
        jsonschema.Draft202012Validator.check_schema(schema)
    for path, item in document["paths"].items():
        for method in item:
            if "{" not in path:
                status = served.get(path)[0] if method == "get" else served.post(path, {})[0]
                assert status not in (404, 405), path


class ScriptCollector(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []
        self.data: list[str] = []
        self.collecting = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.links.extend(value or "" for name, value in attrs if name in ("src", "href"))
        self.collecting = ("type", "application/json") in attrs

    def handle_data(self, data: str) -> None:
        if self.collecting:
            self.data.append(data)


def test_docs_page_needs_nothing_from_elsewhere(served):
    status, page = served.get("/docs")
    assert status == 200
    parser = ScriptCollector()
    parser.feed(page.decode())
    assert parser.links == ["openapi.json"]
    embedded = json.loads("".join(parser.data).replace("<\\/", "</"))
    assert embedded == json.loads(served.get("/openapi.json")[1])


@pytest.fixture(scope="module")
def guarded(serving):
    with serving(api_key="secret-ß") as running:
        yield running


def test_every_route_but_health_wants_the_key(guarded):
    document = describe(OPERATIONS, with_key=True)
    for path, item in [*document["paths"].items(), ("/nothing", {"get": {}}), ("/health/x", {"get": {}})]:
        wanted = 200 if path == "/health" else 401
        for method in item:
            status = guarded.get(path)[0] if method == "get" else guarded.post(path, {})[0]
            assert status == wanted, path


@pytest.mark.parametrize("header", ["Bearer", "Bearer ", "Bearer wrong", "Basic secret", "secret", "Bearer secret"])
def test_wrong_keys(guarded, header):
    status, answer = guarded.post("/v1/completions", {"prompt": "x"}, authorization=header)
    assert (status, answer["error"]["code"]) == (401, "invalid_api_key")
    assert "secret" not in answer["error"]["message"]


def test_the_right_key(guarded):
    for scheme in ("Bearer", "bearer"):
        key = f"{scheme} secret-ß".encode().decode("latin-1")
        assert guarded.post("/v1/completions", {"prompt": "x"}, authorization=key)[0] == 200
    with pytest.raises(openai.AuthenticationError):
        guarded.client(api_key="wrong").models.list()
