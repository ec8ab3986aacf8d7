"""Why a request went where it went: kept for a while, told at `/explain/{request id}` and in the log.

Of the last `capacity` requests the scheduler's traces are kept as they are; they become text only when somebody asks.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import structlog

from quire.gateway.endpoint import Clock, Endpoint
from quire.gateway.plugin import Observer
from quire.gateway.request import InferenceRequest, Outcome, Prediction
from quire.gateway.schedule import Choice, ProfileTrace

MAX_CANDIDATES = 256
"""Shown of one profile; with more the best and the picked are shown."""


@dataclass(slots=True)
class _Attempt:
    endpoint: str
    sent: float
    ttft: float | None = None
    outcome: Outcome | None = None


@dataclass(slots=True)
class _Record:
    """What is kept of a request; not its body."""

    request_id: str
    model: str
    target_model: str
    tenant: str
    priority: int
    prompt_tokens: int
    arrived: float
    choices: list[tuple[float, Sequence[ProfileTrace], dict[str, Prediction]]] = field(default_factory=list)
    attempts: list[_Attempt] = field(default_factory=list)
    dropped: str = ""


class Explainer(Observer):
    """Hears of choices (`chosen`) and of what became of them."""

    name = "explain"

    def __init__(self, capacity: int, clock: Clock) -> None:
        self._capacity = capacity
        self._clock = clock
        self._records: OrderedDict[str, _Record] = OrderedDict()

    def _record(self, request: InferenceRequest) -> _Record:
        """Each request has its own, which it keeps with it: ids are the clients', who may use one several times."""
        record = self._known(request)
        if record is None:
            record = request.attributes[self.name] = _Record(
                request_id=request.id,
                model=request.model,
                target_model=request.target_model,
                tenant=request.tenant,
                priority=request.priority,
                prompt_tokens=request.prompt_tokens,
                arrived=request.arrived,
            )
            self._records[request.id] = record  # the newest of an id is the one that is told of
            self._records.move_to_end(request.id)
            while len(self._records) > self._capacity:
                self._records.popitem(last=False)
        return record

    def _known(self, request: InferenceRequest) -> _Record | None:
        record = request.attributes.get(self.name)
        return record if isinstance(record, _Record) else None

    def chosen(self, request: InferenceRequest, choice: Choice) -> None:
        if self._capacity:
            record = self._record(request)
            record.target_model = request.target_model
            record.prompt_tokens = request.prompt_tokens
            record.choices.append((self._clock(), choice.traces, dict(request.predictions)))

    def dropped(self, request: InferenceRequest, why: str) -> None:
        if self._capacity:
            self._record(request).dropped = why

    def sent(self, request: InferenceRequest, endpoint: Endpoint, choice: object) -> None:
        record = self._known(request)
        if record is not None:
            record.attempts.append(_Attempt(endpoint.key, self._clock()))

    def first_byte(self, request: InferenceRequest, endpoint: Endpoint, ttft: float) -> None:
        attempt = _last_attempt(self._known(request), endpoint)
        if attempt is not None:
            attempt.ttft = ttft

    def finished(self, request: InferenceRequest, endpoint: Endpoint, outcome: Outcome) -> None:
        record = self._known(request)
        attempt = _last_attempt(record, endpoint)
        if record is None or attempt is None:
            return
        attempt.outcome = outcome
        log = structlog.get_logger()
        if log.is_enabled_for(logging.DEBUG):
            log.debug("routed", **_log_fields(record, attempt))

    def explain(self, request_id: str) -> dict[str, Any] | None:
        """JSON-like; None if the request is not remembered."""
        record = self._records.get(request_id)
        if record is None:
            return None
        told: dict[str, Any] = {
            "request_id": record.request_id,
            "model": record.model,
            "target_model": record.target_model,
            "tenant": record.tenant,
            "priority": record.priority,
            "prompt_tokens": record.prompt_tokens,
            "choices": [
                {"after_seconds": round(when - record.arrived, 6), "profiles": [_profile(t, said) for t in traces]}
                for when, traces, said in record.choices
            ],
            "attempts": [_attempt_dict(attempt, record) for attempt in record.attempts],
        }
        if record.dropped:
            told["dropped"] = record.dropped
        return told


def _last_attempt(record: _Record | None, endpoint: Endpoint) -> _Attempt | None:
    attempts = () if record is None else record.attempts
    return next((one for one in reversed(attempts) if one.endpoint == endpoint.key), None)


def _log_fields(record: _Record, attempt: _Attempt) -> dict[str, Any]:
    _, traces, predictions = record.choices[-1]
    trace = traces[-1]
    predicted = predictions.get(attempt.endpoint)
    return {
        "request_id": record.request_id,
        "endpoint": attempt.endpoint,
        "candidates": len(trace.candidates),
        "totals": {key: round(total, 3) for key, total in _shown(trace, 8)},
        "ttft": attempt.ttft,
        "predicted_ttft": None if predicted is None else round(predicted.ttft, 4),
        "error": attempt.outcome.error if attempt.outcome else "",
    }


def _shown(trace: ProfileTrace, most: int) -> list[tuple[str, float]]:
    pairs = list(zip(trace.candidates, trace.totals, strict=True))
    if len(pairs) > most:
        picked = set(trace.picked[:1])
        pairs = sorted(pairs, key=lambda pair: (pair[0] not in picked, -pair[1]))[:most]
    return pairs


def _profile(trace: ProfileTrace, predictions: dict[str, Prediction]) -> dict[str, Any]:
    chosen = trace.picked[0] if trace.picked else None
    shown = {key for key, _ in _shown(trace, MAX_CANDIDATES)}
    ours = None if chosen is None else predictions.get(chosen)
    candidates = []
    for index, key in enumerate(trace.candidates):
        if key not in shown:
            continue
        told: dict[str, Any] = {
            "endpoint": key,
            "total": round(trace.totals[index], 6),
            "scores": _scores(trace, index),
        }
        predicted = predictions.get(key)
        if predicted is not None:
            told["predicted_ttft"] = round(predicted.ttft, 6)
            told["predicted_tpot"] = round(predicted.tpot, 6)
            if ours is not None and key != chosen:
                told["if_sent_here"] = {"ttft": f"{predicted.ttft - ours.ttft:+.4f} s"}
        if chosen is not None and key != chosen:
            told["why_not"] = _why_not(trace, index, trace.candidates.index(chosen))
        candidates.append(told)
    return {
        "profile": trace.profile,
        "picked": list(trace.picked),
        "filtered_out": {one.plugin: list(one.removed) for one in trace.filters},
        "candidates": candidates,
    }


def _scores(trace: ProfileTrace, index: int) -> dict[str, Any]:
    told: dict[str, Any] = {}
    for score in trace.scores:
        entry: dict[str, Any] = {"score": round(score.scores[index], 6), "weight": score.weight}
        if score.details is not None:
            entry["details"] = score.details[index]
        told[score.plugin] = entry
    return told


def _why_not(trace: ProfileTrace, loser: int, winner: int) -> str:
    behind = trace.totals[winner] - trace.totals[loser]
    if behind <= 0:
        return "as good; chance or order decided"
    gaps = [(score.weight * (score.scores[winner] - score.scores[loser]), score) for score in trace.scores]
    gap, worst = max(gaps, key=lambda pair: pair[0])
    return (
        f"{behind:.3f} behind, {gap:.3f} of it by {worst.plugin}: "
        f"{worst.scores[loser]:.3f} against {worst.scores[winner]:.3f}"
    )


def _attempt_dict(attempt: _Attempt, record: _Record) -> dict[str, Any]:
    told: dict[str, Any] = {"endpoint": attempt.endpoint, "sent_after_seconds": round(attempt.sent - record.arrived, 6)}
    predictions = record.choices[-1][2] if record.choices else {}
    predicted = predictions.get(attempt.endpoint)
    if predicted is not None:
        told["predicted_ttft"] = round(predicted.ttft, 6)
    if attempt.ttft is not None:
        told["ttft"] = round(attempt.ttft, 6)
    outcome = attempt.outcome
    if outcome is not None:
        told |= {"status": outcome.status, "error": outcome.error, "seconds": round(outcome.finished - attempt.sent, 6)}
        told |= {"output_tokens": outcome.output_tokens, "cached_tokens": outcome.cached_tokens}
    return told
