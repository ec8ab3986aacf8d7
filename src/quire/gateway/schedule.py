"""From a request and the endpoints that could serve it to a choice, and the trace of how it came about."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite

from quire.gateway.endpoint import Endpoint
from quire.gateway.errors import NoEndpoint
from quire.gateway.plugin import Conclusion, Filter, Picker, ProfileHandler, Scorer
from quire.gateway.request import InferenceRequest


@dataclass(frozen=True, slots=True)
class WeightedScorer:
    scorer: Scorer
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class Profile:
    """Filters in order, then scorers, then one picker."""

    name: str
    filters: Sequence[Filter]
    scorers: Sequence[WeightedScorer]
    picker: Picker


@dataclass(frozen=True, slots=True)
class FilterTrace:
    plugin: str
    removed: Sequence[str]
    """Keys of the endpoints that it took out."""


@dataclass(frozen=True, slots=True)
class ScoreTrace:
    plugin: str
    weight: float
    scores: Sequence[float]
    details: Sequence[object] | None


@dataclass(frozen=True, slots=True)
class ProfileTrace:
    """How one profile came to its endpoints. `candidates` are those that all filters left; scores go by them."""

    profile: str
    filters: Sequence[FilterTrace]
    candidates: Sequence[str]
    scores: Sequence[ScoreTrace]
    totals: Sequence[float]
    picked: Sequence[str]


@dataclass(slots=True)
class Choice:
    conclusion: Conclusion
    traces: Sequence[ProfileTrace]
    seconds: float = 0.0
    """That choosing took; by the director."""

    @property
    def endpoint(self) -> Endpoint:
        return self.conclusion.endpoints[0]


@dataclass(frozen=True, slots=True)
class Scheduler:
    """Runs the profiles that the handler asks for. Nothing is changed but what plugins keep themselves."""

    profiles: Mapping[str, Profile]
    handler: ProfileHandler
    names: Sequence[str] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "names", tuple(self.profiles))

    def schedule(self, request: InferenceRequest, candidates: Sequence[Endpoint]) -> Choice:
        """Raises `NoEndpoint` when no candidate is left to any profile that the handler needs."""
        results: dict[str, Sequence[Endpoint]] = {}
        traces: list[ProfileTrace] = []
        while wanted := tuple(self.handler.next_profiles(request, self.names, results)):
            for name in wanted:
                assert name not in results, f"profile {name} is asked for twice"
                picked, trace = run_profile(self.profiles[name], request, candidates)
                results[name] = picked
                traces.append(trace)
        conclusion = self.handler.conclude(request, results)
        if not conclusion.endpoints:
            raise NoEndpoint(no_endpoint_message(candidates, traces), retry_after=1.0)
        return Choice(conclusion, traces)


def run_profile(
    profile: Profile, request: InferenceRequest, candidates: Sequence[Endpoint]
) -> tuple[Sequence[Endpoint], ProfileTrace]:
    """The endpoints of one profile, the best first; none when its filters left none. A score that is no number counts
    0: compared with, it would make every total incomparable."""
    filtered: list[FilterTrace] = []
    left = candidates
    for plugin in profile.filters:
        before, left = left, plugin.filter(request, left)
        if len(left) != len(before):
            kept = {endpoint.key for endpoint in left}
            removed = [endpoint.key for endpoint in before if endpoint.key not in kept]
            filtered.append(FilterTrace(plugin.name, removed))
    totals = [0.0] * len(left)
    scores: list[ScoreTrace] = []
    picked: Sequence[Endpoint] = ()
    if left:
        for weighted in profile.scorers:
            given = [score if isfinite(score) else 0.0 for score in weighted.scorer.score(request, left)]
            assert len(given) == len(left), f"{weighted.scorer.name} scored {len(given)} of {len(left)}"
            for index, score in enumerate(given):
                totals[index] += weighted.weight * min(max(score, 0.0), 1.0)
            scores.append(ScoreTrace(weighted.scorer.name, weighted.weight, given, weighted.scorer.details()))
        picked = profile.picker.pick(request, left, totals)
    names = [endpoint.key for endpoint in left]
    return picked, ProfileTrace(profile.name, filtered, names, scores, totals, [endpoint.key for endpoint in picked])


def no_endpoint_message(candidates: Sequence[Endpoint], traces: Sequence[ProfileTrace]) -> str:
    if not candidates:
        return "No endpoint can serve this request now."
    took = [f"{trace.plugin} took out {len(trace.removed)}" for profile in traces for trace in profile.filters]
    return f"Of {len(candidates)} endpoints none is left: {', '.join(took) or 'no profile picked one'}."
