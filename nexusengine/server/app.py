"""The HTTP application: routes, and around all of them request ids, keys, limits, metrics and errors."""

from __future__ import annotations

import secrets
import uuid

from fastapi import FastAPI
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from nexusengine import __version__
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

_GENERATION = (completions.CHAT, "/v1/completions")
_OPEN_TO_ALL = ("/livez", "/readyz", "/startupz", "/health", "/version", "/metrics")
_MAX_REQUEST_ID = 128
log = get_logger("server")


def create_app(state: ServerState) -> ASGIApp:
    """The application for one server."""
    app = FastAPI(title="nexusengine", version=__version__, openapi_url=None, docs_url=None, redoc_url=None)
    app.state.server = state
    app.include_router(completions.router)
    app.include_router(info.router)
    if state.config.debug_endpoints:
        app.include_router(debug.router)
    app.add_exception_handler(NexusError, _nexus_error)  # type: ignore[arg-type]
    app.add_exception_handler(HTTPException, _http_error)  # type: ignore[arg-type]
    app.add_exception_handler(Exception, _fault)
    return Edge(app, state)


async def _nexus_error(request: Request, error: NexusError) -> Response:
    if error.param == "prompt" and request.url.path == completions.CHAT:  # what the engine calls a prompt
        error.param = "messages"
    return error_response(error)


async def _fault(request: object, error: Exception) -> Response:
    """Our own faults; the framework raises them again after this reply, and Edge logs them."""
    return error_response(InternalError(SERVER_FAILED))


async def _http_error(request: object, error: HTTPException) -> Response:
    """What the framework itself refuses: unknown paths and methods."""
    path = request.url.path  # type: ignore[attr-defined]
    if error.status_code == 404:
        off = path.startswith("/debug/") and not request.app.state.server.config.debug_endpoints  # type: ignore[attr-defined]
        hint = "; the server runs without --debug-endpoints" if off else ""
        return error_response(NotFound(f"there is nothing at {path}{hint}"))
    if error.status_code == 405:
        return error_response(MethodNotAllowed(f"{path} does not take {request.method}"))  # type: ignore[attr-defined]
    return error_response(InvalidRequest(str(error.detail)))


class Edge:
    """The outermost layer. Whatever goes wrong inside becomes a reply in OpenAI's form."""

    def __init__(self, app: ASGIApp, state: ServerState) -> None:
        self._app, self._state = app, state

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
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
            await self._app(scope, receive, send_with_id)
        except NexusError as error:
            if status == 0:
                await error_response(error)(scope, receive, send_with_id)
        except Exception:
            log.exception("request %s to %s failed", request_id, scope["path"])
            if status == 0:
                await error_response(InternalError(SERVER_FAILED))(scope, receive, send_with_id)
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
