"""A stock plugin by its type, and endpoints and requests to try it with."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest

from quire.gateway.endpoint import Endpoint, EndpointMetrics, Load, Pool
from quire.gateway.plugin import Plugin, Services
from quire.gateway.plugins.stock import stock_plugins
from quire.gateway.request import Api, InferenceRequest, PrefixMatch

Make = Callable[..., Any]


@pytest.fixture(scope="session")
def make() -> Make:
    registry = stock_plugins()

    def plugin(type_name: str, *, others: dict[str, Plugin] | None = None, seed: int = 1, **parameters: Any) -> Any:
        factory = registry.get(type_name)
        assert factory is not None
        services = Services(Pool(), lambda: 0.0, random.Random(seed), (others or {}).__getitem__)
        return factory(parameters, services)

    return plugin


@pytest.fixture(scope="session")
def endpoint() -> Make:
    def one(name: str, *, labels: dict[str, str] | None = None, load: Load | None = None, **metrics: Any) -> Endpoint:
        found = Endpoint(name, "10.0.0.1", 8000 + ord(name[0]), labels=labels or {}, load=load or Load())
        found.metrics = EndpointMetrics(**{"time": 0.0} | metrics) if metrics else None
        return found

    return one


@pytest.fixture(scope="session")
def request_for() -> Make:
    def one(*, matches: dict[str, float] | None = None, **fields: Any) -> InferenceRequest:
        values: dict[str, Any] = {"id": "r", "path": "/v1/completions", "api": Api.COMPLETIONS, "model": "m"}
        values |= {"body": b"{}", "headers": {}, "arrived": 0.0, "prompt_tokens": 1000, "target_model": "m"}
        if matches is not None:
            values["prefix"] = {"p": {f"default/{name}": PrefixMatch(int(n), n) for name, n in matches.items()}}
        return InferenceRequest(**(values | fields))

    return one
