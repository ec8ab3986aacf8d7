"""Whatever endpoints say of themselves, and whatever their answers claim, somebody is chosen and every total is a
number: under the default policy, llm-d's default, and each scorer and picker on its own."""

from __future__ import annotations

import asyncio
import json
import math
import random
from collections.abc import Mapping
from typing import Any

import pytest
import structlog
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from quire.gateway.build import BuildResult, build_picker
from quire.gateway.director import Director
from quire.gateway.endpoint import Endpoint, Pool
from quire.gateway.errors import Saturated
from quire.gateway.explain import Explainer
from quire.gateway.kv.index import KVIndex
from quire.gateway.picker_config import read_picker_config
from quire.gateway.plugins.stock import ADMITTERS, PICKERS, SCORERS, stock_plugins
from quire.gateway.request import Api, InferenceRequest, Outcome
from quire.gateway.scrape import UnreadablePage, parse_metrics

NAMES = (
    "vllm:num_requests_waiting",
    "vllm:num_requests_running",
    "vllm:kv_cache_usage_perc",
    "vllm:lora_requests_info",
    "vllm:cache_config_info",
    "sglang:token_usage",
    "tgi_queue_size",
    "quire_num_waiting_tokens",
    "quire_prefill_seconds_per_token",
    "quire_decode_seconds_per_step",
)
NUMBERS = st.one_of(
    st.floats(),
    st.sampled_from([0.0, 1.0, 5e-324, 1e-300, 1e15, 1e308, -1e308, math.inf, -math.inf, math.nan, 2.0**63]),
    st.integers(-(2**70), 2**70),
    st.sampled_from(["", "x", "1e400", "-1e400", "1_0", "0x1", "9" * 400]),
)
LABELS = st.fixed_dictionaries(
    {},
    optional={
        "block_size": NUMBERS,
        "num_gpu_blocks": NUMBERS,
        "max_lora": NUMBERS,
        "running_lora_adapters": st.sampled_from(["", "m", "x,y", ",,,"]),
        "waiting_lora_adapters": st.sampled_from(["", "m"]),
    },
)


def line(sample: tuple[str, Mapping[str, object], object]) -> str:
    name, labels, number = sample
    said = ",".join(f'{label}="{value}"' for label, value in labels.items())
    return f"{name}{{{said}}} {number}"


PAGES = st.lists(st.tuples(st.sampled_from(NAMES), LABELS, NUMBERS), max_size=8).map(
    lambda samples: "\n".join(map(line, samples))
)
REQUIRED: Mapping[str, Mapping[str, Any]] = {
    "header-label-affinity-scorer": {"headerName": "X-Zone", "labelKey": "zone"},
    "endpoint-attribute-scorer": {"attributeKey": "waiting-queue", "algorithm": {"type": "linear_lower_is_better"}},
}
CONFIGS: Mapping[str, Mapping[str, Any] | None] = {
    "quire's default": None,
    "llm-d's default": {},
    "every scorer and admitter": {
        "plugins": [{"type": one.type_name, "parameters": REQUIRED.get(one.type_name, {})} for one in SCORERS]
        + [{"type": one.type_name} for one in ADMITTERS]
        + [{"type": "max-score-picker", "parameters": {"maxNumOfEndpoints": 3}}],
    },
    **{
        f"{one.type_name} alone": {
            "plugins": [{"type": one.type_name, "parameters": REQUIRED.get(one.type_name, {})}],
            "schedulingProfiles": [{"name": "d", "plugins": [{"pluginRef": one.type_name, "weight": weight}]}],
        }
        for one, weight in zip(SCORERS, [1e9, -1e9, 1e-300, -1.0, 0.0, 3.0] * len(SCORERS), strict=False)
    },
    **{
        f"expected-cost-scorer and {one.type_name}": {
            "plugins": [{"type": "expected-cost-scorer"}, {"type": one.type_name}],
        }
        for one in PICKERS
    },
}
TOKENS = st.none() | st.integers(0, 3) | st.integers(0, 2**31 - 1) | st.just(2**31 - 1)
ANSWERS = st.builds(
    Outcome,
    status=st.sampled_from([200, 200, 200, 500, None]),
    output_tokens=TOKENS,
    prompt_tokens=TOKENS,
    cached_tokens=TOKENS,
)
SECONDS = st.sampled_from([0.0, 0.0, 1e-9, 0.1, 3.0, 6.0, 1e5])
SLOS = st.none() | st.floats(0, 1e6)
STEPS = st.lists(
    st.tuples(
        st.lists(st.tuples(st.integers(0, 4), PAGES), max_size=3),
        st.sets(st.integers(0, 4), max_size=4),
        st.builds(
            dict,
            prompt=st.sampled_from([b"", b"x", b"p" * 2000, b"p" * 1000 + b"q" * 1000]),
            stream=st.booleans(),
            max_tokens=st.none() | st.integers(0, 2**31),
            objective=st.sampled_from(["", "low"]),
            slo_ttft=SLOS,
            slo_tpot=SLOS,
        ),
        ANSWERS,
        SECONDS,
        SECONDS,
    ),
    max_size=6,
)


class World:
    def __init__(self, config: Mapping[str, Any] | None) -> None:
        self.now = 1000.0
        self.pool = Pool()
        self.endpoints = [Endpoint(f"e{number}", "127.0.0.1", 8000 + number) for number in range(5)]
        self.explainer = Explainer(100, self.clock)
        built = self._build(config)
        self.director = Director(
            pool=self.pool,
            scheduler=built.scheduler,
            clock=self.clock,
            producers=built.producers,
            admitters=built.admitters,
            observers=[*built.observers, self.explainer],
            priorities={"low": -1},
            chosen=self.explainer.chosen,
        )

    def clock(self) -> float:
        return self.now

    def _build(self, config: Mapping[str, Any] | None) -> BuildResult:
        head = {"apiVersion": "llm-d.ai/v1alpha1", "kind": "EndpointPickerConfig"}
        return build_picker(
            None if config is None else read_picker_config({**head, **config}),
            stock_plugins(),
            pool=self.pool,
            clock=self.clock,
            rng=random.Random(1),
            shared={"kv_index": KVIndex()},
        )

    def tell(self, number: int, page: str) -> None:
        try:
            self.endpoints[number].metrics = parse_metrics(page, self.now)
        except UnreadablePage:
            return

    def has(self, away: set[int]) -> None:
        for number, endpoint in enumerate(self.endpoints):
            if number in away:
                self.pool.remove(endpoint.key)
            else:
                self.pool.put(endpoint)

    async def serve(self, request: InferenceRequest, outcome: Outcome, before: float, after: float) -> None:
        director = self.director
        try:
            choice = await director.choose(request)
        except Saturated:
            assert request.priority < 0, "only what may be turned away is"
            return
        assert choice.endpoint in self.pool.all
        for trace in choice.traces:
            assert all(map(math.isfinite, trace.totals))
            assert all(math.isfinite(score) for given in trace.scores for score in given.scores)
        attempt = director.sent(request, choice.endpoint, choice)
        self.now += before
        director.first_byte(request, attempt)
        self.now += after
        director.finished(request, attempt, outcome)
        director.abandon(request)
        json.dumps(self.explainer.explain(request.id), allow_nan=False)


@pytest.mark.parametrize("name", CONFIGS)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(STEPS)
def test_somebody_is_chosen_by_totals_that_are_numbers(name: str, steps: list[Any]) -> None:
    async def run() -> None:
        world = World(CONFIGS[name])
        for index, (pages, away, fields, outcome, before, after) in enumerate(steps):
            world.has(away)
            for number, page in pages:
                world.tell(number, page)
            values = {"id": str(index), "path": "/v1/completions", "api": Api.COMPLETIONS, "model": "m", "body": b"{}"}
            request = InferenceRequest(**(values | {"headers": {}, "arrived": world.now} | fields))  # type: ignore[arg-type]
            await world.serve(request, outcome, before, after)

    with structlog.testing.capture_logs() as logs:
        asyncio.run(run())
    assert [entry for entry in logs if entry["event"] in ("observer_failed", "producer_failed")] == []
