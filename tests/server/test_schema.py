"""The OpenAPI document says what the server does.

Requests are made from it, those that keep to it and those that do not. None is a fault, every answer is one that the document
describes, and what does not keep to it is refused.
"""

from __future__ import annotations

from typing import Any

import httpx
import jsonschema_rs
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_schema_conformance,
    status_code_conformance,
)

from tests.server.asking import HELLO, events
from tests.server.conftest import Server
from tests.server.fake_engine import VOCABULARY
from tests.server.test_chat import CALLS, TOOLS

CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance, negative_data_rejection]
ROUTES = [
    "/abort_request",
    "/detokenize",
    "/flush_cache",
    "/generate",
    "/parse_function_call",
    "/separate_reasoning",
    "/tokenize",
    "/v1/chat/completions",
    "/v1/completions",
]
OPTIONAL = [
    "/flush_cache",
    "/pause_generation",
    "/continue_generation",
    "/release_memory_occupation",
    "/resume_memory_occupation",
]
BOUNDED = settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))


def load(server: Server, document: dict[str, Any]) -> Any:
    api = schemathesis.openapi.from_dict(document)
    api.config.update(base_url=server.url)
    return api


@pytest.fixture(scope="module")
def document(server: Server) -> dict[str, Any]:
    with server.client() as client:
        document: dict[str, Any] = client.get("/openapi.json").json()
    return document


@pytest.fixture(scope="module")
def api(server: Server, document: dict[str, Any]) -> Any:
    return load(server, document)


@pytest.fixture(scope="module")
def likely(server: Server, document: dict[str, Any]) -> Any:
    """The same, narrowed to this server's model and vocabulary, so that more requests are answered."""
    schemas = document["components"]["schemas"]
    narrowed = {name: dict(schema) for name, schema in schemas.items()}
    narrowed["PromptTokens"]["items"] = {"type": "integer", "minimum": 0, "maximum": VOCABULARY - 1}
    for name, schema in narrowed.items():
        if "model" in schema.get("properties", {}) and name.endswith("Request"):
            schema["properties"] = schema["properties"] | {"model": {"const": "fake"}}
    return load(server, document | {"components": document["components"] | {"schemas": narrowed}})


@pytest.mark.parametrize("path", ROUTES)
@BOUNDED
@given(data=st.data())
def test_requests_that_keep_to_the_document(likely: Any, path: str, data: st.DataObject) -> None:
    case = data.draw(likely[path]["POST"].as_strategy())
    case.validate_response(case.call(timeout=30), checks=CHECKS)


@pytest.mark.parametrize("path", ROUTES)
@BOUNDED
@given(data=st.data())
def test_requests_that_do_not(api: Any, path: str, data: st.DataObject) -> None:
    case = data.draw(api[path]["POST"].as_strategy(generation_mode=GenerationMode.NEGATIVE))
    case.validate_response(case.call(timeout=30), checks=CHECKS)


@settings(BOUNDED, max_examples=10)
@given(data=st.data())
def test_other_models(api: Any, data: st.DataObject) -> None:
    case = data.draw(api["/v1/models/{name}"]["GET"].as_strategy())
    case.validate_response(case.call(timeout=30), checks=CHECKS)


def test_routes_without_a_body(api: Any, document: dict[str, Any], server: Server) -> None:
    with server.client() as client:
        for path, operations in document["paths"].items():
            for method in operations:
                response = client.request(method, path.replace("{name}", "fake"))
                assert response.status_code == (200 if method in ("get", "head") or path in OPTIONAL else 415), path
                if method == "get":
                    api[path]["GET"].validate_response(response)


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": f"SAY {CALLS}"}], "tools": TOOLS, "return_token_ids": True}),
        ("/v1/chat/completions", {"messages": HELLO, "logprobs": True, "top_logprobs": 2, "stream_options": {"include_usage": True}}),
        ("/v1/completions", {"prompt": "x", "logprobs": 1, "echo": True, "return_token_ids": True}),
        ("/generate", {"text": ["x", "ENDLESS"], "return_logprob": True, "top_logprobs_num": 1, "logprob_start_len": 0}),
    ],
)
def test_streams(client: httpx.Client, document: dict[str, Any], path: str, fields: dict[str, Any]) -> None:
    content = document["paths"][path]["post"]["responses"]["200"]["content"]["text/event-stream"]
    described = content["schema"]["properties"]["data"]["anyOf"][0]["contentSchema"]
    validator = jsonschema_rs.validator_for(described | {"components": document["components"]})
    chunks = events(client.post(path, json={**fields, "stream": True}))
    assert chunks and all(validator.validate(chunk) is None for chunk in chunks)
