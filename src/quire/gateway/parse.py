"""From the bytes of a call to an `InferenceRequest`.

The body itself goes on byte for byte. Only what routing needs is decoded: names, limits, and the prompt; a field of an
unexpected type counts as not given, since it is the endpoint that says what it takes. What is no JSON object at all is
refused here.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Final

import msgspec

from quire.core.errors import InvalidParameter, RequestError
from quire.gateway.prompt import completion_prompt, field, text_or_messages
from quire.gateway.request import Api, InferenceRequest

_APIS: Final[Mapping[str, Api]] = {
    "/v1/chat/completions": Api.CHAT,
    "/v1/completions": Api.COMPLETIONS,
    "/v1/responses": Api.RESPONSES,
    "/v1/messages": Api.MESSAGES,
    "/v1/embeddings": Api.EMBEDDINGS,
    "/pooling": Api.EMBEDDINGS,
    "/classify": Api.EMBEDDINGS,
    "/score": Api.EMBEDDINGS,
    "/v1/score": Api.EMBEDDINGS,
    "/rerank": Api.EMBEDDINGS,
    "/v1/rerank": Api.EMBEDDINGS,
    "/v2/rerank": Api.EMBEDDINGS,
}
_WITH_MODEL: Final = frozenset(
    {"/tokenize", "/detokenize", "/v1/messages/count_tokens", "/v1/audio/transcriptions", "/v1/audio/speech"}
)
"""Passed on, but to an endpoint with the model that the body names, where it is JSON."""

_OBJECTIVE: Final = ("x-llm-d-inference-objective", "x-gateway-inference-objective")
_FAIRNESS: Final = ("x-llm-d-inference-fairness-id", "x-gateway-inference-fairness-id")
_REWRITE: Final = ("x-llm-d-model-name-rewrite", "x-gateway-model-name-rewrite")
_SLO_TTFT: Final = ("x-llm-d-slo-ttft-ms", "x-slo-ttft-ms")
_SLO_TPOT: Final = ("x-llm-d-slo-tpot-ms", "x-slo-tpot-ms")
_SESSION: Final = ("x-session-id", "session-id")
_SUBSET: Final = "x-gateway-destination-endpoint-subset"
MAX_NAME: Final = 512
"""Characters of a model, an objective, a tenant or a session: they are kept in tables and shown in metrics."""
MAX_SUBSET: Final = 4096


class _Fields(msgspec.Struct):
    """`Raw` is what is looked at only if it has the right type."""

    model: str | None = None
    stream: msgspec.Raw = msgspec.Raw()
    messages: msgspec.Raw = msgspec.Raw()
    prompt: msgspec.Raw = msgspec.Raw()
    input: msgspec.Raw = msgspec.Raw()
    system: msgspec.Raw = msgspec.Raw()
    instructions: msgspec.Raw = msgspec.Raw()
    tools: msgspec.Raw = msgspec.Raw()
    chat_template: msgspec.Raw = msgspec.Raw()
    chat_template_kwargs: msgspec.Raw = msgspec.Raw()
    query: msgspec.Raw = msgspec.Raw()
    documents: msgspec.Raw = msgspec.Raw()
    text_1: msgspec.Raw = msgspec.Raw()
    text_2: msgspec.Raw = msgspec.Raw()
    cache_salt: msgspec.Raw = msgspec.Raw()
    max_tokens: msgspec.Raw = msgspec.Raw()
    max_completion_tokens: msgspec.Raw = msgspec.Raw()
    max_output_tokens: msgspec.Raw = msgspec.Raw()


_decoder = msgspec.json.Decoder(_Fields)
_object = msgspec.json.Decoder(dict[str, msgspec.Raw])


def api_of(path: str) -> Api:
    return _APIS.get(path, Api.OTHER)


def parse(
    request_id: str,
    path: str,
    headers: Iterable[tuple[bytes, bytes]],
    body: bytes,
    arrived: float,
    *,
    trust_subset: bool = False,
) -> InferenceRequest:
    """`headers` as ASGI has them, names in lower case. The header that says which endpoints may be chosen is an outer
    gateway's: it is read only with `trust_subset`. Raises `RequestError` for a body that is no JSON object, and
    `InvalidParameter` that names the field or header."""
    api = api_of(path)
    named = {name.decode("latin-1"): value.decode("latin-1") for name, value in headers}
    request = InferenceRequest(id=request_id, path=path, api=api, model="", body=body, headers=named, arrived=arrived)
    _read_headers(request, named)
    if trust_subset and (subset := named.get(_SUBSET)):
        request.subset = _addresses(subset)
    if api is not Api.OTHER or (path in _WITH_MODEL and body[:1] == b"{"):
        _read_body(request, _decode(body))
        request.target_model = _header(named, _REWRITE) or request.model
    return request


def with_model(body: bytes, name: str) -> bytes:
    """The same object with another `model`; every other value stays as it is, byte for byte. `body` was parsed."""
    fields = _object.decode(body)
    fields["model"] = msgspec.Raw(msgspec.json.encode(name))
    return msgspec.json.encode(fields)


def _decode(body: bytes) -> _Fields:
    try:
        return _decoder.decode(body)
    except msgspec.ValidationError as error:
        raise _wrong(error) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise RequestError(f"The body is not valid JSON: {error}.", remedy="Send one JSON object.") from None
    except RecursionError:
        raise RequestError("The body is nested too deeply.", remedy="Send a flatter JSON object.") from None


def _wrong(error: msgspec.ValidationError) -> RequestError:
    if "$.model" in str(error):
        return InvalidParameter("model is not a string.", param="model", remedy="Name one that /v1/models lists.")
    return RequestError("The body is no JSON object.", remedy="Send one JSON object.")


def _read_body(request: InferenceRequest, fields: _Fields) -> None:
    request.model = _bounded(fields.model or "", "model")
    request.stream = bytes(fields.stream) == b"true"
    request.cache_salt = _string(fields.cache_salt)
    request.max_tokens = (
        _count(fields.max_completion_tokens) or _count(fields.max_tokens) or _count(fields.max_output_tokens)
    )
    if request.api is Api.COMPLETIONS:
        request.prompt, request.prompt_token_ids = completion_prompt(bytes(fields.prompt))
    elif request.api is Api.EMBEDDINGS:
        request.prompt, request.prompt_token_ids = _pooling_prompt(fields)
    elif request.api is not Api.OTHER:
        request.prompt = _chat_prompt(fields)


def _chat_prompt(fields: _Fields) -> bytes:
    return b"".join(
        [
            field("chat_template", bytes(fields.chat_template)),
            field("chat_template_kwargs", bytes(fields.chat_template_kwargs)),
            field("tools", bytes(fields.tools)),
            text_or_messages(bytes(fields.system)),
            text_or_messages(bytes(fields.instructions)),
            text_or_messages(bytes(fields.messages)),
            text_or_messages(bytes(fields.input)),
        ]
    )


def _pooling_prompt(fields: _Fields) -> tuple[bytes, Sequence[int] | None]:
    if fields.input:
        return completion_prompt(bytes(fields.input))
    if fields.messages:
        return text_or_messages(bytes(fields.messages)), None
    return b"".join([bytes(raw) for raw in (fields.query, fields.text_1, fields.documents, fields.text_2)]), None


def _string(raw: msgspec.Raw) -> str:
    data = bytes(raw)
    if data[:1] != b'"':
        return ""
    try:
        return msgspec.json.decode(data, type=str)
    except msgspec.DecodeError:
        return ""


def _count(raw: msgspec.Raw) -> int | None:
    data = bytes(raw)
    return int(data) if data.isdigit() and len(data) < 10 else None


# --- headers ------------------------------------------------------------------------------------------------


def _read_headers(request: InferenceRequest, headers: Mapping[str, str]) -> None:
    request.objective = _header(headers, _OBJECTIVE)
    request.fairness_id = _header(headers, _FAIRNESS)
    request.session_id = _header(headers, _SESSION)
    request.slo_ttft = _seconds(_header(headers, _SLO_TTFT), _SLO_TTFT[0])
    request.slo_tpot = _seconds(_header(headers, _SLO_TPOT), _SLO_TPOT[0])


def _header(headers: Mapping[str, str], names: Iterable[str]) -> str:
    for name in names:
        if value := headers.get(name, "").strip():
            return _bounded(value, name)
    return ""


def _bounded(value: str, what: str) -> str:
    if len(value) > MAX_NAME:
        raise InvalidParameter(f"{what} has {len(value)} characters.", param=what, remedy=f"Use {MAX_NAME} at most.")
    return value


def _seconds(value: str, name: str) -> float | None:
    if not value:
        return None
    try:
        milliseconds = float(value)
    except ValueError:
        milliseconds = math.nan
    if not 0 < milliseconds < math.inf:
        raise InvalidParameter(f"{name} is {value[:80]!r}.", param=name, remedy="Give milliseconds above 0.")
    return milliseconds / 1000


def _addresses(value: str) -> frozenset[str]:
    addresses = frozenset(filter(None, (address.strip() for address in value.split(","))))
    if len(addresses) > MAX_SUBSET:
        raise InvalidParameter(
            f"{_SUBSET} names {len(addresses)} endpoints.", param=_SUBSET, remedy=f"Name {MAX_SUBSET} at most."
        )
    return addresses
