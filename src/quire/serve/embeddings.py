"""/v1/embeddings, /pooling and /classify: a result for each input."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TypeVar

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from quire.core.errors import InvalidParameter
from quire.core.pooling import Pooled, PoolingInfo, PoolingParams, PoolingTask
from quire.serve.body import decode_body
from quire.serve.call import Call
from quire.serve.inbox import patience
from quire.serve.pooling import Encoding, Results, as_base64, row, rows, run_pooling
from quire.serve.pooling_inputs import read_inputs
from quire.serve.service import Service, off_loop
from quire.text.pooling_prompt import PoolingEncoder
from quire.web.answers import json_response
from quire.wire.pooling import (
    Classification,
    ClassificationList,
    ClassifyRequest,
    Embedding,
    EmbeddingList,
    EmbeddingRequest,
    EncodingFields,
    InputFields,
    PoolingData,
    PoolingList,
    PoolingRequest,
)

_PER_TOKEN = (PoolingTask.TOKEN_EMBED, PoolingTask.TOKEN_CLASSIFY)

T = TypeVar("T", bound=InputFields)
Params = Callable[[T, PoolingEncoder], PoolingParams]
Write = Callable[[T, Call, Results, PoolingParams, PoolingInfo], msgspec.Struct]


class Embeddings:
    def __init__(self, service: Service) -> None:
        self._service = service

    async def embeddings(self, request: Request) -> Response:
        return await self._create(request, EmbeddingRequest, "embd", _embedding_params, _embeddings)

    async def pooling(self, request: Request) -> Response:
        return await self._create(request, PoolingRequest, "pool", _pooling_params, _poolings)

    async def classify(self, request: Request) -> Response:
        return await self._create(request, ClassifyRequest, "classify", _classify_params, _classifications)

    async def _create(
        self, request: Request, kind: type[T], prefix: str, params_of: Params[T], write: Write[T]
    ) -> Response:
        service = self._service
        arrival = service.clock()
        body = await request.body()
        fields = decode_body(body, kind)
        model = service.check_model(fields.model)
        call = Call.of(request, body, fields, prefix=prefix, model=model, arrival_time=arrival)
        inputs = read_inputs(fields)
        with service.running_call():
            encoder = await service.pooler(patience(call.deadlines))
            params = params_of(fields, encoder)
            truncation = encoder.truncation(fields.truncate_prompt_tokens, fields.truncation_side)
            results = await run_pooling(
                request,
                service,
                call,
                params,
                lambda: inputs.encode(encoder, truncation),
                info=encoder.pooling,
                encoding=_encoding(fields),
                size=inputs.size,
                param=inputs.param,
            )
            size = sum(each.num_rows * each.num_columns for each in results.pooled)
            answer = partial(write, fields, call, results, params, encoder.pooling)
            return await off_loop(size, lambda: json_response(answer(), headers=call.headers))


def _encoding(fields: InputFields) -> Encoding:
    return (fields.encoding_format or "float") if isinstance(fields, EncodingFields) else "float"


# --- what is asked of the model -------------------------------------------------------------------------------------


def _embedding_params(fields: EncodingFields, encoder: PoolingEncoder) -> PoolingParams:
    return _encoding_params(fields, encoder, PoolingTask.EMBED)


def _pooling_params(fields: PoolingRequest, encoder: PoolingEncoder) -> PoolingParams:
    tasks = encoder.pooling.tasks
    default = next((task for task in _PER_TOKEN if task in tasks), tasks[0])
    return _encoding_params(fields, encoder, fields.task or default)


def _classify_params(fields: ClassifyRequest, encoder: PoolingEncoder) -> PoolingParams:
    params = PoolingParams(task=PoolingTask.CLASSIFY, activation=fields.use_activation)
    encoder.check(params)
    return params


def _encoding_params(fields: EncodingFields, encoder: PoolingEncoder, task: PoolingTask) -> PoolingParams:
    embeds = task in (PoolingTask.EMBED, PoolingTask.TOKEN_EMBED)
    all_of_it = embeds and fields.dimensions == encoder.pooling.embedding_size
    params = PoolingParams(
        task=task,
        dimensions=None if all_of_it else fields.dimensions,
        normalize=_normalize(fields) if embeds else fields.normalize,
        activation=None if embeds else fields.use_activation,
    )
    encoder.check(params)
    return params


def _normalize(fields: EncodingFields) -> bool | None:
    if None not in (fields.normalize, fields.use_activation) and fields.normalize != fields.use_activation:
        raise InvalidParameter(
            "normalize and use_activation contradict each other.", param="normalize", remedy="Send one of them."
        )
    return fields.use_activation if fields.normalize is None else fields.normalize


# --- what is answered -----------------------------------------------------------------------------------------------


def _embeddings(
    fields: EmbeddingRequest, call: Call, results: Results, _params: PoolingParams, _info: PoolingInfo
) -> EmbeddingList:
    write = as_base64 if _encoding(fields) == "base64" else row
    data = [Embedding(index=index, embedding=write(each)) for index, each in enumerate(results.pooled)]
    return EmbeddingList(id=call.id, created=call.created, model=call.model, data=data, usage=results.usage)


def _poolings(
    fields: PoolingRequest, call: Call, results: Results, params: PoolingParams, _info: PoolingInfo
) -> PoolingList:
    def write(pooled: Pooled) -> list[list[float] | float] | str:
        if _encoding(fields) == "base64":
            return as_base64(pooled)
        return [*rows(pooled)] if params.task in _PER_TOKEN else [*row(pooled)]

    data = [PoolingData(index=index, data=write(each)) for index, each in enumerate(results.pooled)]
    return PoolingList(id=call.id, created=call.created, model=call.model, data=data, usage=results.usage)


def _classifications(
    _fields: ClassifyRequest, call: Call, results: Results, _params: PoolingParams, info: PoolingInfo
) -> ClassificationList:
    data = []
    for index, each in enumerate(results.pooled):
        probs = row(each)
        best = max(range(len(probs)), key=probs.__getitem__)
        label = info.labels[best] if best < len(info.labels) else None
        data.append(Classification(index=index, label=label, probs=probs, num_classes=len(probs)))
    return ClassificationList(id=call.id, created=call.created, model=call.model, data=data, usage=results.usage)
