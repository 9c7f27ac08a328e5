"""Every error a user can meet, in one table: its code, its HTTP status, and its message.

An error crosses process boundaries as (code, message, param, retry_after_s) and is rebuilt with `error_from_code`.
Messages say what was wrong, with the value, and what to do about it.
"""

from __future__ import annotations

from typing import ClassVar


class NexusError(Exception):
    """Base of all errors that are meant to be read by a user.

    param: the request field or setting at fault, in the spelling the user wrote, or None.
    retry_after_s: seconds after which trying again makes sense, or None.
    """

    code: ClassVar[str] = "internal_error"
    http_status: ClassVar[int] = 500
    openai_type: ClassVar[str] = "server_error"

    def __init__(self, message: str, *, param: str | None = None, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.retry_after_s = retry_after_s


class InternalError(NexusError):
    """A fault of ours; the request is not to blame."""


class InvalidRequest(NexusError, ValueError):
    """A field of the request is malformed, out of range or not supported."""

    code = "invalid_value"
    http_status = 400
    openai_type = "invalid_request_error"


class ContextTooLong(InvalidRequest):
    """Prompt plus requested output do not fit the model's context or the KV cache."""

    code = "context_length_exceeded"


class ModelNotFound(InvalidRequest):
    """The request names a model that this server does not serve."""

    code = "model_not_found"
    http_status = 404


class NotFound(InvalidRequest):
    """No such path or object."""

    code = "not_found"
    http_status = 404


class MethodNotAllowed(InvalidRequest):
    """The path exists but not with this HTTP method."""

    code = "method_not_allowed"
    http_status = 405


class Unauthorized(InvalidRequest):
    """The server wants an API key and the request has none, or a wrong one."""

    code = "invalid_api_key"
    http_status = 401


class PayloadTooLarge(InvalidRequest):
    """The request body is larger than the server reads."""

    code = "payload_too_large"
    http_status = 413


class UnsupportedMediaType(InvalidRequest):
    """The request body is not declared as JSON, or is compressed."""

    code = "unsupported_media_type"
    http_status = 415


class HeadersTooLarge(InvalidRequest):
    """The request line and headers are larger than the server reads."""

    code = "headers_too_large"
    http_status = 431


class HeadersTimeout(InvalidRequest):
    """The request line and headers did not arrive in time."""

    code = "headers_timeout"
    http_status = 408


class Overloaded(NexusError):
    """A queue is full. `retry_after_s` says when it is predicted to have drained."""

    code = "overloaded"
    http_status = 429
    openai_type = "rate_limit_error"


class Cancelled(NexusError):
    """The client went away, or asked for the request to stop."""

    code = "cancelled"
    http_status = 499


class WorkerLost(NexusError):
    """The worker that served the request died after the first token was sent."""

    code = "worker_lost"
    http_status = 502


class Unavailable(NexusError):
    """Starting, draining, or no worker is able to serve."""

    code = "unavailable"
    http_status = 503


class DeadlineExceeded(NexusError):
    """The request was not finished within its time limit."""

    code = "deadline_exceeded"
    http_status = 504


class ConfigError(NexusError, ValueError):
    """A setting is malformed or contradicts another; raised before anything starts."""

    code = "config_error"


class ModelLoadError(NexusError):
    """A model could not be found, downloaded, verified or read; names the file and the reason."""

    code = "model_load_error"


def _subclasses(cls: type[NexusError]) -> list[type[NexusError]]:
    return [cls, *(s for c in cls.__subclasses__() for s in _subclasses(c))]


ERROR_TABLE: dict[str, type[NexusError]] = {c.code: c for c in _subclasses(NexusError) if c is not NexusError}


def error_from_code(
    code: str, message: str, *, param: str | None = None, retry_after_s: float | None = None
) -> NexusError:
    """Rebuild an error that crossed a process boundary; an unknown code becomes InternalError."""
    return ERROR_TABLE.get(code, InternalError)(message, param=param, retry_after_s=retry_after_s)
