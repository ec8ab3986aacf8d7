"""From configurations to pickers: llm-d's rules for what a file leaves out, and nothing ignored in silence."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from quire.core.errors import ConfigError
from quire.gateway.build import BuildResult, build_picker
from quire.gateway.director import Director
from quire.gateway.endpoint import ROLE_LABEL, Endpoint, EndpointMetrics, Pool
from quire.gateway.errors import Saturated
from quire.gateway.kv.index import KVIndex
from quire.gateway.picker_config import read_picker_config
from quire.gateway.plugins import reference
from quire.gateway.plugins.stock import stock_plugins
from quire.gateway.request import Api, InferenceRequest
from quire.gateway.schedule import Choice

PROFILE = {"schedulingProfiles": [{"name": "default", "plugins": [{"pluginRef": "queue-scorer"}]}]}
INF, NAN = float("inf"), float("nan")
CONFIGS = sorted((Path(__file__).parent / "picker_configs").glob("*.yaml"))


def pool() -> Pool:
    found = Pool()
    for name, role in (("a", "decode"), ("b", "decode"), ("c", "prefill")):
        found.put(
            Endpoint(name, "127.0.0.1", 8000 + ord(name), labels={ROLE_LABEL: role}, metrics=EndpointMetrics(time=0))
        )
    return found


def build(document: Mapping[str, Any] | None, where: Pool | None = None) -> BuildResult:
    config = None
    if document is not None:
        config = read_picker_config({"apiVersion": "llm-d.ai/v1alpha1", "kind": "EndpointPickerConfig", **document})
    shared = {"kv_index": KVIndex()}
    return build_picker(
        config, stock_plugins(), pool=where or pool(), clock=lambda: 0.0, rng=random.Random(1), shared=shared
    )


def choose(built: BuildResult, where: Pool, **fields: Any) -> Choice:
    director = Director(
        pool=where,
        scheduler=built.scheduler,
        clock=lambda: 0.0,
        producers=[one for one in built.producers if one.name != "token-producer"],
        admitters=built.admitters,
        observers=built.observers,
        priorities={"low": -1},
    )
    values: dict[str, Any] = {"id": "r", "path": "/v1/completions", "api": Api.COMPLETIONS, "model": "m", "body": b"{}"}
    values |= {"headers": {}, "arrived": 0.0, "prompt": b"x" * 4000, "max_tokens": 10}
    request = InferenceRequest(**(values | fields))

    async def run() -> Choice:
        choice = await director.choose(request)
        director.sent(request, choice.endpoint, choice)
        return choice

    return asyncio.run(run())


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_builds_and_schedules(path: Path) -> None:
    where = pool()
    built = build(yaml.safe_load(path.read_text()), where)
    for _ in range(5):
        assert choose(built, where).endpoint in where.all


ALWAYS = "always-disagg-pd-decider"


def handled(handler: str, *profiles: str, **parameters: Any) -> dict[str, Any]:
    """A handler for these profiles."""
    return {
        "plugins": [{"type": ALWAYS}, {"type": handler, "parameters": parameters}],
        "schedulingProfiles": [{"name": name} for name in profiles],
    }


def scorers(built: BuildResult) -> list[tuple[str, float]]:
    return [(one.scorer.name, one.weight) for one in built.scheduler.profiles["default"].scorers]


def test_without_plugins_the_profile_is_llm_ds() -> None:
    built = build({})
    assert scorers(built) == [("queue-scorer", 2), ("kv-cache-utilization-scorer", 2), ("prefix-cache-scorer", 3)]
    assert built.scheduler.profiles["default"].picker.name == "max-score-picker"
    assert built.scheduler.handler.name == "single-profile-handler"
    assert [one.name for one in built.producers] == ["token-producer", "approx-prefix-cache-producer"]


def test_without_a_file_the_policy_is_quires() -> None:
    assert scorers(build(None)) == [("expected-cost-scorer", 1)]


def test_without_profiles_all_plugins_form_one() -> None:
    built = build({"plugins": [{"type": "decode-filter"}, {"type": "token-load-scorer"}, {"type": "random-picker"}]})
    profile = built.scheduler.profiles["default"]
    assert [one.name for one in profile.filters] == ["decode-filter"]
    assert scorers(built) == [("token-load-scorer", 1)]
    assert profile.picker.name == "random-picker"


def test_a_profile_without_picker_takes_the_files() -> None:
    profiles = [{"name": "default", "plugins": [{"pluginRef": "queue-scorer"}]}]
    with_one = {"plugins": [{"type": "queue-scorer"}, {"type": "random-picker"}], "schedulingProfiles": profiles}
    without = {"plugins": [{"type": "queue-scorer"}], "schedulingProfiles": profiles}
    assert build(with_one).scheduler.profiles["default"].picker.name == "random-picker"
    assert build(without).scheduler.profiles["default"].picker.name == "max-score-picker"
    assert scorers(build(without)) == [("queue-scorer", 1.0)]


def test_disaggregated_headers() -> None:
    where = pool()
    built = build(yaml.safe_load((Path(__file__).parent / "picker_configs/disaggregated.yaml").read_text()), where)
    choice = choose(built, where)
    assert choice.endpoint.labels[ROLE_LABEL] == "decode"
    assert choice.conclusion.headers == {"x-prefiller-host-port": "127.0.0.1:8099"}
    short = choose(built, where, id="s", prompt=b"y" * 40)
    assert short.conclusion.headers == {}


def test_older_scorers_are_split() -> None:
    built = build(
        {"plugins": [{"type": "prefix-cache-scorer", "parameters": {"hashBlockSize": 256, "autoTune": False}}]}
    )
    assert [one.name for one in built.producers] == ["token-producer", "prefix-cache-scorer-producer"]
    assert any("was split" in warning for warning in built.warnings)
    where = pool()
    again = build({"plugins": [{"type": "prefix-cache-scorer", "parameters": {"hashBlockSize": 256}}]}, where)
    first, second = choose(again, where), choose(again, where, id="2")
    assert first.endpoint is second.endpoint
    assert max(second.traces[0].totals) > 0.9


def weighted(weight: float) -> Mapping[str, Any]:
    profile = {"name": "default", "plugins": [{"pluginRef": "queue-scorer", "weight": weight}]}
    return {"plugins": [{"type": "queue-scorer"}], "schedulingProfiles": [profile]}


def attribute_scorer(normalization: Mapping[str, Any]) -> Mapping[str, Any]:
    algorithm = {"type": "linear_lower_is_better", "normalization": normalization}
    parameters = {"attributeKey": "waiting-queue", "algorithm": algorithm}
    return {"plugins": [{"type": "endpoint-attribute-scorer", "parameters": parameters}]}


@pytest.mark.parametrize(
    ("document", "says"),
    [
        ({"plugins": [{"type": "queue-scorre"}]}, "queue-scorer"),
        ({"plugins": [{"type": "queue-scorer", "parameters": {"a": 1}}]}, "queue-scorer"),
        ({"plugins": [{"type": "load-aware-scorer", "parameters": {"threshold": "x"}}]}, "threshold"),
        (
            {"plugins": [{"type": "prefix-cache-scorer", "parameters": {"prefixMatchInfoProducerName": "nobody"}}]},
            "nobody",
        ),
        ({"plugins": [{"type": "disagg-profile-handler", "parameters": {"deciders": {"prefill": "x"}}}]}, "'x'"),
        (
            {"plugins": [{"type": "queue-scorer"}], "schedulingProfiles": [{"name": "a"}, {"name": "b"}]},
            "no profile handler",
        ),
        ({"plugins": [{"type": "single-profile-handler"}, {"type": "header-profile-handler"}]}, "several profile"),
        ({"plugins": [{"type": "utilization-filter", "parameters": {"conditions": []}}]}, "conditions"),
        ({"parser": {"pluginRef": "nobody"}}, "'nobody'"),
        ({"requestHandler": {"parsers": [{"pluginRef": "nobody"}]}}, "'nobody'"),
        ({"dataLayer": {"sources": [{"pluginRef": "nobody"}]}}, "'nobody'"),
        ({"dataLayer": {"discovery": {"endpoints": {"pluginRef": "nobody"}}}}, "'nobody'"),
        (
            {
                "plugins": [{"type": "metrics-data-source"}],
                "dataLayer": {"sources": [{"pluginRef": "metrics-data-source", "extractors": [{"pluginRef": "no"}]}]},
            },
            "'no'",
        ),
        ({"schedulingProfiles": [{"name": "a"}, {"name": "a"}]}, "two scheduling profiles are named 'a'"),
        (handled("disagg-profile-handler", "decode", "p", deciders={"prefill": ALWAYS}), "'prefill'"),
        (handled("disagg-profile-handler", "d", "prefill"), "'decode'"),
        (handled("disagg-profile-handler", "decode", deciders={"encode": ALWAYS}), "'encode'"),
        (handled("disagg-profile-handler", "decode", profiles={"fallback": "whole"}), "'whole'"),
        (handled("disagg-profile-handler", "decode", stageOrder="prefill-first"), "'prefill'"),
        (handled("pd-profile-handler", "d", "p", decodeProfile="d", deciderPluginName=ALWAYS), "'prefill'"),
        (handled("header-profile-handler", "a", "b"), "'decode'"),
        (handled("single-profile-handler", "a", "b"), "there are 2"),
        (handled("data-parallel-profile-handler", "a", "b"), "there are 2"),
        ({"plugins": [{"type": "active-request-scorer", "parameters": {"maxBusyScore": NAN}}]}, "maxBusyScore"),
        ({"plugins": [{"type": "latency-scorer", "parameters": {"ttftWeight": INF}}]}, "weight"),
        (attribute_scorer({"fixedRange": {"min": 0, "max": NAN}}), "algorithm"),
        (attribute_scorer({"fixedRange": {"min": 0, "max": INF}}), "fixedRange"),
        (weighted(NAN), "weight of 'queue-scorer' is nan"),
        (weighted(-INF), "weight of 'queue-scorer' is -inf"),
        (weighted(1e308), "weight of 'queue-scorer' is 1e+308"),
    ],
)
def test_errors_say_what(document: Mapping[str, Any], says: str) -> None:
    with pytest.raises(ConfigError) as error:
        build(document)
    assert says in str(error.value)


@pytest.mark.parametrize(
    ("document", "says"),
    [
        ({"plugins": [{"type": "metrics-data-source"}]}, "metrics-data-source"),
        ({"plugins": [{"type": "by-label-selector", "parameters": {"matchLabels": {}}}]}, "label-selector-filter"),
        ({"featureGates": ["experimentalThing"]}, "experimentalThing"),
        ({"plugins": [{"type": "active-request-scorer", "parameters": {"requestTimeout": "2m"}}]}, "requestTimeout"),
        ({"plugins": [{"type": "no-hit-lru-scorer", "parameters": {"prefixPluginName": "p"}}]}, "prefixPluginName"),
        ({"plugins": [{"type": "token-producer", "parameters": {"backend": "estimate"}}]}, "backend"),
        (
            {
                "plugins": [{"type": "queue-scorer"}, {"type": "token-load-scorer"}],
                "schedulingProfiles": [{"name": "default", "plugins": [{"pluginRef": "queue-scorer"}]}],
            },
            "token-load-scorer",
        ),
        (handled("disagg-profile-handler", "decode", "prefill"), "profile prefill"),
        (handled("disagg-profile-handler", "decode"), ALWAYS),
        (handled("disagg-profile-handler", "decode", primaryPort=8000), "primaryPort"),
        ({"plugins": [{"type": "utilization-detector"}, {"type": "queue-scorer"}], **PROFILE}, "utilization-detector"),
        ({"plugins": [{"type": "round-robin-fairness-policy"}]}, "round-robin-fairness-policy"),
        ({"plugins": [{"type": "file-discovery", "parameters": {"path": "x", "watchFile": True}}]}, "watchFile"),
        ({"plugins": [{"type": "burst-prefix-cache-producer", "parameters": {"windowDurationMs": 5}}]}, "windowDur"),
        (
            {
                "plugins": [
                    {
                        "type": "approx-prefix-cache-producer",
                        "parameters": {"maxPrefixTokensToMatch": 5, "maxPrefixBlocksToMatch": 5},
                    }
                ]
            },
            "maxPrefixBlocksToMatch",
        ),
        ({"dataLayer": {"injectDefaults": False}}, "dataLayer.injectDefaults"),
        ({"dataLayer": {"crossReplicaSyncInterval": "1s"}}, "dataLayer.crossReplicaSyncInterval"),
        ({"dataLayer": {"crossReplica": {"syncInterval": "1s"}}}, "dataLayer.crossReplica"),
        ({"parser": {"pluginRef": "openai-parser"}}, "parser has no"),
        (
            {
                "plugins": [{"type": "openai-parser"}],
                "requestHandler": {"parsers": [{"pluginRef": "openai-parser"}]},
            },
            "requestHandler.parsers",
        ),
        (
            {
                "plugins": [{"type": "metrics-data-source"}],
                "dataLayer": {"sources": [{"pluginRef": "metrics-data-source"}]},
            },
            "dataLayer.sources",
        ),
        (
            {
                "plugins": [{"type": "k8s-notification-source", "name": "watch"}],
                "dataLayer": {"discovery": {"pluginRef": "watch"}},
            },
            "dataLayer.discovery",
        ),
    ],
)
def test_what_has_no_effect_is_told(document: Mapping[str, Any], says: str) -> None:
    assert any(says in warning for warning in build(document).warnings)


@pytest.mark.parametrize(
    "extra",
    [
        {"featureGates": ["flowControl"], "flowControl": {"saturationDetector": {"pluginRef": "utilization-detector"}}},
        {"featureGates": ["flowControl"]},  # llm-d's default is called so
        {"saturationDetector": {"pluginRef": "utilization-detector"}},
        {
            "featureGates": ["flowControl"],
            "flowControl": {"saturationDetector": {"pluginRef": "both"}},
            "plugins": [
                {
                    "type": "max-saturation-detector",
                    "name": "both",
                    "parameters": {"detectors": ["concurrency-detector"]},
                },
                {"type": "concurrency-detector"},
                {"type": "queue-scorer"},
            ],
        },
        {
            "featureGates": ["flowControl"],
            "plugins": [{"type": "edf-ordering-policy"}, {"type": "queue-scorer"}],
            "flowControl": {"priorityBands": [{"orderingPolicyRef": "edf-ordering-policy"}]},
        },
        {
            "plugins": [
                {"type": "file-discovery", "name": "file", "parameters": {"path": "x"}},
                {"type": "queue-scorer"},
            ],
            "dataLayer": {"discovery": {"pluginRef": "file"}},
        },
    ],
)
def test_of_what_has_an_effect_nothing_is_told(extra: Mapping[str, Any]) -> None:
    plugins = [{"type": "utilization-detector"}, {"type": "queue-scorer"}]
    assert build({"plugins": plugins, **PROFILE, **extra}).warnings == []


def test_the_latency_admitter_sees_predictions() -> None:
    """It is asked once producers have run."""
    where = pool()
    for endpoint in where:
        endpoint.metrics = EndpointMetrics(time=0, running=50, waiting=50, kv_usage=0.9, decode_seconds_per_step=1.0)
    built = build({"plugins": [{"type": "latency-slo-admitter"}, {"type": "queue-scorer"}]}, where)
    assert "predicted-latency-producer" in [one.name for one in built.producers]
    with pytest.raises(Saturated):
        choose(built, where, objective="low", slo_ttft=1e-9)
    assert choose(built, where, slo_ttft=1e-9)


def test_out_of_tree_plugins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    info = tmp_path / "elsewhere-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: elsewhere\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[quire.gateway_plugins]\nby-name-scorer = elsewhere_plugin:make\n")
    (tmp_path / "elsewhere_plugin.py").write_text(
        "from quire.gateway.plugin import Scorer\n"
        "class ByName(Scorer):\n"
        "    def __init__(self, wanted): self.wanted = wanted\n"
        "    def score(self, request, candidates): return [float(c.name == self.wanted) for c in candidates]\n"
        "def make(parameters, services): return ByName(parameters['wanted'])\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    where = pool()
    built = build({"plugins": [{"type": "by-name-scorer", "parameters": {"wanted": "b"}}]}, where)
    assert choose(built, where).endpoint.name == "b"


def test_the_page_of_plugins_is_what_the_code_says() -> None:
    page = Path(__file__).parents[2] / "docs/gateway-plugins.md"
    assert page.read_text() == reference.page(), "python -m quire.gateway.plugins.reference > docs/gateway-plugins.md"
