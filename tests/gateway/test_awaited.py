"""For which models requests are held while nobody serves them."""

from __future__ import annotations

from typing import Any

from quire.gateway.awaited import MAX_MODELS, AwaitedModels
from quire.gateway.endpoint import Endpoint, Pool
from quire.gateway.request import Api, InferenceRequest
from quire.gateway.traffic.policy import Policy, read_policy


def request(model: str, target: str = "") -> InferenceRequest:
    return InferenceRequest(
        id="r",
        path="/v1/completions",
        api=Api.COMPLETIONS,
        model=model,
        target_model=target or model,
        body=b"{}",
        headers={},
        arrived=0.0,
    )


def endpoint(name: str, *models: str) -> Endpoint:
    return Endpoint(name, "127.0.0.1", 8000, models=frozenset(models) or None)


def policy(*documents: dict[str, Any]) -> Policy:
    return read_policy(list(documents))


def test_a_model_that_was_served_is_awaited_and_one_that_never_was_is_not() -> None:
    pool = Pool()
    awaited = AwaitedModels(pool, Policy)
    assert awaited(request("anything"))  # there is nobody yet: any model may come
    pool.put(endpoint("lives", "m"))
    small = pool.put(endpoint("small"))
    assert awaited(request("other"))  # it has not said what it serves
    small.models = frozenset({"small"})
    assert not awaited(request("other"))
    assert awaited(request(""))
    pool.remove(small.key)
    assert awaited(request("small"))
    assert awaited(request("as-asked", target="small"))
    assert not awaited(request("other"))


def test_an_endpoint_that_moves_is_remembered_by_what_it_served() -> None:
    pool = Pool()
    awaited = AwaitedModels(pool, Policy)
    pool.put(endpoint("lives", "m"))
    pool.put(endpoint("moves", "n"))
    pool.put(Endpoint("moves", "127.0.0.1", 9000, models=frozenset({"p"})))
    assert awaited(request("n"))


def test_what_the_policy_names_as_a_target_is_awaited_from_when_it_says_so() -> None:
    pool = Pool()
    now = Policy()
    awaited = AwaitedModels(pool, lambda: now)
    pool.put(endpoint("lives", "m"))
    assert not awaited(request("v1"))
    spec = {"model": "chat", "routes": [{"targets": [{"model": "v1"}, {"selector": {"a": "b"}}]}]}
    spec["fallback"] = [{"model": "small"}]
    rewrite = {"rules": [{"matches": [{"model": {"value": "old"}}], "targets": [{"modelRewrite": "new"}]}]}
    now = policy(
        {"apiVersion": "quire.ai/v1alpha1", "kind": "TrafficPolicy", "metadata": {"name": "t"}, "spec": spec},
        {
            "apiVersion": "llm-d.ai/v1alpha2",
            "kind": "InferenceModelRewrite",
            "metadata": {"name": "r"},
            "spec": rewrite,
        },
    )
    assert [name for name in ("v1", "chat", "small", "new", "old", "x") if awaited(request(name))] == [
        "v1", "chat", "small", "new",
    ]  # fmt: skip


def test_as_many_names_are_remembered_as_may_be_and_those_asked_for_stay() -> None:
    pool = Pool()
    awaited = AwaitedModels(pool, Policy)
    pool.put(endpoint("lives", "m"))
    pool.remove(pool.put(endpoint("first", "wanted", "unwanted")).key)
    for number in range(MAX_MODELS):
        pool.remove(pool.put(endpoint("passes", f"m{number}")).key)
        assert awaited(request("wanted"))
    assert not awaited(request("unwanted"))
    assert not awaited(request("m0"))
    assert awaited(request("m2"))
