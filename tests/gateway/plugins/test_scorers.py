"""Scores by hand, from each scorer's definition; and that they are shares whatever endpoints say."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from quire.core.errors import ConfigError
from quire.gateway.endpoint import Load
from quire.gateway.plugin import Conclusion, Scorer
from quire.gateway.plugins.stock import SCORERS
from quire.gateway.request import Prediction

REQUIRED: dict[str, dict[str, Any]] = {
    "header-label-affinity-scorer": {"headerName": "X-Zone", "labelKey": "zone"},
    "endpoint-attribute-scorer": {"attributeKey": "custom.x", "algorithm": {"type": "linear_lower_is_better"}},
}


def test_reports(make: Any, endpoint: Any, request_for: Any) -> None:
    three = [endpoint("a", waiting=0, running=8, kv_usage=0.25), endpoint("b", waiting=3, running=4, kv_usage=1.0)]
    three += [endpoint("c", waiting=12, running=0, kv_usage=0.0)]
    request = request_for()
    assert make("queue-scorer").score(request, three) == [1.0, 0.75, 0.0]
    assert make("queue-scorer").score(request, three[:1]) == [1.0]
    assert make("running-requests-size-scorer").score(request, three) == [0.0, 0.5, 1.0]
    assert make("kv-cache-utilization-scorer").score(request, three) == [0.75, 0.0, 1.0]
    assert make("load-aware-scorer", threshold=6).score(request, three) == [0.5, 0.25, 0.0]
    assert make("load-aware-scorer", threshold=0).score(request, three) == [0.5, 0.5 * 125 / 128, 0.5 * 116 / 128]


WAITING = {"attributeKey": "waiting-queue", "algorithm": {"type": "linear_lower_is_better"}}


@pytest.mark.parametrize(
    ("type_name", "parameters"),
    [
        ("queue-scorer", {}),
        ("running-requests-size-scorer", {}),
        ("kv-cache-utilization-scorer", {}),
        ("load-aware-scorer", {}),
        ("latency-scorer", {}),
        ("lora-affinity-scorer", {}),
        ("endpoint-attribute-scorer", WAITING),
    ],
)
def test_who_fell_silent_while_idle_counts_as_the_mean_of_the_others(
    make: Any, endpoint: Any, request_for: Any, type_name: str, parameters: dict[str, Any]
) -> None:
    scorer, request = make(type_name, **parameters), request_for(matches={})
    idle = {"waiting": 0, "running": 0, "kv_usage": 0.0, "active_adapters": frozenset({"m"})}
    busy = {"waiting": 20, "running": 40, "kv_usage": 0.5, "active_adapters": frozenset()}
    half = {"waiting": 10, "running": 20, "kv_usage": 0.25, "waiting_adapters": frozenset({"m"})}
    old, never = endpoint("c", time=-5.1, **idle), endpoint("d")
    best, worst, *others = scorer.score(
        request, [endpoint("a", **idle), endpoint("b", **busy), old, never, endpoint("e", time=-4.9, **half)]
    )
    assert worst < min(others) <= max(others) < best
    assert others[0] == others[1]
    alike = scorer.score(request, [old, never])
    assert alike[0] == alike[1]


def test_what_is_open(make: Any, endpoint: Any, request_for: Any) -> None:
    loads = [Load(requests=0), Load(requests=1, tokens=1024), Load(requests=4, tokens=5000)]
    three = [endpoint(name, load=load) for name, load in zip("abc", loads, strict=True)]
    request = request_for()
    assert make("active-request-scorer").score(request, three) == [1.0, 0.75, 0.0]
    assert make("active-request-scorer", idleThreshold=1, maxBusyScore=0.5).score(request, three) == [1.0, 1.0, 0.0]
    assert make("active-request-scorer", maxBusyScore=0.5).score(request, three) == [1.0, 0.375, 0.0]
    assert make("token-load-scorer", queueThresholdTokens=4096).score(request, three) == [1.0, 0.75, 0.0]


def test_adapters(make: Any, endpoint: Any, request_for: Any) -> None:
    full = {"max_lora": 1, "active_adapters": frozenset({"x"})}
    four = [endpoint("a", max_lora=1, active_adapters=frozenset({"m"})), endpoint("b", max_lora=1)]
    four += [endpoint("c", waiting_adapters=frozenset({"m"}), **full), endpoint("d", **full)]
    assert make("lora-affinity-scorer").score(request_for(), four) == [1.0, 0.8, 0.6, 0.0]


def test_prefixes(make: Any, endpoint: Any, request_for: Any) -> None:
    three = [endpoint(name) for name in "abc"]
    request = request_for(matches={"a": 1000, "b": 250})
    assert make("prefix-cache-scorer").score(request, three) == [1.0, 0.25, 0.0]
    assert make("prefix-cache-scorer", prefixMatchInfoProducerName="q").score(request, three) == [0.0, 0.0, 0.0]
    weighted = make("prefix-cache-scorer", prefixLengthWeight=0.5, maxModelLen=2000).score(request, three)
    assert weighted == [0.5 * 0.25 + 0.5, 0.5 * 0.015625 + 0.125, 0.0]
    with pytest.raises(ConfigError):
        make("prefix-cache-scorer", prefixLengthWeight=2)


def test_cold_prompts_go_round(make: Any, endpoint: Any, request_for: Any) -> None:
    three = [endpoint(name) for name in "abc"]
    scorer = make("no-hit-lru-scorer")
    cold, warm = request_for(matches={}), request_for(matches={"b": 64})
    assert scorer.score(cold, three) == [1.0, 0.5, 0.0]
    scorer.sent(cold, three[0], Conclusion(three[:1]))
    assert scorer.score(cold, three) == [0.0, 1.0, 0.5]
    scorer.sent(warm, three[1], Conclusion(three[1:2]))
    assert scorer.score(cold, three) == [0.0, 1.0, 0.5]
    assert scorer.score(warm, three) == [0.5, 0.5, 0.5]


def test_lengths(make: Any, endpoint: Any, request_for: Any) -> None:
    labels = ["0-2000", "1000-1000", "2000-4000", "x", "9-1", None]
    some = [
        endpoint(chr(97 + index), labels={} if label is None else {"llm-d.ai/context-length-range": label})
        for index, label in enumerate(labels)
    ]
    expected = [0.3 + 0.7 * (0.7 / 1.2 + 0.3 * 0.5), 1.0, 0.15, 0.0, 0.0, 0.5]
    assert make("context-length-aware").score(request_for(), some) == pytest.approx(expected)
    left = make("context-length-aware", enableFiltering=True).filter(request_for(), some)
    assert [one.name for one in left] == ["a", "b", "f"]
    assert make("context-length-aware").filter(request_for(), some) == some


def test_headers_and_attributes(make: Any, endpoint: Any, request_for: Any) -> None:
    three = [endpoint("a", labels={"zone": "x"}), endpoint("b", labels={"zone": "y"}), endpoint("c")]
    affinity = make("header-label-affinity-scorer", **REQUIRED["header-label-affinity-scorer"])
    assert affinity.score(request_for(headers={"x-zone": "y"}), three) == [0.0, 1.0, 0.0]
    assert affinity.score(request_for(), three) == [0.0, 0.0, 0.0]
    for one, number in zip(three, (10, 30, 20), strict=True):
        one.attributes["custom.x"] = number
    lower = make("endpoint-attribute-scorer", **REQUIRED["endpoint-attribute-scorer"])
    assert lower.score(request_for(), three) == [1.0, 0.0, 0.5]
    algorithm = {"type": "linear_higher_is_better", "normalization": {"fixedRange": {"min": 0, "max": 20}}}
    fixed = make("endpoint-attribute-scorer", attributeKey="custom.x", algorithm=algorithm)
    assert fixed.score(request_for(), three) == [0.5, 1.0, 1.0]
    del three[0].attributes["custom.x"]
    assert lower.score(request_for(), three) == [0.0, 0.0, 1.0]


def test_sessions(make: Any, endpoint: Any, request_for: Any) -> None:
    two = [endpoint("a"), endpoint("b")]
    scorer, choice = make("session-affinity-scorer"), Conclusion(two)
    scorer.sent(request_for(), two[1], choice)
    again = request_for(headers=choice.response_headers)
    assert scorer.score(again, two) == [0.0, 1.0]
    assert make("session-affinity-filter").filter(again, two) == two[1:]
    for nonsense in ("?", "//8=", ""):
        assert scorer.score(request_for(headers={"x-session-token": nonsense}), two) == [0.0, 0.0]


@pytest.mark.parametrize(
    ("strategy", "predictions", "expected"),
    [
        # (TTFT, TPOT) predicted, objectives 1.0 and 0.1; who misses gets 0 where somebody does not.
        ("least", [(0.9, 0.05), (0.1, 0.05), (1.5, 0.05)], [1.0, 0.01, 0.0]),
        ("most", [(0.9, 0.05), (0.1, 0.05), (1.5, 0.05)], [0.01, 1.0, 0.0]),
        # All miss: TPOT alone is milder than TTFT alone, and that than both; in one kind the nearest is best.
        ("most", [(2.0, 0.05), (0.5, 0.2), (3.0, 0.3)], [0.0, 0.51, 0.0]),
        ("most", [(2.0, 0.05), (3.0, 0.05), (3.0, 0.3)], [1.0, 0.01, 0.0]),
    ],
)
def test_latency(
    make: Any, endpoint: Any, request_for: Any, strategy: str, predictions: list[tuple[float, float]], expected: Any
) -> None:
    three = [endpoint(name, load=Load(requests=1)) for name in "abc"]
    known = {f"default/{name}": Prediction(*one) for name, one in zip("abc", predictions, strict=True)}
    request = request_for(slo_ttft=1.0, slo_tpot=0.1, predictions=known)
    scorer = make("latency-scorer", headroomSelectionStrategy=strategy)
    assert scorer.score(request, three) == pytest.approx(expected)


def test_latency_prefers_the_idle_and_does_without_predictions(make: Any, endpoint: Any, request_for: Any) -> None:
    two = [endpoint("a", load=Load(requests=1)), endpoint("b")]
    known = {"default/a": Prediction(1.0, 0.1), "default/b": Prediction(9.0, 0.9)}
    assert make("latency-scorer").score(request_for(predictions=known), two) == [0.0, 0.51]
    two = [endpoint("a", waiting=4, kv_usage=0.4), endpoint("b", waiting=1, kv_usage=0.1)]
    scores = make("latency-scorer").score(request_for(matches={"a": 500}), two)
    assert scores == pytest.approx([round(100 * (0.6 + 0 + 0.5) / 3) / 100, round(100 * (0.9 + 0.75 + 0) / 3) / 100])


NUMBER = st.integers(0, 10**9)
SHARE = st.floats(0, 10)


@st.composite
def fleets(draw: Any, endpoint: Any) -> list[Any]:
    found = []
    for index in range(draw(st.integers(1, 6))):
        load = Load(requests=draw(NUMBER), tokens=draw(NUMBER), prefill_tokens=draw(NUMBER))
        labels = {"llm-d.ai/context-length-range": draw(st.sampled_from(["0-9", "5-5000", "?"]))}
        reports = draw(st.booleans())
        metrics = {"waiting": draw(NUMBER), "running": draw(NUMBER), "kv_usage": draw(SHARE)} if reports else {}
        found.append(endpoint(chr(97 + index), load=load, labels=labels, **metrics))
    return found


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_scores_are_shares(data: st.DataObject, make: Any, endpoint: Any, request_for: Any) -> None:
    some = data.draw(fleets(endpoint))
    matches = {one.name: data.draw(st.floats(0, 2000)) for one in some}
    seconds = st.floats(0, 1e6)
    known = {one.key: Prediction(data.draw(seconds), data.draw(seconds)) for one in some if data.draw(st.booleans())}
    slo = data.draw(st.none() | seconds)
    request = request_for(matches=matches, predictions=known, slo_ttft=slo, prompt_tokens=data.draw(NUMBER))
    for stock in SCORERS:
        scorer: Scorer = make(stock.type_name, **REQUIRED.get(stock.type_name, {}))
        scores = scorer.score(request, some)
        assert len(scores) == len(some)
        assert all(0.0 <= score <= 1.0 for score in scores), (stock.type_name, scores)
