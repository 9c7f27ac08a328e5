"""Errors as OpenAI's clients expect them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from starlette.responses import JSONResponse

from nexusengine.errors import NexusError, Unauthorized

SERVER_FAILED = "the server failed; see its log"


def error_body(error: NexusError) -> dict[str, Any]:
    message, param = _valid_unicode(error.message), error.param and _valid_unicode(error.param)
    return {"error": {"message": message, "type": error.openai_type, "param": param, "code": error.code}}


def _valid_unicode(text: str) -> str:
    """JSON may hold halves of characters, and a message may quote them; a reply cannot."""
    return text.encode(errors="backslashreplace").decode()


def error_response(error: NexusError, headers: Mapping[str, str] | None = None) -> JSONResponse:
    """The error as a reply. headers: further ones of it."""
    own = {}
    if error.retry_after_s is not None:
        own["Retry-After"] = str(math.ceil(error.retry_after_s))
    if isinstance(error, Unauthorized):
        own["WWW-Authenticate"] = "Bearer"
    return JSONResponse(error_body(error), error.http_status, {**(headers or {}), **own})
