"""The way from a request to an endpoint, with the smallest plugins that can be."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence

import pytest
import structlog

from quire.core.errors import ConfigError
from quire.gateway.director import Director
from quire.gateway.endpoint import STATE_LABEL, Endpoint, Load, Pool
from quire.gateway.errors import NoEndpoint
from quire.gateway.faults import EVERY, PluginFaults
from quire.gateway.picker_config import read_picker_config
from quire.gateway.plugin import Conclusion, Observer, Picker, ProfileHandler, Scorer
from quire.gateway.plugins.pickers import MaxScore, WeightedRandom
from quire.gateway.request import Api, InferenceRequest, Outcome
from quire.gateway.schedule import Profile, Scheduler, WeightedScorer, run_profile


class FewestOpen(Scorer):
    name = "fewest"

    def score(self, request: InferenceRequest, candidates: Sequence[Endpoint]) -> Sequence[float]:
        return [1 / (1 + endpoint.load.requests) for endpoint in candidates]


class Best(Picker):
    name = "best"

    def pick(
        self, request: InferenceRequest, candidates: Sequence[Endpoint], totals: Sequence[float]
    ) -> Sequence[Endpoint]:
        order = sorted(range(len(candidates)), key=lambda index: -totals[index])
        return [candidates[index] for index in order]


class Single(ProfileHandler):
    def next_profiles(
        self, request: InferenceRequest, profiles: Sequence[str], results: Mapping[str, Sequence[Endpoint]]
    ) -> Sequence[str]:
        return [name for name in profiles if name not in results]

    def conclude(self, request: InferenceRequest, results: Mapping[str, Sequence[Endpoint]]) -> Conclusion:
        return Conclusion(results["default"])


def director(*endpoints: Endpoint) -> Director:
    pool = Pool()
    for endpoint in endpoints:
        pool.put(endpoint)
    profile = Profile("default", (), (WeightedScorer(FewestOpen()),), Best())
    return Director(pool=pool, scheduler=Scheduler({"default": profile}, Single()), clock=lambda: 0.0)


def endpoint(name: str, **fields: object) -> Endpoint:
    return Endpoint(name, "127.0.0.1", 8000 + ord(name[-1]), **fields)  # type: ignore[arg-type]


def request(**fields: object) -> InferenceRequest:
    values: dict[str, object] = {"id": "r", "path": "/v1/completions", "api": Api.COMPLETIONS, "model": "m"}
    values |= {"body": b"{}", "headers": {}, "arrived": 0.0, "prompt": b"x" * 400, "max_tokens": 10}
    return InferenceRequest(**(values | fields))  # type: ignore[arg-type]


async def test_choices_made_in_one_instant_spread() -> None:
    router = director(endpoint("a"), endpoint("b"))
    places = []
    for _ in range(4):
        one = request()
        choice = await router.choose(one)
        router.sent(one, choice.endpoint, choice)
        places.append(choice.endpoint.name)
    assert sorted(places) == ["a", "a", "b", "b"]


class Says(Scorer):
    """A score for each endpoint, by its name."""

    def __init__(self, scores: Mapping[str, float]) -> None:
        self.name = "says"
        self._scores = scores

    def score(self, request: InferenceRequest, candidates: Sequence[Endpoint]) -> Sequence[float]:
        return [self._scores[one.name] for one in candidates]


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
def test_a_score_that_is_no_number_counts_nothing(wrong: float) -> None:
    some = [endpoint("a"), endpoint("b"), endpoint("c")]
    scorers = (WeightedScorer(Says({"a": wrong, "b": 0.5, "c": wrong}), 2.0), WeightedScorer(FewestOpen()))
    for picker in (MaxScore(1, random.Random(0)), MaxScore(3, random.Random(0)), WeightedRandom(3, random.Random(0))):
        picked, trace = run_profile(Profile("default", (), scorers, picker), request(), some)
        assert trace.totals == [1.0, 2.0, 1.0]
        assert isinstance(picker, WeightedRandom) or picked[0] is some[1]
        assert trace.scores[0].scores == [0.0, 0.5, 0.0]


async def test_loads_return_to_nothing() -> None:
    router = director(endpoint("a"))
    one = request()
    choice = await router.choose(one)
    attempt = router.sent(one, choice.endpoint, choice)
    load = choice.endpoint.load
    assert (load.requests, load.prefill_tokens, load.tokens) == (1, 100, 110)
    router.first_byte(one, attempt)
    assert (load.requests, load.prefill_tokens, load.tokens) == (1, 0, 110)
    router.finished(one, attempt, Outcome(status=200))
    assert (load.requests, load.prefill_tokens, load.tokens) == (0, 0, 0)


class Watcher(Observer):
    def __init__(self, name: str, *, fails: bool) -> None:
        self.name = name
        self._fails = fails
        self.heard: list[str] = []

    def _hear(self, what: str) -> None:
        self.heard.append(what)
        if self._fails:
            raise ZeroDivisionError(what)

    def sent(self, request: InferenceRequest, endpoint: Endpoint, choice: Conclusion) -> None:
        self._hear("sent")

    def first_byte(self, request: InferenceRequest, endpoint: Endpoint, ttft: float) -> None:
        self._hear("first_byte")

    def finished(self, request: InferenceRequest, endpoint: Endpoint, outcome: Outcome) -> None:
        self._hear("finished")


async def test_an_observer_that_fails_costs_nobody_anything_but_a_warning_now_and_then() -> None:
    router = director(endpoint("a"))
    watchers = [Watcher("before", fails=False), Watcher("broken", fails=True), Watcher("behind", fails=False)]
    router.observers = watchers
    with structlog.testing.capture_logs() as logs:
        for _ in range(100):
            one = request()
            choice = await router.choose(one)
            attempt = router.sent(one, choice.endpoint, choice)
            router.first_byte(one, attempt)
            router.finished(one, attempt, Outcome(status=200))
    assert all(one.heard == ["sent", "first_byte", "finished"] * 100 for one in watchers)
    assert choice.endpoint.load == Load()
    (told,) = [entry for entry in logs if entry["event"] == "observer_failed"]
    assert (told["plugin"], told["error"], told["log_level"]) == ("broken", "ZeroDivisionError: sent", "warning")


def test_a_fault_is_told_again_after_a_while_with_how_many_there_were() -> None:
    now = 0.0
    faults = PluginFaults(lambda: now)
    with structlog.testing.capture_logs() as logs:
        for _ in range(41):
            faults.tell("observer_failed", "p", ValueError("x" * 10_000))
            faults.tell("observer_failed", "q", ValueError())
            now += EVERY / 20
    assert [(entry["plugin"], entry["unsaid_before"]) for entry in logs] == [
        *(("p", 0), ("q", 0)),
        *(("p", 19), ("q", 19)) * 2,
    ]
    assert max(len(entry["error"]) for entry in logs) <= 500


async def test_who_cannot_serve_is_no_candidate_and_the_error_says_why() -> None:
    router = director(
        endpoint("a", labels={STATE_LABEL: "draining"}),
        endpoint("b", available=False),
        endpoint("c", models=frozenset({"other"})),
    )
    with pytest.raises(NoEndpoint, match="Of 2 endpoints with the model 'm', 1 are down, 1 are draining"):
        await router.choose(request())
    with pytest.raises(NoEndpoint, match="No endpoint is known"):
        await director().choose(request())
    chosen = await director(endpoint("a"), endpoint("b")).choose(request(subset=frozenset({endpoint("b").address})))
    assert chosen.endpoint.name == "b"


def test_the_pool_tells_of_arrivals_and_departures() -> None:
    pool = Pool()
    pool.put(endpoint("a"))
    seen: list[str] = []
    pool.watch(lambda one: seen.append(f"+{one.name}"), lambda one: seen.append(f"-{one.name}"))
    known = pool.put(endpoint("a", labels={"x": "y"}))
    assert known.labels == {"x": "y"}
    pool.put(Endpoint("a", "127.0.0.2", 1))
    pool.remove("default/a")
    pool.remove("default/a")
    assert seen == ["+a", "-a", "+a", "-a"]
    assert len(pool) == 0


def test_a_foreign_picker_config_is_read_and_its_faults_are_named() -> None:
    document = {
        "apiVersion": "llm-d.ai/v1alpha1",
        "kind": "EndpointPickerConfig",
        "featureGates": ["flowControl", "x=false"],
        "plugins": [
            {"type": "queue-scorer"},
            {"type": "max-score-picker", "name": "best", "parameters": {"maxNumOfEndpoints": 1}},
        ],
        "schedulingProfiles": [
            {"name": "default", "plugins": [{"pluginRef": "queue-scorer", "weight": 2}, {"pluginRef": "best"}]}
        ],
        "flowControl": {"maxBytes": "1Gi", "defaultRequestTTL": "30s", "priorityBands": [{"priority": -1}]},
        "dataLayer": {"discovery": {"endpoints": {"pluginRef": "file"}}},
    }
    config = read_picker_config(document)
    assert (config.gate("flowControl"), config.gate("x"), config.gate("y")) == (True, False, None)
    assert config.flow_control is not None
    assert config.flow_control.default_request_ttl == "30s"
    with pytest.raises(ConfigError, match="unknown field `pluginReff`"):
        read_picker_config(document | {"schedulingProfiles": [{"name": "d", "plugins": [{"pluginReff": "best"}]}]})
    with pytest.raises(ConfigError, match="'worst' that is not there"):
        read_picker_config(document | {"schedulingProfiles": [{"name": "d", "plugins": [{"pluginRef": "worst"}]}]})
    with pytest.raises(ConfigError, match="two plugins are named 'queue-scorer'"):
        read_picker_config(document | {"plugins": [{"type": "queue-scorer"}] * 2, "schedulingProfiles": []})
