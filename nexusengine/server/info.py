"""Everything but generation: models, tokens, health, version, metrics."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from nexusengine import __version__
from nexusengine.errors import InvalidRequest
from nexusengine.request_limits import check_token_ids
from nexusengine.server.body import read_body
from nexusengine.server.chat_messages import in_template_form
from nexusengine.server.completions import encode
from nexusengine.server.pieces import JSONPieces
from nexusengine.server.schemas import DetokenizeRequest, TokenizeRequest
from nexusengine.server.state import ServerState
from nexusengine.tokenize import Tokenizer

_PIECE = 50_000


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
        tokens = await encode(state, body.prompt, body.add_special_tokens is not False)
    else:
        text = await engine.render_chat(in_template_form(body.messages or ()), **body.template_options())
        tokens = await encode(state, text, body.add_special_tokens is True)
    longest, strings = engine.max_model_len, body.return_token_strs
    return JSONPieces(await state.heavy.run(len(tokens), _tokens_reply, engine.tokenizer, tokens, longest, strings))


def _tokens_reply(tokenizer: Tokenizer, tokens: list[int], max_model_len: int, with_strings: bool) -> list[bytes]:
    """The reply's JSON in pieces, so that other threads get their turns in between."""
    parts = [tokens[i : i + _PIECE] for i in range(0, len(tokens), _PIECE)]
    pieces = [b'{"tokens":', *_array(parts)]
    pieces.append(f',"count":{len(tokens)},"max_model_len":{max_model_len}'.encode())
    if with_strings:
        pieces += [b',"token_strs":', *_array([tokenizer.token_str(i) for i in part] for part in parts)]
    return [*pieces, b"}"]


def _array(parts: Iterable[list[Any]]) -> Iterator[bytes]:
    """One JSON array of all their items."""
    yield b"["
    for n, part in enumerate(parts):
        yield (b"," if n else b"") + msgspec.json.encode(part)[1:-1]
    yield b"]"


async def detokenize(request: Request) -> Response:
    """{"tokens"} -> {"prompt"}, special tokens written out."""
    state = _state(request)
    body = await read_body(request, DetokenizeRequest)
    state.check_model(body.model)
    engine = state.serving_engine()

    def reply() -> list[bytes]:
        for begin in range(0, len(body.tokens), _PIECE):
            check_token_ids(body.tokens[begin : begin + _PIECE], engine.vocab_size, "tokens")
        text = engine.tokenizer.decode(body.tokens, skip_special_tokens=False)
        parts = (msgspec.json.encode(text[i : i + _PIECE])[1:-1] for i in range(0, len(text), _PIECE))
        return [b'{"prompt":"', *parts, b'"}']

    return JSONPieces(await state.heavy.run(len(body.tokens), reply))


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
