"""A pool of model servers on a simulated clock, behind the gateway's own director, producers and scorers.

Each server has an LRU cache of prefixes, a queue, continuous batching with chunked prefill, and its own speed; a step
takes `overhead + prefill tokens x prefill + sequences x decode` seconds. Nothing waits: events come from a heap, and
everything random from one seed, so that a run gives the same numbers everywhere.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections import OrderedDict, deque
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeVar

from quire.gateway.cost.policy import ExpectedCost, expected_cached
from quire.gateway.director import Attempt, Director
from quire.gateway.endpoint import Endpoint, EndpointMetrics, Pool
from quire.gateway.plugin import Observer, Picker, Plugin, Producer, Scorer, Services
from quire.gateway.plugins.pickers import MaxScore, RoundRobin
from quire.gateway.plugins.profiles import SingleProfile
from quire.gateway.producers.prefix import ApproxPrefix, PrefixParameters
from quire.gateway.request import Api, InferenceRequest, Outcome
from quire.gateway.schedule import Profile, Scheduler, WeightedScorer

T = TypeVar("T")
BYTES_PER_TOKEN = 4


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Seconds."""

    overhead: float = 0.004
    prefill: float = 1 / 16_000
    decode: float = 0.0003

    def times(self, factor: float) -> Speed:
        """`factor` 0.5: half as fast."""
        return Speed(overhead=self.overhead / factor, prefill=self.prefill / factor, decode=self.decode / factor)


@dataclass(frozen=True, kw_only=True)
class Server:
    speed: Speed = Speed()
    cache_tokens: int = 300_000
    max_running: int = 128
    step_tokens: int = 2048
    reports: Literal["nothing", "vllm", "quire"] = "vllm"


@dataclass(slots=True)
class Job:
    request: InferenceRequest
    attempt: Attempt
    prefix: str
    prefix_tokens: int
    prompt_tokens: int
    output_tokens: int
    arrived: float
    to_prefill: int = 0
    cached: int = 0
    generated: int = 0
    first: float = 0.0


@dataclass
class Engine:
    """One server: `step` takes what fits, and says how long it takes."""

    server: Server
    cache: OrderedDict[str, int] = field(default_factory=OrderedDict)
    waiting: deque[Job] = field(default_factory=deque)
    running: list[Job] = field(default_factory=list)
    stepping: bool = False
    held: int = 0

    def _keep(self, key: str, tokens: int) -> None:
        self.held += tokens - self.cache.pop(key, 0)
        self.cache[key] = tokens
        while self.held > self.server.cache_tokens and len(self.cache) > 1:
            self.held -= self.cache.popitem(last=False)[1]

    def _schedule(self, budget: int) -> tuple[int, list[Job]]:
        """Prompt tokens of one step, first of those begun already, then of the queue in its order, and whose prompts
        are whole after it. A prefix may be used by who comes behind as soon as it is computed."""
        left, first = budget, []
        for job in self.running:
            if job.to_prefill and left:
                left -= self._prefill(job, left)
                first += [] if job.to_prefill else [job]
        while self.waiting and left and len(self.running) < self.server.max_running:
            job = self.waiting.popleft()
            if job.prefix in self.cache:
                job.cached = job.prefix_tokens
                self.cache.move_to_end(job.prefix)
            job.to_prefill = job.prompt_tokens - job.cached
            self.running.append(job)
            left -= self._prefill(job, left)
            first += [] if job.to_prefill else [job]
        return budget - left, first

    def _prefill(self, job: Job, left: int) -> int:
        taken = min(job.to_prefill, left)
        job.to_prefill -= taken
        if job.to_prefill <= job.prompt_tokens - job.prefix_tokens:
            self._keep(job.prefix, job.prefix_tokens)
        if not job.to_prefill:
            self._keep(job.request.id, job.prompt_tokens - job.prefix_tokens + job.output_tokens)
        return taken

    def step(self) -> tuple[float, list[Job], list[Job]]:
        """Seconds that it takes, who has a first token after it, and who is done."""
        decoding = [job for job in self.running if not job.to_prefill]
        prefilled, first = self._schedule(self.server.step_tokens)
        generating = [*decoding, *first]
        for job in generating:
            job.generated += 1
        done = [job for job in generating if job.generated >= job.output_tokens]
        for job in done:
            self.running.remove(job)
        speed = self.server.speed
        seconds = speed.overhead + prefilled * speed.prefill + len(generating) * speed.decode
        return seconds, first, done

    def metrics(self, now: float) -> EndpointMetrics | None:
        if self.server.reports == "nothing":
            return None
        page = EndpointMetrics(
            time=now,
            waiting=len(self.waiting),
            running=len(self.running),
            kv_usage=min(
                sum(job.prompt_tokens + job.generated for job in self.running) / self.server.cache_tokens, 1.0
            ),
            block_size=16,
            num_blocks=self.server.cache_tokens // 16,
        )
        if self.server.reports == "vllm":
            return page
        return replace(
            page,
            waiting_tokens=sum(job.prompt_tokens for job in self.waiting),
            prefill_seconds_per_token=self.server.speed.prefill,
            decode_seconds_per_step=self.server.speed.overhead + len(self.running) * self.server.speed.decode,
        )


@dataclass(frozen=True, kw_only=True)
class Arrival:
    time: float
    prefix: int
    """-1: none of the shared ones."""
    prefix_tokens: int
    own_tokens: int
    output_tokens: int
    stream: bool = True


@dataclass(frozen=True)
class Served:
    endpoint: str
    arrived: float
    ttft: float
    duration: float
    cached: int
    prompt_tokens: int


@dataclass(frozen=True)
class Report:
    served: Sequence[Served]

    def ttft(self, share: float) -> float:
        return _quantile([one.ttft for one in self.served], share)

    def latency(self, share: float) -> float:
        return _quantile([one.duration for one in self.served], share)

    @property
    def mean_latency(self) -> float:
        return sum(one.duration for one in self.served) / len(self.served)

    @property
    def throughput(self) -> float:
        """Requests a second, from the first arrival to the last end."""
        first = min(one.arrived for one in self.served)
        return len(self.served) / (max(one.arrived + one.duration for one in self.served) - first)

    @property
    def hit_rate(self) -> float:
        return sum(one.cached for one in self.served) / sum(one.prompt_tokens for one in self.served)

    def share(self, endpoint: str) -> float:
        return sum(one.endpoint == endpoint for one in self.served) / len(self.served)


class FewestOpen(Scorer):
    """What is compared with: the endpoint with the fewest open requests."""

    def score(self, request: InferenceRequest, candidates: Sequence[Endpoint]) -> Sequence[float]:
        return [1 / (1 + endpoint.load.requests) for endpoint in candidates]


Policy = Literal["default", "round-robin", "least-loaded"]


def poisson(
    rate: float,
    count: int,
    *,
    prefixes: int = 0,
    prefix_tokens: int = 0,
    own_tokens: int = 1200,
    output_tokens: int = 100,
    stream: bool = True,
    seed: int = 1,
) -> list[Arrival]:
    """`prefixes` 0: nothing is shared, and prompts are as long all the same."""
    rng = random.Random(seed)
    time, found = 0.0, []
    for _ in range(count):
        time += rng.expovariate(rate)
        found.append(
            Arrival(
                time=time,
                prefix=rng.randrange(prefixes) if prefixes else -1,
                prefix_tokens=prefix_tokens,
                own_tokens=own_tokens,
                output_tokens=max(round(output_tokens * rng.uniform(0.5, 1.5)), 1),
                stream=stream,
            )
        )
    return found


class Simulation:
    """`cores`: as many engines go on at full speed at once; more share them."""

    def __init__(
        self, policy: Policy, servers: Sequence[Server], *, seed: int = 0, scrape: float = 0.2, cores: int = 0
    ) -> None:
        self._cores = cores or len(servers)
        self.now = 0.0
        self.pool = Pool()
        self.rng = random.Random(seed)
        self._scrape = scrape
        self._counter = itertools.count()
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._open = 0
        self._served: list[Served] = []
        self.endpoints = [
            self.pool.put(Endpoint(f"e{index}", "127.0.0.1", 8000 + index)) for index in range(len(servers))
        ]
        self.engines = {endpoint.key: Engine(server) for endpoint, server in zip(self.endpoints, servers, strict=True)}
        self.director = self._director(policy)

    def _director(self, policy: Policy) -> Director:
        services = Services(self.pool, lambda: self.now, self.rng, lambda name: Plugin())
        producers: list[Producer] = []
        scorers: list[Scorer] = []
        picker: Picker = MaxScore(1, self.rng)
        if policy == "default":
            prefix = ApproxPrefix(PrefixParameters(), services)
            prefix.name = "approx-prefix-cache-producer"
            cost = ExpectedCost(services)
            cost.name = "expected-cost-scorer"
            producers, scorers = [prefix], [cost]
        elif policy == "least-loaded":
            scorers = [FewestOpen()]
        else:
            picker = RoundRobin()
        profile = Profile("default", (), [WeightedScorer(scorer) for scorer in scorers], picker)
        return Director(
            pool=self.pool,
            scheduler=Scheduler({"default": profile}, SingleProfile()),
            clock=lambda: self.now,
            producers=producers,
            observers=[plugin for plugin in (*producers, *scorers) if isinstance(plugin, Observer)],
            expected_cached=expected_cached,
        )

    # --- events -----------------------------------------------------------------------------------------------------

    def at(self, time: float, what: Callable[[], None]) -> None:
        heapq.heappush(self._events, (time, next(self._counter), what))

    def run(self, arrivals: Sequence[Arrival], *, warm: int = 0) -> Report:
        """`warm`: so many of the first served are left out of the report."""
        self._open = len(arrivals)
        for index, arrival in enumerate(arrivals):
            self.at(arrival.time, lambda one=arrival, number=index: self._arrive(one, number))
        for endpoint in self.endpoints:
            self.at(0.0, lambda one=endpoint: self._read(one))
        while self._open:
            self.now, _, what = heapq.heappop(self._events)
            what()
        return Report(sorted(self._served, key=lambda one: one.arrived)[warm:])

    def _read(self, endpoint: Endpoint) -> None:
        endpoint.metrics = self.engines[endpoint.key].metrics(self.now)
        self.at(self.now + self._scrape * self.rng.uniform(0.9, 1.1), lambda: self._read(endpoint))

    def _arrive(self, arrival: Arrival, number: int) -> None:
        name = f"p{arrival.prefix}" if arrival.prefix >= 0 else f"own{number}"
        prefix = _text(name, arrival.prefix_tokens)
        request = InferenceRequest(
            id=f"r{number}",
            path="/v1/completions",
            api=Api.COMPLETIONS,
            model="m",
            body=b"",
            headers={},
            arrived=self.now,
            stream=arrival.stream,
            prompt=prefix + _text(f"q{number}", arrival.own_tokens),
        )
        choice = run_now(self.director.choose(request))
        attempt = self.director.sent(request, choice.endpoint, choice)
        total = arrival.prefix_tokens + arrival.own_tokens
        job = Job(request, attempt, name, arrival.prefix_tokens, total, arrival.output_tokens, self.now)
        engine = self.engines[choice.endpoint.key]
        engine.waiting.append(job)
        if not engine.stepping:
            self._step(engine)

    def _step(self, engine: Engine) -> None:
        engine.stepping = bool(engine.waiting or engine.running)
        if engine.stepping:
            seconds, first, done = engine.step()
            seconds *= max(sum(other.stepping for other in self.engines.values()) / self._cores, 1.0)
            self.at(self.now + seconds, lambda: self._stepped(engine, first, done))

    def _stepped(self, engine: Engine, first: Sequence[Job], done: Sequence[Job]) -> None:
        for job in first:
            job.first = self.now
            if job.request.stream:
                self.director.first_byte(job.request, job.attempt)
        for job in done:
            if not job.request.stream:
                self.director.first_byte(job.request, job.attempt)
            outcome = Outcome(
                status=200,
                first_byte=job.attempt.first_byte,
                finished=self.now,
                output_tokens=job.output_tokens,
                prompt_tokens=job.prompt_tokens,
                cached_tokens=job.cached,
            )
            self.director.finished(job.request, job.attempt, outcome)
            self.director.abandon(job.request)
            key = job.attempt.endpoint.name
            took = self.now - job.arrived
            self._served.append(Served(key, job.arrived, job.first - job.arrived, took, job.cached, job.prompt_tokens))
            self._open -= 1
        self._step(engine)


def simulate(
    policy: Policy,
    servers: Sequence[Server],
    arrivals: Sequence[Arrival],
    *,
    seed: int = 0,
    warm: int = 0,
    cores: int = 0,
) -> Report:
    return Simulation(policy, servers, seed=seed, cores=cores).run(arrivals, warm=warm)


def run_now(coroutine: Coroutine[Any, Any, T]) -> T:
    """The result of one that never waits."""
    try:
        coroutine.send(None)
    except StopIteration as stop:
        return stop.value  # type: ignore[no-any-return]
    raise AssertionError("it waits for something")


def _text(name: str, tokens: int) -> bytes:
    length = tokens * BYTES_PER_TOKEN
    return (f"{name} " * (length // (len(name) + 1) + 1)).encode()[:length]


def _quantile(values: Sequence[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(int(share * len(ordered)), len(ordered) - 1)]
