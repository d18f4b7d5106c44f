"""The OpenAPI document: made of the table of routes, and of the classes that bodies are read into, so that it cannot say anything else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

import pointsman
from pointsman.server import native, operations, reading
from pointsman.server.answer_schemas import ANSWERS
from pointsman.server.bounds import MAX_BODY_BYTES, MAX_INTEGER
from pointsman.server.native import GenerateRequest
from pointsman.server.protocol import ChatRequest, CompletionRequest
from pointsman.server.tools import Tool

REF = "#/components/schemas/{name}"
NO_EFFECT: dict[type[msgspec.Struct], Mapping[str, tuple[Any, ...]]] = {
    ChatRequest: reading.NO_EFFECT,
    CompletionRequest: reading.NO_EFFECT,
    GenerateRequest: native.NO_EFFECT,
    **operations.NO_EFFECT,
}
ERRORS = {
    400: "the request cannot be understood, or not be run here; the message says why",
    401: "a key is needed",
    403: "not from this address, host or origin",
    404: "there is no such model",
    409: "not now, for what else the engine is doing",
    408: "the body took too long to come",
    413: f"the body is longer than {MAX_BODY_BYTES} bytes",
    415: "the body is not said to be JSON",
    429: "too much to do; try again later",
    500: "a fault of the server",
    503: "the model is still loading, or the server is ending",
    504: "the answer took too long",
}
WITHOUT_BODY = (400, 401, 403, 404, 500, 503)


@dataclass(frozen=True, kw_only=False)
class Route:
    """A row of the table.

    Attributes:
        form: what the body is read into; None where there is no body, and then it is a GET.
        answer: the name of the schema of a whole answer; None where it has no body.
        streams: the name of the schema of a stream's event, where it can stream.
        admin: only for those who run the server.
        optional: the body may be left out.
        head: HEAD is answered too.
        binary: the body may be bytes instead, with the fields in the query.
        media: the type of an answer that is text and not JSON.
    """

    path: str
    summary: str
    form: type[msgspec.Struct] | None
    answer: str | None
    streams: str | None = None
    admin: bool = False
    optional: bool = False
    head: bool = False
    media: str | None = None
    binary: bool = False

    @property
    def methods(self) -> tuple[str, ...]:
        if self.form is not None:
            return ("POST",)
        return ("GET", "HEAD") if self.head else ("GET",)


def document(routes: Sequence[Route]) -> dict[str, Any]:
    """The document, as JSON has it."""
    return {
        "openapi": "3.1.0",
        "info": {"title": "Pointsman", "version": pointsman.__version__, "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"}},
        "paths": {route.path.replace(":path}", "}"): _methods(route) for route in routes},
        "components": {
            "schemas": _forms(routes) | ANSWERS,
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}, "admin_key": {"type": "http", "scheme": "bearer"}},
        },
    }


def _methods(route: Route) -> dict[str, Any]:
    statuses = ERRORS if route.form is not None else WITHOUT_BODY
    operation: dict[str, Any] = {
        "summary": route.summary,
        "operationId": "_".join(part.split(":")[0].strip("{}") for part in route.path.strip("/").replace(".", "_").split("/")),
        "security": [{}, {"admin_key": []}] if route.admin else [{}, {"key": []}],
        "responses": {"200": _success(route)} | {str(status): _error(ERRORS[status]) for status in statuses},
    }
    if "{" in route.path:
        name = {"name": "name", "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
        operation["parameters"] = [name]
    if route.form is not None:
        schema = {"$ref": REF.format(name=route.form.__name__)}
        content: dict[str, Any] = {"application/json": {"schema": schema}}
        if route.binary:
            content["application/octet-stream"] = {}
        operation["requestBody"] = {"required": not route.optional, "content": content}
    return {
        method.lower(): operation | ({"operationId": f"{operation['operationId']}_head"} if method == "HEAD" else {})
        for method in route.methods
    }


def _success(route: Route) -> dict[str, Any]:
    if route.media is not None:
        return {"description": "the answer", "content": {route.media: {"schema": {"type": "string"}}}}
    if route.answer is None:
        return {"description": "yes"}
    content: dict[str, Any] = {"application/json": {"schema": {"$ref": REF.format(name=route.answer)}}}
    if route.streams is not None:
        chunk = {"anyOf": [{"$ref": REF.format(name=name)} for name in (route.streams, "Error")]}
        text = "a chunk or, as the last one, an error"
        data = {"type": "string", "contentMediaType": "application/json", "contentSchema": chunk, "description": text}
        event = {"anyOf": [data, {"const": "[DONE]", "description": "after the last chunk"}]}
        content["text/event-stream"] = {"schema": {"type": "object", "required": ["data"], "properties": {"data": event}}}
    return {"description": "the answer", "content": content}


def _error(description: str) -> dict[str, Any]:
    return {"description": description, "content": {"application/json": {"schema": {"$ref": REF.format(name="Error")}}}}


def _forms(routes: Sequence[Route]) -> dict[str, Any]:
    """The schemas of all bodies, those that are accepted without effect included."""
    forms = [route.form for route in routes if route.form is not None]
    _, schemas = msgspec.json.schema_components([*forms, Tool], ref_template=REF)
    for form in forms:
        properties = schemas[form.__name__].setdefault("properties", {})
        for name, values in NO_EFFECT.get(form, {}).items():
            if name not in properties:
                properties[name] = {"enum": list(values), "description": "not supported; these values change nothing"}
    tokens = {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": MAX_INTEGER}}
    return schemas | {"Tokens": tokens, "PromptTokens": tokens | {"minItems": 1}}
