"""The HTTP application: routes, and around all of them request ids, keys, limits, metrics and errors."""

from __future__ import annotations

import re
import secrets
import time
import uuid

from starlette.applications import Starlette
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from nexusengine.errors import (
    Cancelled,
    InternalError,
    InvalidRequest,
    MethodNotAllowed,
    NexusError,
    NotFound,
    Overloaded,
    Unauthorized,
)
from nexusengine.obs.logs import get_logger
from nexusengine.server import completions, debug, info
from nexusengine.server.errors import SERVER_FAILED, error_response
from nexusengine.server.recorded_request import error_code, how_ended
from nexusengine.server.state import ServerState
from nexusengine.server.verdict import missed_by

_GENERATION = (completions.CHAT, completions.TEXT)
_OPEN_TO_ALL = ("/livez", "/readyz", "/startupz", "/health", "/version", "/metrics")
_REQUEST_ID = re.compile(r"[ -~]{1,128}", re.ASCII)
_SHOWN_TO_PAGES = ["x-request-id", "x-nexus-ignored", "retry-after"]
log = get_logger("server")


def create_app(state: ServerState) -> ASGIApp:
    """The application for one server. Of the framework only its routes: its own layers would do what Edge does."""
    routes = [*completions.routes, *info.routes, *(debug.routes if state.config.debug_endpoints else ())]
    app = Starlette(routes=routes)
    app.state.server = state
    edge = Edge(app, state)
    if state.config.cors_origins is None:
        return edge
    return CORSMiddleware(
        edge,
        allow_origins=state.config.cors_origins.split(","),
        allow_methods=["GET", "POST"],
        allow_headers=["*"],
        expose_headers=_SHOWN_TO_PAGES,
    )


def refusal(error: Exception, scope: Scope, state: ServerState) -> NexusError:
    """The reply to a request that failed."""
    path = scope["path"]
    if isinstance(error, NexusError):
        if error.param == "prompt" and path == completions.CHAT:  # what the engine calls a prompt
            error.param = "messages"
        return error
    if not isinstance(error, HTTPException):
        return InternalError(SERVER_FAILED)
    if error.status_code == 404:
        off = path.startswith("/debug/") and not state.config.debug_endpoints
        hint = "; the server runs without --debug-endpoints" if off else ""
        return NotFound(f"there is nothing at {path}{hint}")
    if error.status_code == 405:
        allowed = (error.headers or {}).get("Allow", "")
        return MethodNotAllowed(f"{path} does not take {scope['method']}, only {allowed}")
    return InvalidRequest(str(error.detail))


class Edge:
    """The outermost layer. Whatever goes wrong inside becomes a reply in OpenAI's form."""

    def __init__(self, app: Starlette, state: ServerState) -> None:
        self._app, self._state = app, state

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        scope["app"] = self._app
        headers = Headers(scope=scope)
        request_id = _request_id(headers)
        status, arrival_s = 0, time.monotonic()

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        generation = scope["path"] in _GENERATION and scope["method"] == "POST"
        if generation:
            self._state.metrics.entered()
            self._state.in_progress += 1
        try:
            self._admit(scope, headers, generation)
            await self._app.router(scope, receive, send_with_id)
        except Exception as error:
            if not isinstance(error, NexusError | HTTPException):
                log.exception("request %s to %s failed", request_id, scope["path"])
            if status == 0:
                further = error.headers if isinstance(error, HTTPException) else None
                if generation:
                    self._record_turned_away(scope, arrival_s, error)
                await error_response(refusal(error, scope, self._state), further)(scope, receive, send_with_id)
        finally:
            if generation:
                self._state.in_progress -= 1
                self._state.metrics.left(scope["path"], status or Cancelled.http_status)

    def _record_turned_away(self, scope: Scope, arrival_s: float, error: Exception) -> None:
        """Note in the trace a request that failed, by no fault of its own, before its prompt was read."""
        recorder = self._state.recorder
        if recorder is None or scope.get(completions.BEGUN) or isinstance(error, HTTPException):
            return
        missed = missed_by(error)
        if missed is not None:
            code = error_code(error)
            recorder.turned_away(arrival_s, how_ended(missed, code), code)

    def _admit(self, scope: Scope, headers: Headers, generation: bool) -> None:
        """Raises Unauthorized or Overloaded."""
        config = self._state.config
        closed = config.api_key is not None and scope["path"] not in _OPEN_TO_ALL
        if closed and not _is_bearer(headers.getlist("authorization"), config.api_key or ""):
            raise Unauthorized("the API key is missing or wrong; send it as 'Authorization: Bearer KEY'")
        if generation and self._state.in_progress > config.max_requests:
            raise Overloaded(f"{config.max_requests} requests are in progress already", retry_after_s=1.0)


def _is_bearer(given: list[str], api_key: str) -> bool:
    """Whether there is one Authorization header, and it is `Bearer KEY`; the scheme's case does not matter."""
    if len(given) != 1:
        return False
    scheme, _, token = given[0].partition(" ")
    right = secrets.compare_digest(token.strip().encode(), api_key.encode())
    return right and scheme.lower() == "bearer"


def _request_id(headers: Headers) -> str:
    """The client's, up to 128 characters of it; one of ours if there is none that a header could carry back."""
    found = _REQUEST_ID.match(headers.get("x-request-id", ""))
    return found.group().strip() if found and found.group().strip() else uuid.uuid4().hex
