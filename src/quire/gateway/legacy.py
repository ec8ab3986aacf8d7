"""What older configurations say in other words, put into today's; each change is told.

Of Gateway API Inference Extension and llm-d before 0.9: scorers that were their own producers, and parameters that have
gone since.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from quire.gateway.picker_config import PluginSpec
from quire.gateway.producers.precise import PreciseParameters
from quire.gateway.producers.prefix import PrefixParameters

APPROXIMATE: Final = "approx-prefix-cache-producer"
PRECISE: Final = "precise-prefix-cache-producer"
SCORER: Final = "prefix-cache-scorer"
_PRODUCER_NAME: Final = "prefixMatchInfoProducerName"
_INDEX_FIELDS: Final = frozenset(PrefixParameters.__struct_encode_fields__) | {"hashBlockSize"}
_PRECISE_FIELDS: Final = frozenset(PreciseParameters.__struct_encode_fields__)
_SESSION: Final = dict.fromkeys(
    ("profileName", "evictionSweepSeconds", "missThreshold"), "a session is bound to who served it last, until its time"
)
_WITHOUT_EFFECT: Final[Mapping[str, Mapping[str, str]]] = {
    APPROXIMATE: {"prefixHashSource": "prefixes are always hashed from the request"},
    "active-request-scorer": {"requestTimeout": "open requests are counted until they are over"},
    "no-hit-lru-scorer": dict.fromkeys(("prefixPluginType", "prefixPluginName"), "llm-d never used it either"),
    "session-affinity-scorer": _SESSION,
    "session-affinity-filter": _SESSION,
    "token-producer": {"backend": "vllm, where it is given, says by itself who tokenises"},
}


def modernise(spec: PluginSpec) -> tuple[Sequence[PluginSpec], Sequence[str]]:
    """The plugins that stand for this one, and what to tell of it."""
    parameters = dict(spec.parameters or {})
    if spec.type == "precise-prefix-cache-scorer":
        return _split(spec, PRECISE, {name: parameters.pop(name) for name in _PRECISE_FIELDS & set(parameters)})
    if spec.type == SCORER and not _INDEX_FIELDS.isdisjoint(parameters):
        return _split(spec, APPROXIMATE, {name: parameters[name] for name in _INDEX_FIELDS & set(parameters)})
    if spec.type == "burst-prefix-cache-producer":
        note = f"plugin {spec.label} is an {APPROXIMATE} here, which sees a burst's first request before its second"
        return [PluginSpec(type=APPROXIMATE, name=spec.label)], [note]
    gone = _WITHOUT_EFFECT.get(spec.type, {})
    notes = [
        f"parameter {name} of plugin {spec.label} has no effect: {gone[name]}" for name in gone if name in parameters
    ]
    if not notes:
        return [spec], []
    kept = {name: value for name, value in parameters.items() if name not in gone}
    return [PluginSpec(type=spec.type, name=spec.name, parameters=kept)], notes


def _split(spec: PluginSpec, producer: str, given: dict[str, Any]) -> tuple[Sequence[PluginSpec], Sequence[str]]:
    """A scorer that was its own producer."""
    left = {name: value for name, value in (spec.parameters or {}).items() if name not in given}
    if "hashBlockSize" in given:
        given["blockSize"] = given.pop("hashBlockSize")
    name = f"{spec.label}-producer"
    notes = [f"plugin {spec.label} was split: a {producer} named {name} finds matches, a {SCORER} scores them"]
    if spec.type != SCORER and left:
        notes += [
            f"parameter {key} of plugin {spec.label} has no effect: quire learns it from the engines" for key in left
        ]
        left = {}
    scorer = PluginSpec(type=SCORER, name=spec.label, parameters={**left, _PRODUCER_NAME: name})
    return [PluginSpec(type=producer, name=name, parameters=given), scorer], notes


def _no_effect(parameter: str, spec: PluginSpec, why: str) -> str:
    return f"parameter {parameter} of plugin {spec.label} has no effect: {why}"
