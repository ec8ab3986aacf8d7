"""What older configurations say in other words, put into today's; each change is told.

Of Gateway API Inference Extension and llm-d before 0.9: scorers that were their own producers, and parameters that have
gone since.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from quire.gateway.picker_config import PluginSpec
from quire.gateway.producers.precise import PreciseParameters
from quire.gateway.producers.prefix import PrefixParameters

APPROXIMATE: Final = "approx-prefix-cache-producer"
PRECISE: Final = "precise-prefix-cache-producer"
SCORER: Final = "prefix-cache-scorer"
_PRODUCER_NAME: Final = "prefixMatchInfoProducerName"
_INDEX_FIELDS: Final = frozenset(
    ("hashBlockSize", *PrefixParameters.__struct_encode_fields__, *PrefixParameters.WITHOUT_EFFECT)
)
_PRECISE_FIELDS: Final = frozenset((*PreciseParameters.__struct_encode_fields__, *PreciseParameters.WITHOUT_EFFECT))


def modernise(spec: PluginSpec) -> tuple[Sequence[PluginSpec], Sequence[str]]:
    """The plugins that stand for this one, and what to tell of it."""
    parameters = dict(spec.parameters or {})
    if spec.type == "precise-prefix-cache-scorer":
        return _split(spec, PRECISE, {name: parameters.pop(name) for name in _PRECISE_FIELDS & set(parameters)})
    if spec.type == SCORER and not _INDEX_FIELDS.isdisjoint(parameters):
        return _split(spec, APPROXIMATE, {name: parameters[name] for name in _INDEX_FIELDS & set(parameters)})
    if spec.type == "burst-prefix-cache-producer":
        note = f"plugin {spec.label} is an {APPROXIMATE} here, which sees a burst's first request before its second"
        note += f"; without effect are: {', '.join(parameters)}" if parameters else ""
        return [PluginSpec(type=APPROXIMATE, name=spec.label)], [note]
    return [spec], []


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
