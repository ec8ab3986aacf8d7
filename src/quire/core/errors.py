"""The one tree of errors.

A `QuireError` is somebody's fault that can be named: it says what was wrong, with what value, and what to do. It has a
stable `code`, the offending parameter where there is one, and the HTTP status that a server answers with. Faults of our
own are asserts, not members of this tree.

`ErrorInfo` is the same thing as plain data, for crossing a process boundary; `to_info` and `from_info` convert.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True, slots=True, kw_only=True)
class ErrorInfo:
    """An error as data. `retry_after` is in seconds."""

    code: str
    message: str
    param: str | None = None
    remedy: str | None = None
    retry_after: float | None = None


class QuireError(Exception):
    """Root of the tree. `str(error)` is the message followed by the remedy."""

    code: ClassVar[str] = "error"
    status: ClassVar[int] = 500

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        remedy: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.remedy = remedy
        self.retry_after = retry_after

    def __str__(self) -> str:
        return f"{self.message} {self.remedy}" if self.remedy else self.message

    def to_info(self) -> ErrorInfo:
        return ErrorInfo(
            code=self.code, message=self.message, param=self.param, remedy=self.remedy, retry_after=self.retry_after
        )


# --- the caller's request is at fault: 4xx ------------------------------------------------------------------


class RequestError(QuireError):
    """The request cannot be served as it was asked."""

    code = "invalid_request"
    status = 400


class InvalidParameter(RequestError):
    """A parameter has a wrong type or value."""

    code = "invalid_parameter"


class PromptTooLong(RequestError):
    """Prompt plus wanted output do not fit the model's context, or the KV cache."""

    code = "context_length_exceeded"


class UnsupportedTask(RequestError):
    """The model is of another kind: it generates text, or makes vectors, or scores."""

    code = "unsupported_task"


class TemplateError(RequestError):
    """The chat template refused the messages, or went over its bounds."""

    code = "chat_template_error"


class Unauthorized(RequestError):
    code = "invalid_api_key"
    status = 401


class NotFound(RequestError):
    code = "not_found"
    status = 404


class ModelNotFound(NotFound):
    code = "model_not_found"


class RequestTooLarge(RequestError):
    """A body or header is larger than the server accepts."""

    code = "request_too_large"
    status = 413


class Cancelled(RequestError):
    """The caller took the request back."""

    code = "cancelled"
    status = 499


# --- a timely refusal: the request was fine, the moment was not ---------------------------------------------


class Refusal(QuireError):
    """Refused for now; `retry_after` says when to come back."""

    code = "refused"
    status = 503


class QueueFull(Refusal):
    code = "queue_full"
    status = 429


class DeadlineExceeded(Refusal):
    """A deadline passed, or cannot be met any more."""

    code = "deadline_exceeded"
    status = 504


class Draining(Refusal):
    """The server is stopping and takes no new requests."""

    code = "draining"
    status = 503


# --- the engine is at fault ---------------------------------------------------------------------------------


class EngineError(QuireError):
    code = "engine_error"
    status = 500


class EngineDead(EngineError):
    """The engine process ended or hangs; the request could not be replayed."""

    code = "engine_dead"
    status = 503


class EngineStartFailed(EngineError):
    """The engine did not come up; the message carries the child's own last error."""

    code = "engine_start_failed"


class NotEnoughMemory(EngineError):
    """The model, or a single KV block, does not fit the memory that is there."""

    code = "not_enough_memory"


# --- what the operator handed us is at fault ----------------------------------------------------------------


class ConfigError(QuireError):
    """A flag, a setting in the YAML file, or a QUIRE_* variable is wrong."""

    code = "invalid_config"


class StorageFull(QuireError):
    """Nothing can be written to a disk until there is room on it."""

    code = "storage_full"
    status = 507


class CheckpointError(QuireError):
    """The checkpoint cannot be used; the message names file, tensor, expected and found."""

    code = "invalid_checkpoint"


class MissingFile(CheckpointError):
    code = "missing_file"


class TruncatedFile(CheckpointError):
    code = "truncated_file"


class UnknownArchitecture(CheckpointError):
    code = "unknown_architecture"


class UnsupportedModel(CheckpointError):
    """The architecture is known, but what it does cannot be served."""

    code = "unsupported_model"


class MissingTensor(CheckpointError):
    code = "missing_tensor"


class ShapeMismatch(CheckpointError):
    code = "shape_mismatch"


class BadValue(CheckpointError):
    """A value in the checkpoint (a scale, a norm, a config field) is not usable: NaN, infinite, zero, negative."""

    code = "bad_value"


def _by_code(root: type[QuireError]) -> dict[str, type[QuireError]]:
    found = {root.code: root}
    for child in root.__subclasses__():
        found.update(_by_code(child))
    return found


_CLASSES = _by_code(QuireError)


def from_info(info: ErrorInfo) -> QuireError:
    """The error that `to_info` described. A code from a newer version becomes a plain `QuireError`."""
    cls = _CLASSES.get(info.code, QuireError)
    return cls(info.message, param=info.param, remedy=info.remedy, retry_after=info.retry_after)
