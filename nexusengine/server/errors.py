"""Errors as OpenAI's clients expect them."""

from __future__ import annotations

import math
from typing import Any

from starlette.responses import JSONResponse

from nexusengine.errors import NexusError


def error_body(error: NexusError) -> dict[str, Any]:
    return {
        "error": {"message": error.message, "type": error.openai_type, "param": error.param, "code": error.code},
    }


def error_response(error: NexusError) -> JSONResponse:
    headers = {} if error.retry_after_s is None else {"Retry-After": str(math.ceil(error.retry_after_s))}
    return JSONResponse(error_body(error), error.http_status, headers)
