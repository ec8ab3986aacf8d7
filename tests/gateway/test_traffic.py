"""Rewrites, canaries, blue and green, sticky callers, fallbacks and shadows."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import AsyncIterator

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from quire.core.errors import ConfigError
from quire.gateway.request import Api, InferenceRequest
from quire.gateway.traffic.policy import Target, read_policy
from quire.gateway.traffic.route import plan_route, sticky_choice
from quire.gateway.traffic.shadow import MAX_ANSWER_BYTES, Shadow, answer_text

REWRITES = """
[{"apiVersion": "llm-d.ai/v1alpha2", "kind": "InferenceModelRewrite",
  "metadata": {"name": "new", "creationTimestamp": "2026-02-01T00:00:00Z"},
  "spec": {"poolRef": {"name": "p"}, "rules": [
    {"matches": [{"model": {"value": "chat"}}], "targets": [{"modelRewrite": "newer"}]}]}},
 {"apiVersion": "llm-d.ai/v1alpha2", "kind": "InferenceModelRewrite",
  "metadata": {"name": "old", "creationTimestamp": "2026-01-01T00:00:00Z"},
  "spec": {"rules": [
    {"targets": [{"modelRewrite": "any"}]},
    {"matches": [{"model": {"type": "Exact", "value": "chat"}}],
     "targets": [{"modelRewrite": "v1", "weight": 9}, {"modelRewrite": "v2", "weight": 1}]}]}},
 {"apiVersion": "llm-d.ai/v1alpha2", "kind": "InferenceObjective", "metadata": {"name": "batch"},
  "spec": {"priority": -1, "poolRef": {"name": "p", "group": "inference.networking.k8s.io"}}}]
"""


def traffic(**spec: object) -> list[dict[str, object]]:
    return [{"apiVersion": "quire.ai/v1alpha1", "kind": "TrafficPolicy", "metadata": {"name": "t"}, "spec": spec}]


def request(**fields: object) -> InferenceRequest:
    values: dict[str, object] = {"id": "r", "path": "/", "api": Api.CHAT, "model": "chat", "body": b"{}"}
    return InferenceRequest(**(values | {"headers": {}, "arrived": 0.0} | fields))  # type: ignore[arg-type]


def test_rewrites_go_exact_before_generic_then_the_oldest_and_by_weight() -> None:
    policy = read_policy(msgspec.json.decode(REWRITES))
    assert policy.objectives == {"batch": -1}
    rng = random.Random(0)
    counts = Counter(plan_route(policy, request(), rng).targets[0].model for _ in range(2000))
    assert set(counts) == {"v1", "v2"}
    assert 140 < counts["v2"] < 260  # a tenth, within 4 standard deviations
    assert plan_route(policy, request(model="other"), rng).targets[0].model == "any"
    named = request(target_model="mine")
    assert plan_route(policy, named, rng).targets[0].model == "mine"


def test_canary_by_header_and_tenant_then_weights_with_fallbacks() -> None:
    policy = read_policy(
        traffic(
            model="chat",
            routes=[
                {"name": "beta", "match": {"headers": {"X-Beta": "1"}}, "targets": [{"model": "v3"}]},
                {"name": "acme", "match": {"tenants": ["acme"]}, "targets": [{"selector": {"version": "v2"}}]},
                {"targets": [{"model": "v1", "weight": 1}, {"model": "v2", "weight": 0}]},
            ],
            fallback=[{"model": "small"}],
        )
    )
    rng = random.Random(0)
    found = plan_route(policy, request(headers={"x-beta": "1"}, tenant="acme"), rng)
    assert ([target.model for target in found.targets], found.rule) == (["v3", "small"], "route beta")
    found = plan_route(policy, request(tenant="acme"), rng)
    assert found.targets[0] == Target(model="chat", selector={"version": "v2"})
    assert {plan_route(policy, request(), rng).targets[0].model for _ in range(100)} == {"v1"}


def test_blue_and_green_is_one_word() -> None:
    routes = [{"name": "blue", "targets": [{"model": "b"}]}, {"name": "green", "targets": [{"model": "g"}]}]
    for active, model in (("blue", "b"), ("green", "g"), ("", "b")):
        policy = read_policy(traffic(model="chat", routes=routes, active=active))
        assert plan_route(policy, request(), random.Random(0)).targets[0].model == model


@given(st.lists(st.integers(1, 50), min_size=2, max_size=4), st.integers(0, 3), st.integers(1, 50))
def test_when_weights_change_callers_only_move_to_or_from_the_one_that_changed(
    weights: list[int], index: int, weight: int
) -> None:
    index %= len(weights)
    before = [Target(model=str(number), weight=value) for number, value in enumerate(weights)]
    after = [*before]
    after[index] = Target(model=str(index), weight=weight)
    for caller in range(50):
        old, new = sticky_choice(before, str(caller)).model, sticky_choice(after, str(caller)).model
        assert old == new or str(index) in (old, new)


def test_sticky_callers_stay_and_are_shared_out_by_weight() -> None:
    targets = [Target(model="a", weight=3), Target(model="b", weight=1), Target(model="off", weight=0)]
    counts = Counter(sticky_choice(targets, f"caller-{number}").model for number in range(4000))
    assert set(counts) == {"a", "b"}
    assert 890 < counts["b"] < 1110
    policy = read_policy(
        traffic(model="chat", routes=[{"sticky": "header:x-user", "targets": [{"model": "a"}, {"model": "b"}]}])
    )
    one = {plan_route(policy, request(headers={"x-user": "u1"}), random.Random(n)).targets[0].model for n in range(20)}
    assert len(one) == 1
    assert {plan_route(policy, request(), random.Random(n)).targets[0].model for n in range(20)} == {"a", "b"}


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ({"model": "m", "routes": [{"targets": []}]}, "no target of any weight"),
        ({"model": "m", "routes": [{"targets": [{"weight": -1}]}]}, "weight"),
        ({"model": "m", "routes": [{"targets": [{}], "sticky": "ip"}]}, "sticky is 'ip'"),
        ({"model": "m", "active": "blue"}, "'blue', the active one"),
        ({"model": "m", "shadows": {}}, "unknown field `shadows`"),
        ({}, "missing required field `model`"),
    ],
)
def test_a_wrong_policy_is_refused_with_the_field(spec: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        read_policy(traffic(**spec))


def test_unknown_kinds_and_versions_are_refused() -> None:
    with pytest.raises(ConfigError, match="'Deployment' is not a kind"):
        read_policy([{"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "x"}}])
    with pytest.raises(ConfigError, match="apiVersion 'v9' is not known"):
        read_policy([{"apiVersion": "v9", "kind": "InferenceObjective", "metadata": {"name": "x"}}])


def stream(*texts: str) -> bytes:
    events = [{"id": "x", "choices": [{"index": 0, "delta": {"content": text}}]} for text in texts]
    return b"".join(b"data: " + msgspec.json.encode(event) + b"\n\n" for event in events) + b"data: [DONE]\n\n"


def test_answers_are_compared_by_what_was_said() -> None:
    whole = msgspec.json.encode({"id": "y", "choices": [{"message": {"role": "assistant", "content": "Hello there"}}]})
    assert answer_text(stream("Hello", " there")) == answer_text(whole) == "Hello there"
    events = b'event: x\ndata: {"type": "content_block_delta", "delta": {"type": "text_delta", "text": "Hi"}}\n\n'
    assert answer_text(events) == answer_text(b'{"content": [{"type": "text", "text": "Hi"}]}') == "Hi"
    assert answer_text(b"data: {broken\n\n") is None
    assert answer_text(b"<html>") is None


async def test_a_shadow_is_compared_counted_and_bounded() -> None:
    release = asyncio.Event()
    answers = iter([stream("same"), stream("diff"), b"x" * (MAX_ANSWER_BYTES + 1), None])

    async def send() -> AsyncIterator[bytes]:
        answer = next(answers)
        await release.wait()
        if answer is None:
            raise OSError("connection refused")
        yield answer

    shadow = Shadow(lambda: 0.0, max_running=4)
    target = Target(model="v2")
    mirrors = [shadow.begin(request(id=f"r{number}"), target, send, compare=True) for number in range(5)]
    assert mirrors[4] is None
    for mirror in mirrors[:4]:
        assert mirror is not None
        mirror.feed(stream("same"))
        mirror.end(True)
    tasks = list(shadow._tasks)
    release.set()
    await asyncio.wait_for(asyncio.gather(*tasks), 5)
    counts = shadow.counts["v2"]
    assert (counts.same, counts.different, counts.uncompared, counts.failed, counts.skipped) == (1, 1, 1, 1, 1)
    await shadow.stop()


async def test_shadows_of_requests_with_one_name_are_compared_each_with_its_own() -> None:
    """The name is the client's, who may give it twice."""
    release = asyncio.Event()
    answers = iter([stream("one"), stream("two")])

    async def send() -> AsyncIterator[bytes]:
        answer = next(answers)
        await release.wait()
        yield answer

    shadow = Shadow(lambda: 0.0)
    mirrors = [shadow.begin(request(id="same"), Target(model="v2"), send, compare=True) for _ in range(2)]
    for mirror, text in zip(mirrors, ("one", "two"), strict=True):
        assert mirror is not None
        mirror.feed(stream(text))
        mirror.end(True)
    tasks = list(shadow._tasks)
    release.set()
    await asyncio.wait_for(asyncio.gather(*tasks), 5)
    counts = shadow.counts["v2"]
    assert (counts.same, counts.different, counts.failed) == (2, 0, 0)
