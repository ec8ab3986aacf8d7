"""Which models a request is held for while no endpoint serves them: those that have been scaled to zero, say."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Final

from quire.gateway.endpoint import Endpoint, Pool
from quire.gateway.request import InferenceRequest
from quire.gateway.traffic.policy import Policy

MAX_MODELS: Final = 1000
"""Names remembered of endpoints that have left: those that were asked for last."""


class AwaitedModels:
    """A model is awaited that an endpoint serves, served before it left, or that the policy names as a target; any
    model, while there is no endpoint at all or one that has not said what it serves."""

    def __init__(self, pool: Pool, policy: Callable[[], Policy]) -> None:
        self._pool, self._policy = pool, policy
        self._served: OrderedDict[str, None] = OrderedDict()
        self._declared: frozenset[str] = frozenset()
        self._declared_by: Policy | None = None
        pool.watch(lambda _: None, self._left)

    def __call__(self, request: InferenceRequest) -> bool:
        model, everyone = request.target_model or request.model, self._pool.all
        if not model:
            return True  # it is for whichever endpoint there is
        if model in self._served:
            self._served.move_to_end(model)
            return True
        if not everyone or any(one.models is None or model in one.models for one in everyone):
            return True
        return model in self._targets()

    def _left(self, endpoint: Endpoint) -> None:
        for model in sorted(endpoint.models or ()):
            self._served[model] = None
            self._served.move_to_end(model)
        while len(self._served) > MAX_MODELS:
            self._served.popitem(last=False)

    def _targets(self) -> frozenset[str]:
        policy = self._policy()
        if policy is not self._declared_by:
            self._declared, self._declared_by = target_models(policy), policy
        return self._declared


def target_models(policy: Policy) -> frozenset[str]:
    """What endpoints may be asked for by the policy."""
    names: set[str] = set()
    for spec in policy.traffic.values():
        targets = [*(target for route in spec.routes for target in route.targets), *spec.fallback]
        names.update(target.model or spec.model for target in targets)
    for rewrite in policy.rewrites:
        names.update(target.model_rewrite for rule in rewrite.spec.rules for target in rule.targets)
    return frozenset(names)
