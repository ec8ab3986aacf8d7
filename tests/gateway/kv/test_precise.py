"""`precise-prefix-cache-producer` with llm-d's parameters, as its guides write them."""

import random

import pytest
import yaml

from quire.core.errors import ConfigError
from quire.gateway.build import build_picker
from quire.gateway.endpoint import Endpoint, Pool
from quire.gateway.kv.index import KVIndex
from quire.gateway.kv.subscriptions import EventPorts
from quire.gateway.picker_config import read_picker_config
from quire.gateway.plugins.stock import stock_plugins
from quire.gateway.request import Api, InferenceRequest
from quire.wire.kv_events import BlockStored, KVEventBatch

CONFIG = """
apiVersion: llm-d.ai/v1alpha1
kind: EndpointPickerConfig
plugins:
- type: token-producer
- type: precise-prefix-cache-producer
  name: precise
  parameters: {parameters}
- type: prefix-cache-scorer
  parameters:
    prefixMatchInfoProducerName: precise
schedulingProfiles:
- name: default
  plugins:
  - pluginRef: prefix-cache-scorer
    weight: 2
"""
GUIDE = """
    speculativeIndexing: false
    speculativeTTL: 2s
    indexerConfig:
      kvBlockIndexConfig: {inMemoryConfig: {podCacheSize: 128}}
      kvCacheBackendConfigs: [{name: gpu, weight: 1.0}, {name: cpu, weight: 0.25}]
    tokenProcessorConfig: {blockSize: 64, hashSeed: "42"}
    kvEventsConfig:
      topicFilter: "kv@"
      concurrency: 4
      discoverPods: true
      podDiscoveryConfig: {socketPort: 5556, replaySocketPort: 5559}
"""


def build(parameters: str, index: KVIndex):
    document = yaml.safe_load(CONFIG.replace("{parameters}", parameters))
    return build_picker(
        read_picker_config(document),
        stock_plugins(),
        pool=Pool(),
        clock=lambda: 0.0,
        rng=random.Random(1),
        shared={"kv_index": index},
    )


def request(*token_ids: int) -> InferenceRequest:
    return InferenceRequest(
        id="r", path="/v1/completions", api=Api.COMPLETIONS, model="m", body=b"", headers={}, arrived=0.0,
        target_model="m", token_ids=token_ids, prompt_tokens=len(token_ids),
    )  # fmt: skip


def test_a_guides_parameters_are_understood():
    index = KVIndex()
    made = build(GUIDE, index)
    producer = made.plugins["precise"]
    assert producer.ports(Endpoint("e", "h", 1)) == EventPorts(events=5556, replay=5559)
    moved = BlockStored([1], None, [], 2, medium="CPU")
    index.apply("default/a", KVEventBatch(0.0, [BlockStored([1, 2], None, [1, 2, 3, 4], 2)], 0))
    index.apply("default/b", KVEventBatch(0.0, [BlockStored([1], None, [1, 2], 2, medium="CPU"), moved], 0))
    asked = request(1, 2, 3, 4)
    producer.produce(asked, [])
    found = asked.prefix["precise"]
    assert {name: (match.tokens, match.weighted_tokens) for name, match in found.items()} == {
        "default/a": (4, 4.0),
        "default/b": (2, 0.5),
    }
    endpoints = [Endpoint(name, "h", 1) for name in ("a", "b", "c")]
    assert made.scheduler.schedule(asked, endpoints).endpoint.name == "a"


def test_without_parameters_engines_are_heard_at_llm_ds_port():
    made = build("{}", KVIndex())
    assert made.plugins["precise"].ports(Endpoint("e", "h", 1)) == EventPorts(events=5557)


def test_prompts_are_counted_before_anything_is_known():
    """So that the doctor can tell that no event has come although prompts have."""
    index = KVIndex()
    index.add("default/a")
    producer = build("{}", index).plugins["precise"]
    for _ in range(3):
        producer.produce(request(1, 2, 3), [])
    assert index.health()["default/a"].queries == 3


@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        ("{kvEventsConfig: {podDiscoveryConfig: 5}}", "podDiscoveryConfig"),
        ("{kvEventsConfig: {podDiscoveryConfig: {socketPort: 70000}}}", "socketPort is 70000"),
        ("{kvEventsConfig: {podDiscoveryConfig: {socketPort: a}}}", "socketPort is 'a'"),
        ("{indexerConfig: {kvCacheBackendConfigs: [{name: gpu, weight: 2}]}}", "weight is 2.0"),
        ("{indexerConfig: {kvCacheBackendConfigs: [gpu]}}", "kvCacheBackendConfigs"),
        ("{indexerConfig: {kvCacheBackendConfigs: {name: gpu}}}", "kvCacheBackendConfigs"),
        ("{kvEvents: {}}", "kvEvents"),
    ],
)
def test_parameters_that_are_wrong_are_named(parameters, words):
    with pytest.raises(ConfigError, match="precise") as raised:
        build(parameters, KVIndex())
    assert words in raised.value.message


def test_what_has_no_effect_is_said():
    notes = build("{speculativeIndexing: true, kvEventsConfig: {zmqEndpoint: 'tcp://*:5557'}}", KVIndex()).warnings
    assert any("speculativeIndexing" in note for note in notes)
    assert any("kvEventsConfig.zmqEndpoint" in note for note in notes)
    told = " ".join(build(GUIDE, KVIndex()).warnings)
    for name in (
        "speculativeTTL", "indexerConfig.kvBlockIndexConfig", "tokenProcessorConfig", "kvEventsConfig.topicFilter",
        "kvEventsConfig.concurrency", "kvEventsConfig.discoverPods",
    ):  # fmt: skip
        assert f" {name} " in told
    assert "socketPort" not in told
