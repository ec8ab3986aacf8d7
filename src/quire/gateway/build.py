"""From an `EndpointPickerConfig` to the objects that pick.

llm-d's rules for what a file leaves out: a scorer without a weight has 1; a profile without a picker takes the one with
the highest score; one profile needs no handler; without profiles all plugins form one; without plugins the profile is
queue 2, KV cache 2, prefix 3. What a plugin needs to know and no other finds out is found out by a producer that is
added. Without a file at all the policy is quire's own.
"""

from __future__ import annotations

import difflib
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Final

from quire.core.errors import ConfigError
from quire.core.registry import Registry
from quire.gateway.endpoint import Clock, Pool
from quire.gateway.flow.limits import UsageLimitPolicy
from quire.gateway.flow.policies import FairnessPolicy, OrderingPolicy
from quire.gateway.flow.saturation import SaturationDetector
from quire.gateway.flow.settings import plugins_in_use
from quire.gateway.legacy import modernise
from quire.gateway.picker_config import EndpointPickerConfig, PluginSpec, SchedulingPlugin, SchedulingProfile
from quire.gateway.plugin import (
    Admitter,
    Decider,
    Factory,
    Filter,
    Observer,
    Parameters,
    Picker,
    Plugin,
    Producer,
    ProfileHandler,
    Scorer,
    Services,
    read_parameters,
)
from quire.gateway.plugins.stock import ALIASES, MEANINGLESS
from quire.gateway.producers.tokens import EXACT
from quire.gateway.schedule import Profile, Scheduler, WeightedScorer
from quire.gateway.unheeded import FILE_DISCOVERY, check_references, sections_without_effect

MAX_WEIGHT: Final = 1e9
"""Of a scorer: sums of what is larger lose what is small."""
DEFAULT_PICKER: Final = "max-score-picker"
DEFAULT_HANDLER: Final = "single-profile-handler"
_LLM_D_DEFAULT: Final = (("queue-scorer", 2.0), ("kv-cache-utilization-scorer", 2.0), ("prefix-cache-scorer", 3.0))
_OWN_DEFAULT: Final = ("token-producer", "approx-prefix-cache-producer", "expected-cost-scorer", DEFAULT_PICKER)
_NEEDS: Final[Mapping[str, str]] = {
    "prefix-cache-scorer": "approx-prefix-cache-producer",
    "prefix-cache-affinity-filter": "approx-prefix-cache-producer",
    "prefix-based-pd-decider": "approx-prefix-cache-producer",
    "no-hit-lru-scorer": "approx-prefix-cache-producer",
    "expected-cost-scorer": "approx-prefix-cache-producer",
    "approx-prefix-cache-producer": "token-producer",
    "precise-prefix-cache-producer": "token-producer",
    "context-length-aware": "token-producer",
    "latency-scorer": "predicted-latency-producer",
    "slo-headroom-tier-filter": "predicted-latency-producer",
    "latency-slo-admitter": "predicted-latency-producer",
}
"""Which producer is added for a plugin, if none of its kind is there."""
_PREFIX_PRODUCERS: Final = frozenset({"approx-prefix-cache-producer", "precise-prefix-cache-producer"})
_REFERRED_TO: Final = (
    *(Filter, Scorer, Picker, Decider),
    *(SaturationDetector, FairnessPolicy, OrderingPolicy, UsageLimitPolicy),
)
"""What does nothing by itself: a profile, a handler, flow control or another plugin names it."""


class FileDiscoveryParameters(Parameters, frozen=True):
    WITHOUT_EFFECT: ClassVar[Mapping[str, str]] = {"watchFile": "the file is always followed"}
    path: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildResult:
    scheduler: Scheduler
    producers: Sequence[Producer]
    admitters: Sequence[Admitter]
    observers: Sequence[Observer]
    plugins: Mapping[str, Plugin]
    """By name: those of flow control are among them."""
    endpoints_files: Sequence[Path] = ()
    """Of file discovery."""
    warnings: Sequence[str] = ()
    """What the file asks for that has no effect here, each with the reason."""


@dataclass(slots=True)
class _Builder:
    registry: Registry[Factory]
    pool: Pool
    clock: Clock
    rng: random.Random
    shared: dict[str, Any]
    specs: dict[str, PluginSpec] = field(default_factory=dict)
    types: dict[str, str] = field(default_factory=dict)
    """By name: the type, by its present name."""
    made: dict[str, Plugin] = field(default_factory=dict)
    making: list[str] = field(default_factory=list)
    asked: set[str] = field(default_factory=set)
    """Names of those that other plugins work with."""
    files: list[Path] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def declare(self, spec: PluginSpec) -> None:
        """Raises `ConfigError` for a type that nobody knows."""
        specs, notes = modernise(spec)
        self.warnings += notes
        for one in specs:
            self._declare(one)

    def _declare(self, spec: PluginSpec) -> None:
        type_name = ALIASES.get(spec.type, spec.type)
        if type_name != spec.type:
            self.warnings.append(f"plugin type {spec.type} is called {type_name} now")
        if type_name in MEANINGLESS:
            self.warnings.append(f"plugin {spec.label} has no effect: {MEANINGLESS[type_name]}")
            return
        if type_name == FILE_DISCOVERY:
            self._take_file(spec)
            return
        if type_name not in self.registry:
            near = difflib.get_close_matches(type_name, self.registry.names(), n=3, cutoff=0.4)
            raise ConfigError(
                f"There is no plugin of the type {spec.type!r}.",
                param="plugins",
                remedy=f"Did you mean {' or '.join(near)}?" if near else "docs/gateway-plugins.md lists all.",
            )
        self.specs[spec.label] = spec
        self.types[spec.label] = type_name

    def _take_file(self, spec: PluginSpec) -> None:
        path = read_parameters(FileDiscoveryParameters, spec.parameters or {}, spec.label, self.warnings.append).path
        if not path:
            raise ConfigError(f"{FILE_DISCOVERY} lacks its path.", param="plugins", remedy="Name the endpoints' file.")
        self.files.append(Path(path))

    def plugin(self, name: str) -> Plugin:
        """The plugin of this name, made when it is first asked for. Raises `ConfigError`."""
        if name in self.made:
            return self.made[name]
        if name not in self.specs:
            raise ConfigError(
                f"A plugin {name!r} is referred to that is not there.",
                param="plugins",
                remedy=f"Known are: {', '.join(self.specs) or 'none'}.",
            )
        if name in self.making:
            raise ConfigError(f"Plugins refer to each other in a ring: {' → '.join([*self.making, name])}.")
        self.making.append(name)
        factory = self.registry.get(self.types[name])
        assert factory is not None
        services = Services(self.pool, self.clock, self.rng, self._ask, self.shared, self.warnings.append)
        plugin = factory(self.specs[name].parameters or {}, services)
        plugin.name = name
        self.made[name] = plugin
        self.making.pop()
        return plugin

    def _ask(self, name: str) -> Plugin:
        self.asked.add(name)
        return self.plugin(name)

    def add_named_producers(self) -> None:
        """Those that parameters name, which may be stock ones that the file does not list."""
        for label, spec in list(self.specs.items()):
            for parameter, name in (spec.parameters or {}).items():
                if not parameter.endswith("ProducerName") or not name or name in self.types:
                    continue
                if not isinstance(name, str) or name not in self.registry:
                    raise ConfigError(
                        f"{parameter} of plugin {label!r} is {name!r}, and there is no such plugin.",
                        param="plugins",
                        remedy=f"Known are: {', '.join(self.types)}.",
                    )
                self.declare(PluginSpec(type=name))

    def add_producers(self) -> None:
        """Those that are needed and not there."""
        self.add_named_producers()
        names = list(self.types)
        while names:
            needed = _NEEDS.get(self.types[names.pop()])
            if needed is None or needed in self.types.values():
                continue
            if needed in _PREFIX_PRODUCERS and not _PREFIX_PRODUCERS.isdisjoint(self.types.values()):
                continue
            self.declare(PluginSpec(type=needed))
            names.append(needed)

    def of_kind(self, kind: type[Plugin]) -> list[str]:
        return [name for name in self.types if isinstance(self.plugin(name), kind)]

    def profile(self, wanted: SchedulingProfile) -> Profile:
        filters: list[Filter] = []
        scorers: list[WeightedScorer] = []
        picked: list[Picker] = []
        for entry in wanted.plugins:
            if entry.plugin_ref not in self.types:
                continue  # one without meaning here, which was told
            plugin = self.plugin(entry.plugin_ref)
            if isinstance(plugin, Filter):
                filters.append(plugin)
            if isinstance(plugin, Scorer):
                scorers.append(WeightedScorer(plugin, _weight(entry)))
            elif entry.weight is not None:
                self.warnings.append(f"the weight of {entry.plugin_ref} has no effect: it is no scorer")
            if isinstance(plugin, Picker):
                picked.append(plugin)
        if len(picked) > 1:
            names = " and ".join(picker.name for picker in picked)
            raise ConfigError(f"Profile {wanted.name!r} has several pickers: {names}.", remedy="Keep one.")
        return Profile(wanted.name, filters, scorers, picked[0] if picked else self._picker())

    def _picker(self) -> Picker:
        """For a profile without one: that of the file, as in llm-d, else the default."""
        there = self.of_kind(Picker)
        picker: Picker = self._default(there[0] if there else DEFAULT_PICKER, Picker)
        return picker

    def _default(self, name: str, kind: type[Any]) -> Any:
        """The plugin of this name; if it is not there, one is made of the type that is called so."""
        if name not in self.types:
            self.declare(PluginSpec(type=name))
        plugin = self.plugin(name)
        assert isinstance(plugin, kind)
        return plugin

    def handler(self, profiles: Sequence[str]) -> ProfileHandler:
        handler = self._handler(len(profiles))
        missing = [name for name in handler.required_profiles(profiles) if name not in profiles]
        if missing:
            raise ConfigError(
                f"{handler.name} needs a scheduling profile named {' and one named '.join(map(repr, missing))}.",
                param="schedulingProfiles",
                remedy=f"There are: {', '.join(profiles)}. Add it, or name another one in the handler's parameters.",
            )
        if handler.max_profiles is not None and len(profiles) > handler.max_profiles:
            raise ConfigError(
                f"{handler.name} works with {handler.max_profiles} scheduling profile, and there are {len(profiles)}.",
                param="schedulingProfiles",
                remedy="Keep one, or take a handler for several, such as disagg-profile-handler.",
            )
        for name in profiles:
            if name not in handler.used_profiles(profiles):
                self.warnings.append(f"profile {name} has no effect: {handler.name} never runs it")
        return handler

    def _handler(self, num_profiles: int) -> ProfileHandler:
        found = self.of_kind(ProfileHandler)
        if len(found) > 1:
            raise ConfigError(f"There are several profile handlers: {', '.join(found)}.", remedy="Keep one.")
        if found:
            plugin = self.plugin(found[0])
            assert isinstance(plugin, ProfileHandler)
            return plugin
        if num_profiles > 1:
            raise ConfigError(
                f"There are {num_profiles} scheduling profiles and no profile handler.",
                param="plugins",
                remedy="Add one, such as disagg-profile-handler.",
            )
        handler: ProfileHandler = self._default(DEFAULT_HANDLER, ProfileHandler)
        return handler


def _weight(entry: SchedulingPlugin) -> float:
    """Raises `ConfigError`: with a weight that is no number no total can be compared with another."""
    weight = 1.0 if entry.weight is None else entry.weight
    if not abs(weight) <= MAX_WEIGHT:
        raise ConfigError(
            f"The weight of {entry.plugin_ref!r} is {weight}.",
            param="schedulingProfiles",
            remedy=f"It is a number from {-MAX_WEIGHT:g} to {MAX_WEIGHT:g}.",
        )
    return weight


def build_picker(
    config: EndpointPickerConfig | None,
    registry: Registry[Factory],
    *,
    pool: Pool,
    clock: Clock,
    rng: random.Random,
    shared: dict[str, Any] | None = None,
) -> BuildResult:
    """`shared`: see `Services`. Raises `ConfigError`."""
    builder = _Builder(registry, pool, clock, rng, {} if shared is None else shared)
    if config is None:
        precise = ("precise-prefix-cache-producer",) if builder.shared.get(EXACT) else ()
        for type_name in (*_OWN_DEFAULT, *precise):
            builder.declare(PluginSpec(type=type_name))
    else:
        for spec in config.plugins:
            builder.declare(spec)
        check_references(config, MEANINGLESS)
        builder.warnings += sections_without_effect(config)
    profiles = _profiles(config, builder)
    builder.add_producers()
    made = {profile.name: builder.profile(profile) for profile in profiles}
    handler = builder.handler(tuple(made))
    plugins = {name: builder.plugin(name) for name in builder.types}
    used = {entry.plugin_ref for profile in profiles for entry in profile.plugins} | builder.asked
    used |= {profile.picker.name for profile in made.values()}
    used |= plugins_in_use(config) if config is not None else set()
    for name, plugin in plugins.items():
        if isinstance(plugin, _REFERRED_TO) and not isinstance(plugin, Producer) and name not in used:
            builder.warnings.append(f"plugin {name} has no effect: nothing refers to it")
    return BuildResult(
        scheduler=Scheduler(made, handler),
        producers=_in_order([plugin for plugin in plugins.values() if isinstance(plugin, Producer)], builder.types),
        admitters=[plugin for plugin in plugins.values() if isinstance(plugin, Admitter)],
        observers=[plugin for plugin in plugins.values() if isinstance(plugin, Observer)],
        plugins=plugins,
        endpoints_files=builder.files,
        warnings=builder.warnings,
    )


def _profiles(config: EndpointPickerConfig | None, builder: _Builder) -> Sequence[SchedulingProfile]:
    if config is not None and config.scheduling_profiles:
        return config.scheduling_profiles
    scheduling = (*builder.of_kind(Filter), *builder.of_kind(Scorer), *builder.of_kind(Picker))
    entries = [SchedulingPlugin(plugin_ref=name) for name in dict.fromkeys(scheduling)]
    if not any(isinstance(builder.plugin(entry.plugin_ref), Scorer) for entry in entries):
        for type_name, weight in _LLM_D_DEFAULT:
            builder.declare(PluginSpec(type=type_name))
            entries.append(SchedulingPlugin(plugin_ref=type_name, weight=weight))
    return [SchedulingProfile(name="default", plugins=tuple(entries))]


def _in_order(producers: Sequence[Producer], types: Mapping[str, str]) -> Sequence[Producer]:
    """As configured, but tokens first and predictions last: the others build on the former, and the latter on them."""
    place = {"token-producer": 0, "predicted-latency-producer": 2}
    return sorted(producers, key=lambda producer: place.get(types[producer.name], 1))
