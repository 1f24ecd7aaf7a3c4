"""Says which paths there are, and who answers them."""

import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.responses import Response

from orchestrator.gateway.http.asks import Asks
from orchestrator.gateway.http.connection import Gone, json_bytes, read_json
from orchestrator.gateway.http.exchange import Exchange, Service
from orchestrator.gateway.http.problem import HttpError, headers_of, problem_of, status_of
from orchestrator.gateway.http.token_calls import CONVERSION_S, TokenCalls
from orchestrator.gateway.request.request import check_model
from placement.errors import HeterodyneError

_OWNER = "heterodyne"


def make_app(service: Service) -> FastAPI:
    """Returns the application. It has no pages: what it takes is what clients of the OpenAI API send."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    paths = _Paths(service)
    routes: tuple[tuple[str, str, Callable[[Request], Awaitable[Response]]], ...] = (
        ("POST", "/v1/chat/completions", paths.chat_completions),
        ("POST", "/v1/completions", paths.completions),
        ("GET", "/v1/models", paths.models),
        ("GET", "/v1/models/{name:path}", paths.model),
        ("GET", "/health", paths.health),
        ("POST", "/tokenize", paths.tokenize),
        ("POST", "/detokenize", paths.detokenize),
        ("GET", "/tokenizer_info", paths.tokenizer_info),
    )
    for method, path, endpoint in routes:
        app.add_route(path, endpoint, methods=[method])
    app.add_exception_handler(HTTPException, _refuse_http)
    app.add_exception_handler(Gone, _say_nothing)
    app.add_exception_handler(HeterodyneError, _refuse)
    return app


class _Paths:
    """Answers each path."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._asks = Asks(service.model)
        self._tokens = TokenCalls(service.model)
        self._created_s = int(time.time())

    async def chat_completions(self, _: Request) -> Response:
        return Exchange(self._service, self._asks.chat)

    async def completions(self, _: Request) -> Response:
        return Exchange(self._service, self._asks.completion)

    async def models(self, _: Request) -> Response:
        return _json({"object": "list", "data": [self._described()]})

    async def model(self, request: Request) -> Response:
        check_model(request.path_params["name"], self._service.model)
        return _json(self._described())

    def _described(self) -> dict[str, Any]:
        model = self._service.model
        head = {"id": model.name, "object": "model", "created": self._created_s, "owned_by": _OWNER}
        return {**head, "root": model.name, "parent": None, "max_model_len": model.max_context_tokens}

    async def health(self, _: Request) -> Response:
        return Response(status_code=200 if self._service.is_serving() else 503)

    async def tokenize(self, request: Request) -> Response:
        return _json(await self._tokens.tokenize(await _body(request)))

    async def detokenize(self, request: Request) -> Response:
        return _json(await self._tokens.detokenize(await _body(request)))

    async def tokenizer_info(self, _: Request) -> Response:
        return _json(self._tokens.info())


async def _body(request: Request) -> bytes:
    return await read_json(request.headers, request.receive, CONVERSION_S)


def _json(value: Mapping[str, Any], *, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(json_bytes(value), status_code=status, headers=headers, media_type="application/json")


async def _refuse(_: Request, error: Exception) -> Response:
    assert isinstance(error, HeterodyneError)
    return _json(problem_of(error), status=status_of(error), headers=headers_of(error))


async def _refuse_http(request: Request, error: Exception) -> Response:
    """Says in the API's form that there is no such path, or not for this method."""
    assert isinstance(error, HTTPException)
    words = {404: f"there is no {request.url.path[:100]} here", 405: f"{request.method} is not answered here"}
    refused = HttpError(error.status_code, words.get(error.status_code, str(error.detail)))
    return _json(problem_of(refused), status=error.status_code, headers=dict(error.headers or {}))


async def _say_nothing(_: Request, error: Exception) -> Response:
    """Answers a client that is not there any more."""
    return Response(status_code=499)
