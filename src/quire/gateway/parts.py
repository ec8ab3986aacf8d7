"""What one gateway is made of, and how the parts know each other."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import zmq.asyncio

from quire.config.gateway import GatewayConfig
from quire.core.errors import ConfigError
from quire.gateway.awaited import AwaitedModels
from quire.gateway.build import BuildResult, build_picker
from quire.gateway.cost.policy import expected_cached
from quire.gateway.director import Director, OpenGate
from quire.gateway.discovery import Discovery, DnsName, EndpointsFile, Source, UrlList
from quire.gateway.endpoint import Clock, Endpoint, Pool
from quire.gateway.explain import Explainer
from quire.gateway.flow.controller import FlowController
from quire.gateway.flow.settings import flow_settings
from quire.gateway.kv.index import KVIndex
from quire.gateway.kv.subscriptions import KVSubscriptions, PortsOf
from quire.gateway.metrics import GatewayMetrics
from quire.gateway.plugin import Observer, Services, log_warning
from quire.gateway.plugins.reports import STALENESS, staleness_for
from quire.gateway.plugins.stock import stock_plugins
from quire.gateway.policy_file import PolicyFile
from quire.gateway.producers.precise import KV_INDEX, PrecisePrefix
from quire.gateway.producers.tokens import EXACT, HTTP
from quire.gateway.proxy.settings import ProxySettings
from quire.gateway.request import InferenceRequest
from quire.gateway.resilience.settings import ResilienceSettings
from quire.gateway.schedule import Choice
from quire.gateway.scrape import Scraper
from quire.gateway.traffic.policy import Policy, Target
from quire.gateway.traffic.route import plan_route, send_along
from quire.gateway.traffic.shadow import Shadow

SHADOW = "shadow"
"""Under this name the itinerary's shadow stands in a request's attributes."""


@dataclass(slots=True, kw_only=True)
class Parts:
    config: GatewayConfig
    clock: Clock
    rng: random.Random
    pool: Pool
    policy: PolicyFile
    picker: BuildResult
    director: Director
    explainer: Explainer
    metrics: GatewayMetrics
    flow: FlowController | None
    shadow: Shadow
    discovery: Discovery
    scraper: Scraper
    index: KVIndex
    subscriptions: KVSubscriptions

    async def start(self) -> None:
        """Endpoints are known when this returns. Raises `ConfigError`."""
        if self.flow is not None:
            poke = self.flow.poke
            self.pool.watch(lambda _: poke(), lambda _: poke())
            self.metrics.watch(
                "llm_d_epp_flow_control_queue_size", "Requests held, by priority.", _queue_sizes(self.flow), "priority"
            )
        self.metrics.watch(
            "quire_gateway_shadow", "Mirrored requests, by what came of them.", _shadow_counts(self.shadow), "outcome"
        )
        await self.discovery.start()
        self.subscriptions.start()
        self.scraper.start()

    async def stop(self) -> None:
        if self.flow is not None:
            self.flow.close()
        await self.shadow.stop()
        await self.scraper.stop()
        await self.subscriptions.stop()
        await self.discovery.stop()

    def apply_traffic(self, request: InferenceRequest) -> None:
        """The policy as it is when the request comes: which version of the model, and who stands in for it."""
        itinerary = plan_route(self.policy.policy, request, self.rng)
        send_along(itinerary, request)
        if itinerary.shadow is not None:
            request.attributes[SHADOW] = (itinerary.shadow, itinerary.compare)

    def policy_changed(self, policy: Policy) -> None:
        self.director.priorities = policy.objectives


def shadow_of(request: InferenceRequest) -> tuple[Target, bool] | None:
    found = request.attributes.get(SHADOW)
    return found if isinstance(found, tuple) else None


def make_parts(
    config: GatewayConfig,
    session: aiohttp.ClientSession,
    context: zmq.asyncio.Context,
    *,
    clock: Clock = time.monotonic,
    rng: random.Random | None = None,
) -> Parts:
    """Reads the policy, builds the picker. Needs a running loop. Raises `ConfigError`."""
    rng = rng or random.Random()  # noqa: S311 - spreads load, guards nothing
    pool, index = Pool(), KVIndex()
    policy = PolicyFile(None if config.policy is None else Path(config.policy))
    policy.read()
    shared: dict[str, Any] = {KV_INDEX: index, HTTP: session, EXACT: config.exact_tokens}
    shared[STALENESS] = staleness_for(config.scrape_interval)
    picker = build_picker(policy.policy.picker, stock_plugins(), pool=pool, clock=clock, rng=rng, shared=shared)
    for warning in picker.warnings:
        log_warning(warning)
    metrics, explainer = GatewayMetrics(pool, clock), Explainer(config.explain_requests, clock)
    director = Director(
        pool=pool,
        scheduler=picker.scheduler,
        clock=clock,
        producers=picker.producers,
        admitters=picker.admitters,
        priorities=policy.policy.objectives,
        chosen=_on_choice(explainer, metrics),
        expected_cached=expected_cached,
    )
    services = Services(pool, clock, rng, picker.plugins.__getitem__, shared)
    flow = _flow(policy.policy, picker, director, services, AwaitedModels(pool, lambda: policy.policy))
    director.gate = flow if flow is not None else OpenGate()
    watching: list[Observer] = [*picker.observers, metrics, explainer]
    director.observers = [*watching, flow] if flow is not None else watching
    precise = next((plugin for plugin in picker.plugins.values() if isinstance(plugin, PrecisePrefix)), None)
    subscriptions = KVSubscriptions(pool, index, context, PortsOf() if precise is None else precise.ports)
    return Parts(
        config=config,
        clock=clock,
        rng=rng,
        pool=pool,
        policy=policy,
        picker=picker,
        director=director,
        explainer=explainer,
        metrics=metrics,
        flow=flow,
        shadow=Shadow(clock),
        discovery=Discovery(pool, sources(config, picker.endpoints_files)),
        scraper=Scraper(pool, session, clock, config.scrape_interval, updated=_on_update(subscriptions, flow)),
        index=index,
        subscriptions=subscriptions,
    )


def _flow(
    policy: Policy,
    picker: BuildResult,
    director: Director,
    services: Services,
    awaited: Callable[[InferenceRequest], bool],
) -> FlowController | None:
    settings = flow_settings(policy.picker, picker.plugins, services)
    if settings is None:
        return None
    return FlowController(
        settings.queue,
        director.candidates,
        director.clock,
        detector=settings.detector,
        awaited=awaited,
        evict=settings.enable_eviction,
        cpu=time.thread_time,
    )


def _queue_sizes(flow: FlowController) -> Callable[[], Mapping[str, float]]:
    def sizes() -> Mapping[str, float]:
        return {str(priority): float(count) for priority, count in flow.snapshot().by_priority().items()}

    return sizes


def _shadow_counts(shadow: Shadow) -> Callable[[], Mapping[str, float]]:
    def counts() -> Mapping[str, float]:
        return {
            name: float(sum(getattr(one, name) for one in shadow.counts.values()))
            for name in ("same", "different", "failed", "skipped", "uncompared")
        }

    return counts


def _on_choice(explainer: Explainer, metrics: GatewayMetrics) -> Callable[[InferenceRequest, Choice], None]:
    def chosen(request: InferenceRequest, choice: Choice) -> None:
        explainer.chosen(request, choice)
        metrics.scheduled(choice.endpoint, choice.seconds)

    return chosen


def _on_update(subscriptions: KVSubscriptions, flow: FlowController | None) -> Callable[[Endpoint], None]:
    def updated(endpoint: Endpoint) -> None:
        subscriptions.refresh(endpoint)  # its page says where its events are
        if flow is not None:
            flow.poke()

    return updated


def sources(config: GatewayConfig, files: Sequence[Path] = ()) -> Sequence[Source]:
    """Raises `ConfigError` if there is none."""
    found: list[Source] = [EndpointsFile(path, name=str(path)) for path in files]
    if config.endpoints is not None:
        found.append(UrlList(config.endpoints))
    if config.endpoints_file is not None:
        found.append(EndpointsFile(Path(config.endpoints_file)))
    if config.endpoints_dns is not None:
        found.append(DnsName(config.endpoints_dns))
    if not found:
        raise ConfigError(
            "The gateway has no endpoints.",
            param="endpoints",
            remedy="Give --endpoints URL,URL or --endpoints-file FILE or --endpoints-dns NAME:PORT.",
        )
    return found


def proxy_settings(config: GatewayConfig) -> ProxySettings:
    return ProxySettings(
        connect_timeout=config.connect_timeout,
        first_byte_timeout=config.first_byte_timeout,
        idle_timeout=config.idle_timeout,
        max_retries=config.max_retries,
        max_body=config.max_body_bytes,
        trust_subset=config.trust_subset_header,
        resilience=ResilienceSettings(health_interval=config.health_interval, hedge_delay=config.hedge_delay),
    )
