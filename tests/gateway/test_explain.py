"""What is told of a routing decision, and the gateway's own metrics."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import pytest
import structlog
from prometheus_client.parser import text_string_to_metric_families

from quire.gateway import explain
from quire.gateway.endpoint import Endpoint, Pool
from quire.gateway.explain import Explainer
from quire.gateway.metrics import MAX_NAMES, GatewayMetrics
from quire.gateway.plugin import Conclusion
from quire.gateway.request import Api, InferenceRequest, Outcome, Prediction
from quire.gateway.schedule import Choice, FilterTrace, ProfileTrace, ScoreTrace

A, B = Endpoint("a", "127.0.0.1", 1), Endpoint("b", "127.0.0.1", 2)


def request(number: int = 0, model: str = "m") -> InferenceRequest:
    made = InferenceRequest(
        id=f"r{number}", path="/", api=Api.CHAT, model=model, body=b"{}", headers={}, arrived=1.0, prompt_tokens=50
    )
    made.predictions = {A.key: Prediction(0.2, 0.01), B.key: Prediction(0.5, 0.02)}
    return made


def choice() -> Choice:
    scores = [
        ScoreTrace("prefix", 3.0, [1.0, 0.0], [{"tokens": 48}, {"tokens": 0}]),
        ScoreTrace("queue", 1.0, [0.0, 0.5], None),
    ]
    trace = ProfileTrace(
        "default", [FilterTrace("role", ["default/p"])], [A.key, B.key], scores, [3.0, 0.5], [A.key, B.key]
    )
    return Choice(Conclusion([A, B]), [trace])


def test_the_record_says_who_lost_and_why_and_what_came_of_it() -> None:
    now = 1.5
    explainer = Explainer(10, lambda: now)
    one = request()
    explainer.chosen(one, choice())
    explainer.sent(one, A, choice().conclusion)
    explainer.first_byte(one, A, 0.25)
    explainer.finished(one, A, Outcome(status=200, finished=3.0, output_tokens=7, cached_tokens=48))
    told = explainer.explain("r0")
    assert told is not None
    profile = told["choices"][0]["profiles"][0]
    assert profile["filtered_out"] == {"role": ["default/p"]}
    winner, loser = profile["candidates"]
    assert winner["scores"]["prefix"] == {"score": 1.0, "weight": 3.0, "details": {"tokens": 48}}
    assert "why_not" not in winner
    assert loser["why_not"] == "2.500 behind, 3.000 of it by prefix: 0.000 against 1.000"
    assert loser["if_sent_here"] == {"ttft": "+0.3000 s"}
    (attempt,) = told["attempts"]
    assert (attempt["predicted_ttft"], attempt["ttft"], attempt["seconds"]) == (0.2, 0.25, 1.5)


def test_requests_of_one_id_have_a_record_each_and_the_newest_is_told_of() -> None:
    now = 1.0
    explainer = Explainer(10, lambda: now)
    first, second = request(model="first"), request(model="second")
    explainer.chosen(first, choice())
    explainer.sent(first, A, choice().conclusion)
    explainer.chosen(second, choice())
    explainer.sent(second, A, choice().conclusion)
    explainer.chosen(second, choice())
    explainer.sent(second, B, choice().conclusion)
    explainer.first_byte(first, A, 0.25)
    explainer.finished(first, A, Outcome(status=200, output_tokens=7))
    explainer.finished(second, A, Outcome(status=None, error="connect"))
    told = explainer.explain("r0")
    assert told is not None
    assert (told["model"], len(told["choices"])) == ("second", 2)
    assert [(one["endpoint"], one.get("ttft"), one.get("error")) for one in told["attempts"]] == [
        (A.key, None, "connect"),
        (B.key, None, None),
    ]
    again = request(model="third")
    explainer.dropped(again, "no room")
    told = explainer.explain("r0")
    assert told is not None
    assert (told["model"], told["dropped"], told["attempts"]) == ("third", "no room", [])


def test_an_id_that_comes_again_is_as_new_as_it_is() -> None:
    explainer = Explainer(3, lambda: 0.0)
    for number in (0, 1, 2, 0, 3, 4):
        explainer.chosen(request(number), choice())
    assert [number for number in range(5) if explainer.explain(f"r{number}")] == [0, 3, 4]


def test_what_is_not_told_is_not_worked_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Details and the log's line take longer than choosing does, and few are ever looked at."""
    looked: list[int] = []

    class Details(Sequence[object]):
        def __len__(self) -> int:
            return 2

        def __getitem__(self, index: Any) -> object:
            looked.append(index)
            return {"index": index}

    trace = ProfileTrace(
        "default", [], [A.key, B.key], [ScoreTrace("s", 1.0, [1.0, 0.0], Details())], [1.0, 0.0], [A.key]
    )
    one, explainer = request(), Explainer(10, lambda: 0.0)
    monkeypatch.setattr(explain, "_log_fields", lambda *_: looked.append(-1) or {})
    level = structlog.get_config()["wrapper_class"]
    for wrapper, seen in ((structlog.make_filtering_bound_logger(logging.INFO), []), (level, [-1])):
        structlog.configure(wrapper_class=wrapper)
        explainer.chosen(one, Choice(Conclusion([A]), [trace]))
        explainer.sent(one, A, Conclusion([A]))
        with structlog.testing.capture_logs():
            explainer.finished(one, A, Outcome(status=200))
        assert looked == seen
    told = explainer.explain("r0")
    assert told is not None
    shown = told["choices"][0]["profiles"][0]["candidates"]
    assert [one["scores"]["s"]["details"] for one in shown] == [{"index": 0}, {"index": 1}]


def test_only_so_many_are_remembered() -> None:
    explainer = Explainer(3, lambda: 0.0)
    for number in range(10):
        explainer.chosen(request(number), choice())
    assert [number for number in range(10) if explainer.explain(f"r{number}")] == [7, 8, 9]
    explainer.finished(request(0), A, Outcome(status=200))
    silent = Explainer(0, lambda: 0.0)
    silent.chosen(request(), choice())
    assert silent.explain("r0") is None


def test_metrics_are_a_page_that_prometheus_reads_and_names_are_bounded() -> None:
    pool = Pool()
    pool.put(A)
    metrics = GatewayMetrics(pool, lambda: 0.0)
    for number in range(MAX_NAMES + 5):
        metrics.arrived(request(number, f"model-{number}"))
    one = request()
    metrics.sent(one, A, choice().conclusion)
    metrics.finished(one, A, Outcome(status=None, error="connect"))
    metrics.watch("quire_gateway_queue_size", "…", lambda: {"0": 3.0}, "priority")
    families = {family.name: family for family in text_string_to_metric_families(metrics.text().decode())}
    models = {sample.labels["model_name"] for sample in families["llm_d_epp_request"].samples}
    assert len(models) <= MAX_NAMES + 1
    assert "other" in models
    assert [s.value for s in families["llm_d_epp_ready_endpoints"].samples] == [1.0]
    assert [s.value for s in families["quire_gateway_queue_size"].samples] == [3.0]
    failures = [s for s in families["quire_gateway_endpoint_failures"].samples if s.name.endswith("_total")]
    assert [(s.labels["endpoint"], s.labels["error"], s.value) for s in failures] == [("default/a", "connect", 1.0)]
