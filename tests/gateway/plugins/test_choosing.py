"""Filters, pickers, profile handlers, deciders and admitters, each by its definition."""

from __future__ import annotations

import math
from collections import Counter
from itertools import permutations
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from quire.core.errors import ConfigError
from quire.gateway.endpoint import ROLE_LABEL, Load
from quire.gateway.errors import Saturated
from quire.gateway.request import Prediction

ROLES = ["decode", "prefill", "encode", "prefill-decode", "encode-prefill", "encode-prefill-decode", "both", "x", None]
FILTERS: dict[str, dict[str, Any]] = {
    "decode-filter": {},
    "prefill-filter": {},
    "encode-filter": {},
    "by-label": {"label": ROLE_LABEL, "validValues": ["decode", "x"], "allowsNoLabel": True},
    "label-selector-filter": {"matchExpressions": [{"key": ROLE_LABEL, "operator": "Exists"}]},
    "prefix-cache-affinity-filter": {},
    "slo-headroom-tier-filter": {"epsilonExploreNeg": 0.5},
    "utilization-filter": {"conditions": [{"metric": "active-requests", "maxValue": 3}]},
    "endpoint-attribute-filter": {
        "attribute": "active-requests",
        "algorithm": {"type": "threshold", "threshold": {"operator": "LessThan", "value": 3}},
    },
    "session-affinity-filter": {},
}


def by_role(endpoint: Any) -> list[Any]:
    return [endpoint(chr(97 + i), labels={} if r is None else {ROLE_LABEL: r}) for i, r in enumerate(ROLES)]


@pytest.mark.parametrize(
    ("type_name", "left"),
    [("decode-filter", "adfgi"), ("prefill-filter", "bdefg"), ("encode-filter", "cef"), ("by-label", "ahi")],
)
def test_roles(make: Any, endpoint: Any, request_for: Any, type_name: str, left: str) -> None:
    kept = make(type_name, **FILTERS[type_name]).filter(request_for(), by_role(endpoint))
    assert "".join(one.name for one in kept) == left


@pytest.mark.parametrize(
    ("operator", "values", "left"),
    [("In", ["x"], "b"), ("NotIn", ["x"], "ac"), ("Exists", [], "ab"), ("DoesNotExist", [], "c")],
)
def test_selectors(make: Any, endpoint: Any, request_for: Any, operator: str, values: list[str], left: str) -> None:
    some = [endpoint("a", labels={"k": "w"}), endpoint("b", labels={"k": "x"}), endpoint("c")]
    expressions = [{"key": "k", "operator": operator, "values": values}]
    kept = make("label-selector-filter", matchExpressions=expressions).filter(request_for(), some)
    assert "".join(one.name for one in kept) == left


@pytest.mark.parametrize(("open_tokens", "left"), [(0, "a"), (18_000, "a"), (18_002, "abc")])
def test_affinity_until_it_does_not_pay(
    make: Any, endpoint: Any, request_for: Any, open_tokens: int, left: str
) -> None:
    some = [endpoint("a", load=Load(prefill_tokens=open_tokens)), endpoint("b"), endpoint("c")]
    filter_ = make("prefix-cache-affinity-filter", peakPrefillThroughput=1000)
    kept = filter_.filter(request_for(matches={"a": 800, "b": 799}), some)
    assert "".join(one.name for one in kept) == left


def test_headroom_tiers(make: Any, endpoint: Any, request_for: Any) -> None:
    some = [endpoint(name) for name in "abc"]
    known = {"default/a": Prediction(0.5, 0.01), "default/b": Prediction(2.0, 0.01)}
    request = request_for(slo_ttft=1.0, slo_tpot=0.1, predictions=known)
    assert make("slo-headroom-tier-filter", epsilonExploreNeg=0).filter(request, some) == some[:1]
    assert make("slo-headroom-tier-filter", epsilonExploreNeg=1).filter(request, some) == some[1:]
    assert make("slo-headroom-tier-filter").filter(request_for(predictions=known), some) == some
    with pytest.raises(ConfigError):
        make("slo-headroom-tier-filter", epsilonExploreNeg=1.5)


def test_utilization(make: Any, endpoint: Any, request_for: Any) -> None:
    some = [endpoint("a", running=10, waiting=0), endpoint("b", running=41, waiting=0), endpoint("c")]
    conditions = [{"metric": "running-requests", "maxValue": 40}, {"metric": "waiting-queue", "maxValue": 0}]
    assert [one.name for one in make("utilization-filter", conditions=conditions).filter(request_for(), some)] == [
        "a",
        "c",
    ]
    busy = [some[1]]
    assert make("utilization-filter", conditions=conditions).filter(request_for(), busy) == []
    assert make("utilization-filter", conditions=conditions, fallbackOnEmpty=True).filter(request_for(), busy) == busy


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_filters_keep_the_order(data: st.DataObject, make: Any, endpoint: Any, request_for: Any) -> None:
    some = [one for one in by_role(endpoint) if data.draw(st.booleans())]
    for one in some:
        one.load.requests, one.load.prefill_tokens = data.draw(st.integers(0, 6)), data.draw(st.integers(0, 10**6))
    known = {one.key: Prediction(data.draw(st.floats(0, 2)), 0.0) for one in some if data.draw(st.booleans())}
    matches = {one.name: data.draw(st.floats(0, 1000)) for one in some}
    request = request_for(matches=matches, predictions=known, slo_ttft=1.0)
    for type_name, parameters in FILTERS.items():
        left = make(type_name, seed=data.draw(st.integers(0, 9)), **parameters).filter(request, some)
        places = [some.index(one) for one in left]
        assert places == sorted(set(places)), type_name


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(totals=st.lists(st.floats(0, 100), min_size=1, max_size=8), most=st.integers(1, 10), seed=st.integers(0, 99))
def test_pickers(make: Any, endpoint: Any, request_for: Any, totals: list[float], most: int, seed: int) -> None:
    some = [endpoint(chr(97 + index)) for index in range(len(totals))]
    for type_name in ("max-score-picker", "random-picker", "weighted-random-picker"):
        picked = make(type_name, seed=seed, maxNumOfEndpoints=most).pick(request_for(), some, totals)
        assert len({one.name for one in picked}) == len(picked) == min(most, len(some))
        if type_name == "max-score-picker":
            scores = [totals[some.index(one)] for one in picked]
            assert scores == sorted(totals, reverse=True)[: len(picked)]


def chi_square(seen: Counter[Any], expected: dict[Any, float]) -> float:
    return sum((seen[key] - number) ** 2 / number for key, number in expected.items())


def test_weighted_random_draws_by_weight_without_putting_back(make: Any, endpoint: Any, request_for: Any) -> None:
    weights, draws = [1.0, 2.0, 5.0], 20_000
    some = [endpoint(name) for name in "abc"]
    picker = make("weighted-random-picker", maxNumOfEndpoints=3)
    seen = Counter(tuple(some.index(one) for one in picker.pick(request_for(), some, weights)) for _ in range(draws))
    expected = {
        order: draws * weights[order[0]] / 8 * weights[order[1]] / (8 - weights[order[0]])
        for order in permutations(range(3))
    }
    assert chi_square(seen, expected) < 20.5  # 5 degrees of freedom: p = 0.001


def test_equal_scores_are_drawn_evenly(make: Any, endpoint: Any, request_for: Any) -> None:
    some = [endpoint(name) for name in "abcd"]
    for picker in (make("max-score-picker"), make("max-score-picker", maxNumOfEndpoints=2)):
        seen = Counter(picker.pick(request_for(), some, [1.0, 2.0, 2.0, 2.0])[0].name for _ in range(6000))
        assert chi_square(seen, dict.fromkeys("bcd", 2000.0)) < 13.8  # 2 degrees of freedom
        assert "a" not in seen


@pytest.mark.parametrize(
    ("prompt", "cached", "limits", "expected"),
    [
        (1000, 0, {"nonCachedTokens": 0}, False),
        (1000, 984, {"nonCachedTokens": 16}, True),
        (1000, 985, {"nonCachedTokens": 16}, False),
        (15, 0, {"nonCachedTokens": 16}, False),
        (1000, 0, {"nonCachedTokens": 16, "promptTokens": 1001}, False),
    ],
)
def test_prefix_decider(
    make: Any, endpoint: Any, request_for: Any, prompt: int, cached: int, limits: dict[str, int], expected: bool
) -> None:
    request = request_for(prompt_tokens=prompt, matches={"a": cached})
    assert make("prefix-based-pd-decider", **limits).disaggregate(request, endpoint("a")) is expected


def run(handler: Any, request: Any, profiles: dict[str, list[Any]]) -> tuple[list[str], Any]:
    """As the scheduler runs it; gives the order of profiles and the conclusion."""
    results: dict[str, list[Any]] = {}
    while wanted := handler.next_profiles(request, tuple(profiles), results):
        for name in wanted:
            assert name not in results
            results[name] = profiles[name]
    return list(results), handler.conclude(request, results)


def test_disaggregation(make: Any, endpoint: Any, request_for: Any) -> None:
    others = {"always": make("always-disagg-pd-decider"), "images": make("always-disagg-multimodal-decider")}
    d, p, e, f = (endpoint(name) for name in "dpef")
    profiles = {"prefill": [p], "decode": [d], "encode": [e, f], "whole": [f]}
    deciders = {"prefill": "always", "encode": "images"}
    handler = make("disagg-profile-handler", others=others, deciders=deciders, profiles={"fallback": "whole"})
    ran, choice = run(handler, request_for(), profiles)
    assert (ran, choice.endpoints, choice.headers) == (["decode", "prefill"], [d], {"x-prefiller-host-port": p.address})
    image = request_for(body=b'{"type": "image_url"}')
    ran, choice = run(handler, image, profiles)
    assert ran == ["decode", "encode", "prefill"]
    assert choice.headers["x-encoder-hosts-ports"] == f"{e.address},{f.address}"
    assert run(handler, request_for(), profiles | {"prefill": []})[1].endpoints == [f]
    assert run(handler, request_for(), profiles | {"decode": []})[1].endpoints == [f]
    without = make("disagg-profile-handler", others=others, deciders=deciders)
    assert run(without, request_for(), profiles | {"prefill": []})[1].endpoints == [d]
    assert not run(without, request_for(), profiles | {"decode": []})[1].endpoints
    first = make("disagg-profile-handler", others=others, deciders={"encode": "images"}, stageOrder="prefill-first")
    assert run(first, image, profiles)[0] == ["prefill", "encode", "decode"]
    assert run(first, request_for(), profiles)[1].headers == {"x-prefiller-host-port": p.address}


def test_other_handlers(make: Any, endpoint: Any, request_for: Any) -> None:
    a, b = endpoint("a"), endpoint("b")
    assert run(make("single-profile-handler"), request_for(), {"x": [a, b]})[1].endpoints == [a, b]
    ranks = run(make("data-parallel-profile-handler"), request_for(), {"x": [b]})[1]
    assert ranks.headers == {"x-data-parallel-host-port": b.address}
    handler, profiles = make("header-profile-handler"), {"decode": [a], "other": [b]}
    assert run(handler, request_for(), profiles)[0] == ["decode"]
    assert run(handler, request_for(headers={"epp-profile": " other "}), profiles)[0] == ["other"]
    assert run(handler, request_for(headers={"epp-profile": "nobody"}), profiles)[0] == []


def test_probabilistic_admitter(make: Any, endpoint: Any, request_for: Any) -> None:
    some = [endpoint("a", waiting=1, kv_usage=0.0), endpoint("b", waiting=2, kv_usage=0.0)]  # saturation 0.3
    share, tries = 300 * 0.3**5, 2000
    admitter, refused = make("probabilistic-admitter"), 0
    for _ in range(tries):
        try:
            admitter.admit(request_for(priority=-1), some)
        except Saturated:
            refused += 1
    assert abs(refused - share * tries) < 4 * math.sqrt(tries * share * (1 - share))
    for _ in range(50):
        admitter.admit(request_for(priority=0), some)


def test_latency_admitter(make: Any, endpoint: Any, request_for: Any) -> None:
    busy, admitter = [endpoint("a", running=3, kv_usage=0.5)], make("latency-slo-admitter")
    late = {"default/a": Prediction(2.0, 0.1)}
    with pytest.raises(Saturated):
        admitter.admit(request_for(priority=-1, slo_ttft=1.0, predictions=late), busy)
    for let_in in ({"priority": 0}, {"slo_ttft": 3.0}, {"predictions": {}}, {"slo_ttft": None}):
        admitter.admit(request_for(**({"priority": -1, "slo_ttft": 1.0, "predictions": late} | let_in)), busy)
    for others in ({"running": 0, "kv_usage": 0.5}, {"running": 1, "kv_usage": 0.01}):
        admitter.admit(request_for(priority=-1, slo_ttft=1.0, predictions=late), [*busy, endpoint("b", **others)])
    silent = endpoint("b", running=0, kv_usage=0.0, time=-60.0)
    for nobody in (silent, endpoint("b")):
        admitter.admit(request_for(priority=-1, slo_ttft=1.0, predictions=late), [nobody])
        with pytest.raises(Saturated):
            admitter.admit(request_for(priority=-1, slo_ttft=1.0, predictions=late), [*busy, nobody])


def test_who_fell_silent_while_idle_lets_nobody_in(make: Any, endpoint: Any, request_for: Any) -> None:
    busy, silent = endpoint("a", waiting=50, kv_usage=1.0), endpoint("b", waiting=0, kv_usage=0.0, time=-60.0)
    for parameters in ({}, {"power": 1000.0}):  # whose power of a large number is none
        admitter = make("probabilistic-admitter", **parameters)
        for some in ([busy, silent], [busy, endpoint("c")], [endpoint("a", waiting=10**15), silent], [silent]):
            with pytest.raises(Saturated):
                admitter.admit(request_for(priority=-1), some)
    admitter.admit(request_for(priority=-1), [endpoint("a", waiting=0), endpoint("b", waiting=50, time=-60.0)])


def test_filters_by_reports_do_not_believe_old_ones(make: Any, endpoint: Any, request_for: Any) -> None:
    busy, idle = endpoint("a", waiting=9), endpoint("b", waiting=0)
    old, never = endpoint("c", waiting=0, time=-60.0), endpoint("d")
    utilization = make("utilization-filter", conditions=[{"metric": "waiting-queue", "maxValue": 5}])
    assert utilization.filter(request_for(), [busy, idle, old, never]) == [idle, old, never]  # their mean is 4.5
    assert utilization.filter(request_for(), [busy, old, never]) == []
    assert utilization.filter(request_for(), [old, never]) == [old, never]
    algorithm = {"type": "threshold", "threshold": {"operator": "LessThan", "value": 5}}
    for missing, left in (("Pass", [idle, old, never]), ("Fail", [idle])):
        wanted = make("endpoint-attribute-filter", attribute="waiting-queue", algorithm=algorithm, onMissing=missing)
        assert wanted.filter(request_for(), [busy, idle, old, never]) == left
