"""Requests made up from /openapi.json: never a 5xx but for a deadline, and every answer as described."""

from __future__ import annotations

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis.checks import CheckFunction
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_schema_conformance,
    status_code_conformance,
)

from quire.serve.openapi import OPERATIONS


def no_server_error_but_for_a_deadline(ctx, response, case):
    """Whoever names a deadline is told, by 504, that it has passed: 1e-156 ms may be asked for."""
    limits = {"deadline_ms", "queue_timeout_ms", "ttft_timeout_ms"}
    if response.status_code == 504 and isinstance(case.body, dict) and limits & set(case.body):
        assert response.json()["error"]["code"] == "deadline_exceeded"
        return None
    return schemathesis.checks.not_a_server_error(ctx, response, case)


CHECKS: list[CheckFunction] = [
    no_server_error_but_for_a_deadline,
    content_type_conformance,
    negative_data_rejection,
    response_schema_conformance,
    status_code_conformance,
]


SERVERS = {
    "/v1/embeddings": "embedder",
    "/pooling": "embedder",
    "/classify": "classifier",
    "/score": "reranker",
    "/rerank": "reranker",
}
"""Which of the fixtures can do what is asked; `served` for all else."""


POSITIVE, NEGATIVE = schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE
CASES = [
    (operation, mode)
    for operation in OPERATIONS
    for mode in (POSITIVE, NEGATIVE)
    if operation.request is not None or mode is POSITIVE  # without a body there is nothing to get wrong
    if operation.path not in ("/v1/score", "/v1/rerank", "/v2/rerank")  # other names of what is here
]


@pytest.mark.parametrize(("operation", "mode"), CASES, ids=lambda value: getattr(value, "path", None))
def test_api(request, operation, mode):
    path = operation.path
    served = request.getfixturevalue(SERVERS.get(path, "served"))
    described = schemathesis.openapi.from_url(f"{served.url}/openapi.json")
    operation = described[path]["GET" if operation.request is None else "POST"]

    @settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))
    @given(case=operation.as_strategy(generation_mode=mode))
    def conforms(case):
        # Long answers are no matter here, and waiting for them takes its time.
        if isinstance(case.body, dict) and mode is POSITIVE and "completions" in path:
            case.body["max_tokens"] = 2
        if isinstance(case.body, dict) and mode is POSITIVE and path in SERVERS:
            case.body.pop("model", None)  # a random one is never there
        case.call_and_validate(checks=CHECKS, timeout=20)

    conforms()
