"""From a request to the versions that may serve it: pure, but for one random number."""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

from quire.gateway.request import InferenceRequest
from quire.gateway.traffic.policy import Match, Policy, Rewrite, Route, ShadowSpec, Target, TrafficSpec


@dataclass(frozen=True, slots=True)
class Itinerary:
    """Targets in the order in which they are tried; the model of each is settled."""

    targets: Sequence[Target]
    shadow: Target | None = None
    compare: bool = False
    rule: str = ""
    """What decided, for explaining."""


def plan_route(policy: Policy, request: InferenceRequest, rng: random.Random) -> Itinerary:
    """An outer gateway's header first, then the model's TrafficPolicy, then rewrites."""
    if request.target_model not in ("", request.model):
        return Itinerary([Target(model=request.target_model)], rule="header")
    spec = policy.traffic.get(request.model)
    if spec is None:
        target, rule = _rewritten(policy.rewrites, request.model, rng)
        return Itinerary([target], rule=rule)
    chosen, rule = _by_traffic(spec, request, rng)
    shadow = spec.shadow if spec.shadow is not None and _sampled(spec.shadow, rng) else None
    return Itinerary(
        [_settled(target, request.model) for target in (chosen, *spec.fallback)],
        shadow=None if shadow is None else _settled(shadow.target, request.model),
        compare=shadow is not None and shadow.compare,
        rule=rule,
    )


def _settled(target: Target, model: str) -> Target:
    return target if target.model else Target(model=model, selector=target.selector, weight=target.weight)


def _sampled(shadow: ShadowSpec, rng: random.Random) -> bool:
    return rng.random() * 100.0 < shadow.percent


def _by_traffic(spec: TrafficSpec, request: InferenceRequest, rng: random.Random) -> tuple[Target, str]:
    for index, route in enumerate(spec.routes):
        if spec.active and route.name != spec.active:
            continue
        if route.match is None or _matches(route.match, request):
            return _of_route(spec.model, route, request, rng), f"route {route.name or index}"
    return Target(model=spec.model), "no route matches"


def _matches(match: Match, request: InferenceRequest) -> bool:
    headers = all(request.headers.get(name.lower()) == value for name, value in match.headers.items())
    return headers and (not match.tenants or request.tenant in match.tenants)


def _of_route(model: str, route: Route, request: InferenceRequest, rng: random.Random) -> Target:
    caller = _sticky_key(route.sticky, request)
    if caller:
        return sticky_choice(route.targets, f"{model}\0{route.name}\0{caller}")
    return weighted_choice(route.targets, rng)


def _sticky_key(sticky: str, request: InferenceRequest) -> str:
    """Empty where there is nothing to hold on to: chance decides then."""
    if sticky == "tenant":
        return request.tenant or request.fairness_id
    if sticky == "session":
        return request.session_id
    return request.headers.get(sticky.removeprefix("header:").lower(), "") if sticky else ""


def weighted_choice(targets: Sequence[Target], rng: random.Random) -> Target:
    return rng.choices(targets, weights=[target.weight for target in targets])[0]


def sticky_choice(targets: Sequence[Target], caller: str) -> Target:
    """Weighted rendezvous hashing (Schindelhauer and Schomaker 2005): each target draws from the caller's name; when
    weights change, only as many callers move as must."""
    best, best_draw = targets[0], math.inf
    for index, target in enumerate(targets):
        if not target.weight:
            continue
        digest = hashlib.blake2b(f"{caller}\0{index}".encode(), digest_size=8).digest()
        uniform = (int.from_bytes(digest, "big") + 0.5) / 2**64
        draw = -math.log(uniform) / target.weight
        if draw < best_draw:
            best, best_draw = target, draw
    return best


def _rewritten(rewrites: Sequence[Rewrite], model: str, rng: random.Random) -> tuple[Target, str]:
    """llm-d's precedence: exact before generic, then the oldest, then the first."""
    for generic in (False, True):
        for rewrite in rewrites:
            for rule in rewrite.spec.rules:
                exact = any(match.model is not None and match.model.value == model for match in rule.matches)
                every = not rule.matches or any(match.model is None for match in rule.matches)
                if every if generic else exact:
                    weights = [target.weight for target in rule.targets]
                    chosen = rng.choices(rule.targets, weights=weights)[0]
                    return Target(model=chosen.model_rewrite), f"rewrite {rewrite.name}"
    return Target(model=model), ""


def send_along(itinerary: Itinerary, request: InferenceRequest) -> None:
    """Write the itinerary into the request."""
    first, *others = itinerary.targets
    request.target_model, request.selector = first.model, first.selector
    request.fallbacks = [(target.model, target.selector) for target in others]
