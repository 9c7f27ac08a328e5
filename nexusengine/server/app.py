"""The HTTP application: routes, and around all of them request ids, keys, limits, metrics and errors."""

from __future__ import annotations

import secrets
import uuid

from starlette.applications import Starlette
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
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
from nexusengine.server.state import ServerState

_GENERATION = (completions.CHAT, completions.TEXT)
_OPEN_TO_ALL = ("/livez", "/readyz", "/startupz", "/health", "/version", "/metrics")
_MAX_REQUEST_ID = 128
log = get_logger("server")


def create_app(state: ServerState) -> ASGIApp:
    """The application for one server. Of the framework only its routes: its own layers would do what Edge does."""
    routes = [*completions.routes, *info.routes, *(debug.routes if state.config.debug_endpoints else ())]
    app = Starlette(routes=routes)
    app.state.server = state
    return Edge(app, state)


def refusal(error: Exception, scope: Scope, state: ServerState) -> NexusError:
    """What a client is told of an error."""
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
        return MethodNotAllowed(f"{path} does not take {scope['method']}")
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
        request_id = headers.get("x-request-id", "")[:_MAX_REQUEST_ID] or uuid.uuid4().hex
        status = 0

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
                await error_response(refusal(error, scope, self._state))(scope, receive, send_with_id)
        finally:
            if generation:
                self._state.in_progress -= 1
                self._state.metrics.left(scope["path"], status or Cancelled.http_status)

    def _admit(self, scope: Scope, headers: Headers, generation: bool) -> None:
        """Raises Unauthorized or Overloaded."""
        config = self._state.config
        if config.api_key and scope["path"] not in _OPEN_TO_ALL:
            given = headers.get("authorization", "").removeprefix("Bearer ")
            if not secrets.compare_digest(given.encode(), config.api_key.encode()):
                raise Unauthorized("the API key is missing or wrong; send it as 'Authorization: Bearer KEY'")
        if generation and self._state.in_progress > config.max_requests:
            raise Overloaded(f"{config.max_requests} requests are in progress already", retry_after_s=1.0)
