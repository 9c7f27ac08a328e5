"""Everything but generation: models, tokens, health, version, metrics."""

from __future__ import annotations

import asyncio
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from nexusengine import __version__
from nexusengine.errors import InvalidRequest
from nexusengine.requests import check_token_ids
from nexusengine.server.body import read_body
from nexusengine.server.chat_messages import in_template_form
from nexusengine.server.schemas import DetokenizeRequest, TokenizeRequest
from nexusengine.server.state import ServerState


def _state(request: Request) -> ServerState:
    state: ServerState = request.app.state.server
    return state


def _model(state: ServerState) -> dict[str, Any]:
    model = {"id": state.model_name, "object": "model", "created": state.started_unix_s, "owned_by": "nexusengine"}
    if not (state.engine and state.ready):
        return model
    return model | {"max_model_len": state.engine.max_model_len, "vocab_size": state.engine.vocab_size}


async def models(request: Request) -> Response:
    return JSONResponse({"object": "list", "data": [_model(_state(request))]})


async def model(request: Request) -> Response:
    state = _state(request)
    state.check_model(request.path_params["name"])
    return JSONResponse(_model(state))


async def tokenize(request: Request) -> Response:
    """{"prompt"} or {"messages"} -> {"tokens", "count", "max_model_len"} and, if asked for, "token_strs"."""
    state = _state(request)
    body = await read_body(request, TokenizeRequest)
    state.check_model(body.model)
    engine = state.serving_engine()
    if (body.prompt is None) == (body.messages is None):
        raise InvalidRequest("give either prompt or messages", param="prompt")
    if body.prompt is not None:
        tokens = await engine.encode(body.prompt, body.add_special_tokens is not False)
    else:
        text = await engine.render_chat(in_template_form(body.messages or ()), **body.template_options())
        tokens = await engine.encode(text, body.add_special_tokens is True)
    reply: dict[str, Any] = {"tokens": tokens, "count": len(tokens), "max_model_len": engine.max_model_len}
    if body.return_token_strs:
        reply["token_strs"] = [engine.tokenizer.token_str(i) for i in tokens]
    return JSONResponse(reply)


async def detokenize(request: Request) -> Response:
    """{"tokens"} -> {"prompt"}, special tokens written out."""
    state = _state(request)
    body = await read_body(request, DetokenizeRequest)
    state.check_model(body.model)
    engine = state.serving_engine()
    check_token_ids(body.tokens, engine.vocab_size, "tokens")
    text = await asyncio.to_thread(engine.tokenizer.decode, body.tokens, False)
    return JSONResponse({"prompt": text})


async def livez(request: Request) -> Response:
    """200 as soon as HTTP is up."""
    return JSONResponse({"status": "ok"})


async def readyz(request: Request) -> Response:
    """200 while requests are served: at least one worker is ready, and the server is not shutting down."""
    state = _state(request)
    return JSONResponse(state.progress(), 200 if state.ready else 503)


async def startupz(request: Request) -> Response:
    """503 with the phase of start-up until it is over, 200 ever after."""
    state = _state(request)
    return JSONResponse(state.progress(), 200 if state.ready or state.was_ready else 503)


async def version(request: Request) -> Response:
    return JSONResponse({"version": __version__})


async def metrics(request: Request) -> Response:
    return Response(_state(request).metrics.render(), media_type="text/plain; version=0.0.4; charset=utf-8")


routes = [
    Route("/v1/models", models),
    Route("/v1/models/{name:path}", model),
    Route("/tokenize", tokenize, methods=["POST"]),
    Route("/detokenize", detokenize, methods=["POST"]),
    Route("/livez", livez),
    Route("/health", livez),
    Route("/readyz", readyz),
    Route("/startupz", startupz),
    Route("/version", version),
    Route("/metrics", metrics),
]
