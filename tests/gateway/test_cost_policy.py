"""What the default policy counts, endpoint by endpoint. How a pool fares under it: `test_cost_simulation.py`."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

import pytest

from quire.gateway.cost import policy
from quire.gateway.cost.policy import ExpectedCost, expected_cached
from quire.gateway.endpoint import Endpoint, EndpointMetrics, Pool
from quire.gateway.plugin import Conclusion, Plugin, Services
from quire.gateway.producers.latency import PredictedLatency
from quire.gateway.request import Api, InferenceRequest, Outcome, PrefixMatch


class World:
    """A pool whose clock stands still unless it is turned."""

    def __init__(self, *names: str) -> None:
        self.now = 0.0
        self.pool = Pool()
        self.endpoints = [
            self.pool.put(Endpoint(name, "127.0.0.1", 8000 + number)) for number, name in enumerate(names)
        ]
        self.services = Services(self.pool, lambda: self.now, random.Random(0), lambda name: Plugin())
        self.policy = ExpectedCost(self.services)

    def __getitem__(self, name: str) -> Endpoint:
        return next(endpoint for endpoint in self.endpoints if endpoint.name == name)

    def scores(self, request: InferenceRequest) -> dict[str, float]:
        found = self.policy.score(request, self.endpoints)
        return {endpoint.name: score for endpoint, score in zip(self.endpoints, found, strict=True)}

    def best(self, request: InferenceRequest) -> str:
        scores = self.scores(request)
        return max(scores, key=lambda name: scores[name])

    def details(self) -> dict[str, Mapping[str, float]]:
        found = self.policy.details()
        assert found is not None
        return {endpoint.name: part for endpoint, part in zip(self.endpoints, found, strict=True)}  # type: ignore[misc]

    def send(self, request: InferenceRequest, name: str) -> None:
        self.policy.sent(request, self[name], Conclusion([self[name]]))

    def serve(self, request: InferenceRequest, name: str, ttft: float, tpot: float, output: int = 11) -> None:
        """Sent, answered and done, from now on."""
        self.send(request, name)
        self.now += ttft
        self.policy.first_byte(request, self[name], ttft)
        first = self.now
        self.now += tpot * (output - 1)
        outcome = Outcome(status=200, first_byte=first, finished=self.now, output_tokens=output)
        self.policy.finished(request, self[name], outcome)


def request(tokens: int = 1000, cached: Mapping[str, int] | None = None, **fields: object) -> InferenceRequest:
    values: dict[str, object] = {"id": "r", "path": "/", "api": Api.CHAT, "model": "m", "body": b"", "headers": {}}
    values |= {"arrived": 0.0, "prompt_tokens": tokens, "stream": True, "max_tokens": 100}
    made = InferenceRequest(**(values | fields))  # type: ignore[arg-type]
    made.prefix["p"] = {f"default/{name}": PrefixMatch(held, float(held)) for name, held in (cached or {}).items()}
    return made


def test_who_holds_the_prefix_is_best_and_all_scores_are_in_range() -> None:
    world = World("a", "b", "c")
    scores = world.scores(request(cached={"b": 900, "c": 400}))
    assert scores["b"] > scores["c"] > scores["a"]
    assert all(0 < score <= 1 for score in scores.values())


def test_a_slower_tier_is_credited_less() -> None:
    world = World("device", "host")
    one = request()
    one.prefix["p"] = {
        "default/device": PrefixMatch(800, 800.0, {"gpu": 800}),
        "default/host": PrefixMatch(900, 720.0, {"cpu": 900}),
    }
    assert world.best(one) == "device"
    assert expected_cached(one, world["host"]) == 900
    assert expected_cached(one, World("other")["other"]) == 0


def test_the_first_requests_of_a_burst_spread_before_anything_is_known() -> None:
    world, places = World("a", "b", "c", "d"), []
    for _ in range(8):
        one = request()
        places.append(world.best(one))
        world.send(one, places[-1])
    assert sorted(places) == sorted("abcd" * 2)


def test_a_burst_follows_its_prefix_until_waiting_costs_more_than_computing_it_again() -> None:
    world, places = World("a", "b"), []
    for _ in range(40):
        one = request(10_000, dict.fromkeys({"a", *places}, 9_000))
        places.append(world.best(one))
        world.send(one, places[-1])
    assert places[:3] == ["a"] * 3
    assert abs(places.count("a") - places.count("b")) <= 10


def test_equals_are_given_work_in_turn_one_after_another() -> None:
    world, places = World("a", "b", "c"), []
    for _ in range(9):
        one = request()
        places.append(world.best(one))
        world.serve(one, places[-1], 0.1, 0.01)
    assert {places.count(name) for name in "abc"} == {3}


def test_long_answers_do_not_hide_what_a_prefix_saves() -> None:
    world = World("a", "b")
    assert world.best(request(cached={"b": 900}, max_tokens=100_000)) == "b"


def test_details_are_made_when_somebody_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[object] = []
    monkeypatch.setattr(policy, "_detail", lambda estimate: made.append(estimate) or {"cost": estimate.cost})
    world = World("a", "b", "c")
    world.scores(request())
    details = world.policy.details()
    assert (details is not None, made) == (True, [])
    assert [one["cost"] for one in details or ()] == [made[index].cost for index in range(3)]  # type: ignore[index, attr-defined]
    assert len((details or ())[1:]) == 2


def test_details_say_what_the_cost_is_made_of() -> None:
    world = World("a", "b")
    world.send(request(500), "a")
    one = request(1000, {"b": 800})
    world.scores(one)
    for part in world.details().values():
        parts = ("queued_seconds", "prefill_seconds", "decode_seconds", "others_seconds")
        assert part["cost"] == pytest.approx(sum(part[name] for name in parts))
    a, b = world.details()["a"], world.details()["b"]
    assert (a["cached_tokens"], b["cached_tokens"]) == (0, 800)
    assert b["queued_seconds"] == b["others_seconds"] == 0
    assert a["queued_seconds"] == pytest.approx(a["prefill_seconds"] / 2)
    assert one.predictions["default/a"].ttft == a["predicted_ttft"] > b["predicted_ttft"]


def test_what_endpoints_report_of_others_counts_and_what_is_ours_does_not_count_twice() -> None:
    world = World("a", "b")
    for _ in range(3):
        world.send(request(), "a")
    world["a"].metrics = EndpointMetrics(time=world.now, waiting=3)
    world.scores(request())
    alone = world.details()["a"]["queued_seconds"]
    world["a"].metrics = EndpointMetrics(time=world.now, waiting=5)
    world.scores(request())
    assert world.details()["a"]["queued_seconds"] > alone
    world.send(request(), "a")  # after the page, which still counts the same five
    world.scores(request())
    before = world.details()["a"]["queued_seconds"]
    world["a"].metrics = EndpointMetrics(time=world.now, waiting=6)
    world.scores(request())
    assert world.details()["a"]["queued_seconds"] == before


def test_who_finished_since_the_page_was_read_is_not_taken_for_someone_elses() -> None:
    world = World("a", "b")
    sent = [request() for _ in range(4)]
    for one in sent:
        world.send(one, "a")
    world["a"].metrics = EndpointMetrics(time=world.now, running=4)
    for one in sent:
        world.policy.finished(one, world["a"], Outcome(status=None, error="cancelled"))
    world.scores(request())
    assert world.details()["a"]["others_seconds"] == 0


def test_a_page_that_is_old_counts_no_more() -> None:
    world = World("a", "b")
    world["a"].metrics = EndpointMetrics(time=0.0, waiting=50, running=50)
    assert world.best(request()) == "b"
    world.now = 60.0
    scores = world.scores(request())
    assert scores["a"] == pytest.approx(scores["b"], abs=0.01)


def test_a_slow_endpoint_is_found_out_from_answers() -> None:
    world = World("a", "b", "slow")
    for _ in range(30):
        for name, slow in (("a", 1.0), ("b", 1.0), ("slow", 3.0)):
            world.serve(request(), name, 0.2 * slow, 0.02 * slow)
    scores = world.scores(request())
    assert scores["slow"] < 0.5 < scores["a"]
    plain = world.details()
    assert plain["slow"]["predicted_ttft"] == pytest.approx(3 * plain["a"]["predicted_ttft"], rel=0.3)


def test_it_is_found_out_from_answers_that_are_not_streamed_too() -> None:
    world = World("a", "b", "slow")
    for _ in range(30):
        for name, slow in (("a", 1.0), ("b", 1.0), ("slow", 3.0)):
            one = request(stream=False)
            world.send(one, name)
            world.now += 0.4 * slow
            world.policy.first_byte(one, world[name], 0.4 * slow)
            outcome = Outcome(status=200, first_byte=world.now, finished=world.now, output_tokens=11)
            world.policy.finished(one, world[name], outcome)
    assert world.scores(request())["slow"] < 0.5


@pytest.mark.parametrize("outcome", [Outcome(status=500), Outcome(status=400), Outcome(status=200, error="reset")])
def test_answers_that_are_none_teach_nothing_and_leave_nothing_behind(outcome: Outcome) -> None:
    world = World("a", "b")
    for _ in range(50):
        one = request()
        world.send(one, "a")
        world.policy.first_byte(one, world["a"], 0.0)
        world.policy.finished(one, world["a"], outcome)
        world.policy.finished(one, world["a"], outcome)  # told twice: counted once
    world.scores(request())
    a, b = world.details()["a"], world.details()["b"]
    assert {name: a[name] for name in a} == {name: b[name] for name in b}


def test_two_attempts_of_one_request_are_counted_apart() -> None:
    world = World("a", "b")
    one = request()
    world.send(one, "a")
    world.send(one, "b")  # hedged
    world.policy.finished(one, world["a"], Outcome(status=None, error="cancelled"))
    world.scores(request())
    details = world.details()
    assert details["a"]["queued_seconds"] == 0 < details["b"]["queued_seconds"]


def test_an_endpoint_that_left_is_forgotten() -> None:
    world = World("a", "b")
    one = request()
    world.send(one, "a")
    world.pool.remove("default/a")
    world.policy.finished(one, world["a"], Outcome(status=None, error="connect"))
    world.endpoints[0] = world.pool.put(Endpoint("a", "127.0.0.9", 1))
    world.scores(request())
    assert world.details()["a"]["queued_seconds"] == 0


def test_what_ends_after_its_endpoint_left_leaves_nothing_behind() -> None:
    """Neither does what is estimated or sent there: pools whose endpoints come and go would grow for ever."""
    world = World("stays")
    empty = held(world)
    for number in range(50):
        left = world.pool.put(Endpoint(f"e{number}", "127.0.0.1", 9000 + number))
        world.endpoints.append(left)
        one, late = request(), request()
        world.send(one, left.name)
        world.policy.first_byte(one, left, 0.1)
        world.pool.remove(left.key)
        world.now += 0.5
        world.policy.finished(one, left, Outcome(status=200, output_tokens=7, prompt_tokens=10, cached_tokens=3))
        world.scores(late)
        world.send(late, left.name)
        world.policy.first_byte(late, left, 0.1)
        world.policy.finished(late, left, Outcome(status=200, output_tokens=7))
        world.endpoints.pop()
    assert held(world) - empty <= {"default/stays"}


def held(world: World) -> set[str]:
    """Keys of endpoints that the model holds anything of."""
    learner = world.policy._model._learner
    return {*world.policy._model._open, *learner._prefill._speeds, *learner._decode._speeds}


def test_a_requests_end_does_not_count_for_who_came_back_under_its_endpoints_name() -> None:
    world = World("a", "b")
    old, one, other = world["a"], request(), request()
    world.send(one, "a")
    world.pool.remove(old.key)
    world.endpoints[0] = world.pool.put(Endpoint("a", "127.0.0.9", 1))
    world.send(other, "a")
    world.scores(request())
    before = world.details()["a"]
    world.policy.finished(one, old, Outcome(status=None, error="connect"))
    world.scores(request())
    assert world.details()["a"] == before


def test_an_answer_that_should_have_taken_no_time_at_all_is_learnt_from() -> None:
    world = World("a")
    world.policy._model._learner._ttft.intercept = 0.0  # to which the fit comes where prompts cost all there is
    one = request(0, stream=False)
    world.send(one, "a")
    world.policy.first_byte(one, world["a"], 0.0)
    world.policy.finished(one, world["a"], Outcome(status=200, output_tokens=1))
    assert world.scores(request())["a"] > 0


@pytest.mark.parametrize("stream", [True, False])
def test_one_answer_that_lies_of_its_tokens_is_soon_forgotten(stream: bool) -> None:
    honest, lied_to = World("a", "b"), World("a", "b")
    for world in (honest, lied_to):
        for _ in range(20):
            world.serve(request(prompt=b"x" * 4000, stream=stream), "a", 0.1, 0.02)
    most = 2**31 - 1
    one = request(prompt=b"x" * 4000, stream=stream, max_tokens=None)
    lied_to.send(one, "a")
    lied_to.now += 0.1
    lied_to.policy.first_byte(one, lied_to["a"], 0.1)
    lied_to.now += 0.2
    lies = Outcome(status=200, output_tokens=most, prompt_tokens=most, cached_tokens=0)
    lied_to.policy.finished(one, lied_to["a"], lies)
    for world in (honest, lied_to):
        for _ in range(60):
            world.serve(request(prompt=b"x" * 4000, stream=stream), "a", 0.1, 0.02)
        world.scores(request(max_tokens=None))
    true, said = honest.details()["b"], lied_to.details()["b"]
    assert said["decode_seconds"] == pytest.approx(true["decode_seconds"], rel=0.5)
    assert said["predicted_ttft"] == pytest.approx(true["predicted_ttft"], rel=0.5)


def test_predictions_of_the_latency_producer_are_those_of_the_policy() -> None:
    world = World("a", "b")
    producer = PredictedLatency(world.services)
    one = request(cached={"a": 500})
    plugins: Sequence[ExpectedCost | PredictedLatency] = (world.policy, producer)
    for plugin in plugins:
        plugin.sent(one, world["a"], Conclusion([world["a"]]))
    other, same = request(), request()
    producer.produce(other, world.endpoints)
    world.scores(same)
    assert other.predictions == same.predictions
