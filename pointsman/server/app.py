"""The routes. A handler reads the body, has it understood, submits it, and writes what comes back.

The table of routes is the whole surface of the server: what it does not list does not exist, and who may ask follows from it.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable
from typing import Any, TypeVar

import msgspec
from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Receive, Scope, Send

import pointsman
from pointsman.config import EngineConfig, ServerConfig
from pointsman.server import metrics, native, openapi, reading
from pointsman.server.access import PLAYGROUND, Access
from pointsman.server.admin import Admin, Handler
from pointsman.server.errors import ApiError
from pointsman.server.fleet import Backend, Fleet
from pointsman.server.native import GenerateRequest
from pointsman.server.openapi import Route
from pointsman.server.playground import Page
from pointsman.server.prompts import ServedModel
from pointsman.server.protocol import AbortRequest, ChatRequest, CompletionRequest, FlushRequest
from pointsman.server.responses import Answer, BodyReader, ClientGone, error_response, json_response, respond
from pointsman.server.texts import (
    DetokenizeRequest,
    ParseFunctionCallRequest,
    SeparateReasoningRequest,
    TokenizeRequest,
    detokenize,
    parse_function_call,
    separate_reasoning,
    tokenize,
)

LONG_BODY_BYTES = 16 << 10
CLIENT_GONE = 499

Form = TypeVar("Form", bound=msgspec.Struct)


def create_app(bridge: Backend, server: ServerConfig, engine: EngineConfig) -> FastAPI:
    """The application for one engine."""
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None, redirect_slashes=False)
    routes = Routes(bridge, server, engine).table()
    for route, handler in routes.items():
        app.add_api_route(route.path, handler, methods=list(route.methods))
    app.add_middleware(Access, server=server, admin_routes={route.path for route in routes if route.admin})
    if server.cors_origin:
        app.add_middleware(
            CORSMiddleware, allow_origins=list(server.cors_origin), allow_methods=["GET", "POST"], allow_headers=["*"], max_age=3600
        )
    app.add_exception_handler(ApiError, _api_error)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(ClientGone, _client_gone)
    app.add_exception_handler(Exception, _fault)
    return app


class Routes:
    """The handlers, over one engine."""

    def __init__(self, bridge: Backend, server: ServerConfig, engine: EngineConfig) -> None:
        self._bridge = bridge
        self._engine = engine
        self._seconds = server.request_timeout
        self._bodies = BodyReader()
        self._page = Page.load()

    def table(self) -> dict[Route, Handler]:
        """Every route and who answers it."""
        table: dict[Route, Handler] = {
            Route("/v1/chat/completions", "Answer a conversation", ChatRequest, "ChatCompletion", "ChatCompletionChunk"): self._chat,
            Route("/v1/completions", "Continue texts", CompletionRequest, "Completion", "Completion"): self._complete,
            Route("/v1/models", "The model that is served", None, "ModelList"): self._models,
            Route("/v1/models/{name:path}", "A model by its name", None, "Model"): self._model,
            Route("/generate", "Continue texts, in SGLang's form", GenerateRequest, "Generated", "GeneratedItem"): self._generate,
            Route("/server_info", "What runs here", None, "ServerInfo"): self._server_info,
            Route("/flush_cache", "Forget cached prefixes", FlushRequest, "Flushed", admin=True, optional=True): self._flush_cache,
            Route("/abort_request", "End requests that run", AbortRequest, "Aborted", admin=True): self._abort_request,
        }
        table |= self._texts() | self._outside() | Admin(self._bridge, self._bodies).table()
        table[Route("/health", "Whether the engine is there", None, None, head=True)] = self._health
        table[Route("/ready", "Whether requests would be answered now", None, None, head=True)] = self._ready
        table[Route("/openapi.json", "This document", None, "Document")] = self._document
        self._described = openapi.document(list(table))
        return table

    def _texts(self) -> dict[Route, Handler]:
        """The routes that need no step of the engine."""
        return {
            Route("/tokenize", "The tokens of texts or of a conversation", TokenizeRequest, "Tokens"): self._text(
                TokenizeRequest, tokenize
            ),
            Route("/detokenize", "The text of tokens", DetokenizeRequest, "Texts"): self._text(DetokenizeRequest, detokenize),
            Route("/parse_function_call", "The tool calls in a text", ParseFunctionCallRequest, "FunctionCalls"): self._text(
                ParseFunctionCallRequest, parse_function_call
            ),
            Route("/separate_reasoning", "The thinking in a text", SeparateReasoningRequest, "Reasoning"): self._text(
                SeparateReasoningRequest, separate_reasoning
            ),
        }

    def _outside(self) -> dict[Route, Handler]:
        """The routes that show what goes on inside."""
        return {
            Route(PLAYGROUND, "The playground", None, None, head=True, media="text/html"): self._playground,
            Route("/metrics", "Metrics, as Prometheus reads them", None, None, media="text/plain"): self._metrics,
            Route("/routing_load", "How many tokens used each expert", None, "RoutingLoad"): self._routing_load,
        }

    async def _playground(self, http: Request) -> Response:
        return Response(self._page.body, headers=self._page.headers)

    async def _metrics(self, http: Request) -> Response:
        info = self._bridge.served().info
        body, media = metrics.expose(self._bridge.meters, info.name, info.layers, http.headers.get("accept", ""))
        return Response(body, headers={"content-type": media})

    async def _routing_load(self, http: Request) -> Response:
        info, load = self._bridge.served().info, self._bridge.load
        counts = [list(load.layer(layer)) if load else [0] * info.num_experts for layer in range(len(info.layers))]
        shape = {"layers": list(info.layers), "num_experts": info.num_experts, "num_tokens": sum(counts[0]) // info.top_k}
        return json_response(shape | {"counts": counts})

    async def _health(self, http: Request) -> Response:
        self._bridge.served()
        return Response(status_code=200)

    async def _ready(self, http: Request) -> Response:
        self._bridge.served()
        if released := self._bridge.released:
            code = f"{released[0]}_released" if len(released) == 1 else "memory_released"
            raise ApiError(503, f"{' and '.join(released)} released; requests wait for /resume_memory_occupation", code=code)
        if self._bridge.paused:
            raise ApiError(503, "generation is paused; requests wait for /continue_generation", code="paused")
        return Response(status_code=200)

    async def _models(self, http: Request) -> Response:
        return json_response({"object": "list", "data": [_card(self._bridge.served())]})

    async def _model(self, http: Request) -> Response:
        served = self._bridge.served()
        served.check_name(http.path_params["name"])
        return json_response(_card(served))

    async def _server_info(self, http: Request) -> Response:
        info = msgspec.to_builtins(self._bridge.served().info)
        engine = msgspec.to_builtins(self._engine)
        bridge = self._bridge
        state = {"paused": bridge.paused, "released": bridge.released, "weight_version": bridge.weight_version}
        state |= {"running": bridge.running}
        if isinstance(bridge, Fleet):
            state |= {"replicas": bridge.describe()}
        return json_response({"version": pointsman.__version__, "model": info, "engine": engine, **state})

    async def _document(self, http: Request) -> Response:
        return json_response(self._described)

    async def _chat(self, http: Request) -> Response:
        def prepare(plain: dict[str, Any]) -> Answer:
            return self._bridge.served().chat(reading.convert(plain, ChatRequest), f"chatcmpl-{uuid.uuid4().hex}")

        return await self._answer(http, prepare)

    async def _complete(self, http: Request) -> Response:
        def prepare(plain: dict[str, Any]) -> Answer:
            return self._bridge.served().complete(reading.convert(plain, CompletionRequest), f"cmpl-{uuid.uuid4().hex}")

        return await self._answer(http, prepare)

    async def _generate(self, http: Request) -> Response:
        def prepare(plain: dict[str, Any]) -> Answer:
            return self._bridge.served().generate(reading.convert(plain, GenerateRequest, native.NO_EFFECT), uuid.uuid4().hex)

        return await self._answer(http, prepare)

    async def _answer(self, http: Request, prepare: Callable[[dict[str, Any]], Answer]) -> Response:
        self._bridge.served()
        body = await self._bodies.read(http)
        answer = await _aside(body, lambda: prepare(reading.decode(body)))
        return await respond(http, self._bridge, answer, self._seconds)

    def _text(self, form: type[Form], answer: Callable[[ServedModel, Form], dict[str, Any]]) -> Handler:
        """A handler of what needs no step."""

        async def handle(http: Request) -> Response:
            served = self._bridge.served()
            body = await self._bodies.read(http)
            return json_response(await _aside(body, lambda: answer(served, reading.convert(reading.decode(body), form, {}))))

        return handle

    async def _flush_cache(self, http: Request) -> Response:
        body = await self._bodies.read(http, optional=True)
        reading.convert(reading.decode(body) if body else {}, FlushRequest, {})
        await self._bridge.flush_cache()
        return json_response({"flushed": True})

    async def _abort_request(self, http: Request) -> Response:
        request = reading.convert(reading.decode(await self._bodies.read(http)), AbortRequest, {})
        if bool(request.abort_all) == (request.rid is not None):
            raise ApiError(400, "give rid, or abort_all true, and not both", param="rid")
        return json_response({"aborted": self._bridge.abort_named(request.rid)})


def _card(model: ServedModel) -> dict[str, Any]:
    return {
        "id": model.info.name,
        "object": "model",
        "created": model.loaded,
        "owned_by": "pointsman",
        "max_model_len": model.info.context_length,
    }


async def _aside(body: bytes, work: Callable[[], Any]) -> Any:
    """Do what takes time in proportion to the body: for a long one in a thread, so that other streams go on."""
    return await asyncio.to_thread(work) if len(body) > LONG_BODY_BYTES else work()


class Ending:
    """Around the whole application: a client that does not read is cut off when the server ends, and that is no fault to log."""

    def __init__(self, app: ASGIApp, bridge: Backend) -> None:
        self._app = app
        self._bridge = bridge

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await self._app(scope, receive, send)
        except asyncio.CancelledError:
            if self._bridge.reason is None:
                raise


async def _api_error(http: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error_response(error)


async def _http_error(http: Request, error: Exception) -> Response:
    """What the framework itself refuses: an unknown route, a method that a route does not have."""
    assert isinstance(error, HTTPException)
    text = f"{http.method} {http.url.path[:200]}: {error.detail}"
    return error_response(ApiError(error.status_code, text, headers=dict(error.headers or {})))


async def _client_gone(http: Request, error: Exception) -> Response:
    return Response(status_code=CLIENT_GONE)


async def _fault(http: Request, error: Exception) -> Response:
    """A fault of ours. The traceback goes to the log, and nothing of it to the client."""
    return error_response(ApiError(500, "internal error"))
