"""Who may ask what."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import httpx
import pytest

from pointsman.config import ServerConfig
from pointsman.server.access import Access, is_loopback
from tests.server.asking import chat, fault
from tests.server.conftest import start_server
from tests.server.fake_engine import REPLY

KEY = {"api_key": "sesam"}
BOTH = {"api_key": "sesam", "admin_api_key": "open"}


async def _yes(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b""})


def ask(
    options: dict[str, Any], path: str, *, method: str = "POST", host: str = "localhost:30000", client: str = "127.0.0.1", **headers: str
) -> int:
    """The status that a request gets."""
    access = Access(_yes, ServerConfig(**options), {"/flush_cache"})
    transport = httpx.ASGITransport(access, client=(client, 1234))

    async def run() -> httpx.Response:
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as asking:
            return await asking.request(method, path, headers={"host": host, **headers})

    return asyncio.run(run()).status_code


@pytest.mark.parametrize(
    ("options", "key", "routes"),
    [
        ({}, None, {"/health": 200, "/x": 200, "/flush_cache": 200}),
        (KEY, None, {"/health": 200, "/ready": 200, "/x": 401, "/": 200, "/health/": 401, "/flush_cache": 401}),
        (KEY, "sesam", {"/x": 200, "/flush_cache": 200}),
        (KEY, "sesa", {"/x": 401, "/flush_cache": 401}),
        (KEY, "sesamm", {"/x": 401}),
        (KEY, "", {"/x": 401}),
        (BOTH, "sesam", {"/x": 200, "/flush_cache": 401}),
        (BOTH, "open", {"/x": 200, "/flush_cache": 200}),
        ({"admin_api_key": "open"}, None, {"/x": 200, "/flush_cache": 401}),
        ({"admin_api_key": "open"}, "open", {"/flush_cache": 200}),
    ],
)
def test_keys(options: dict[str, Any], key: str | None, routes: dict[str, int]) -> None:
    headers = {} if key is None else {"authorization": f"Bearer {key}"}
    assert {path: ask(options, path, **headers) for path in routes} == routes


@pytest.mark.parametrize("header", ["sesam", "Bearer", "Basic sesam", "Bearer sesam x", "Bearer: sesam"])
def test_keys_in_another_form(header: str) -> None:
    assert ask(KEY, "/x", authorization=header) == 401


def test_without_any_key_admin_routes_are_for_this_machine() -> None:
    everywhere = {"host": "0.0.0.0"}
    assert ask(everywhere, "/flush_cache", client="::ffff:127.0.0.1") == 200
    assert ask(everywhere, "/flush_cache", client="10.0.0.7") == 403
    assert ask(everywhere, "/x", client="10.0.0.7") == 200
    assert ask({"host": "0.0.0.0", **KEY}, "/flush_cache", client="10.0.0.7", authorization="Bearer sesam") == 200


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200),
        ("LOCALHOST.:80", 200),
        ("my.localhost:30000", 200),
        ("127.0.0.1:30000", 200),
        ("127.3.2.1", 200),
        ("[::1]:30000", 200),
        ("evil.example:30000", 403),
        ("localhost.evil.example", 403),
        ("10.0.0.7", 403),
        ("127.0.0.1.evil.example", 403),
        ("0.0.0.0:30000", 403),
    ],
)
def test_names_of_the_server(host: str, status: int) -> None:
    """Only a server without a key on this machine alone is asked by names that a page in a browser could have."""
    assert ask({}, "/x", host=host) == status
    assert ask({}, "/health", host=host) == status
    assert ask({"host": "0.0.0.0"}, "/x", host=host) == 200
    assert ask(KEY, "/health", host=host) == 200


@pytest.mark.parametrize(
    ("origin", "options", "status"),
    [
        ("http://localhost:30000", {}, 200),
        ("https://localhost:30000", {}, 200),
        ("http://localhost:3000", {}, 403),
        ("https://evil.example", {}, 403),
        ("null", {}, 403),
        ("https://good.example", {"cors_origin": ("https://good.example",)}, 200),
        ("https://evil.example", {"cors_origin": ("https://good.example",)}, 403),
        ("https://any.example", {"cors_origin": ("*",)}, 200),
    ],
)
def test_pages_of_other_origins(origin: str, options: dict[str, Any], status: int) -> None:
    assert ask(options, "/x", origin=origin) == status
    assert ask(options, "/x", origin=origin, method="GET") == 200


def test_loopback() -> None:
    assert all(map(is_loopback, ("localhost", "127.0.0.1", "::1", "::ffff:127.0.0.1")))
    assert not any(map(is_loopback, ("", "0.0.0.0", "::", "example.org", "10.0.0.1")))


def test_an_empty_key_is_no_key() -> None:
    for name in ("api_key", "admin_api_key"):
        with pytest.raises(ValueError, match=f"--{name.replace('_', '-')} is empty"):
            ServerConfig(**{name: ""})


def test_a_server_with_keys(folder: Path) -> None:
    options = {"api_key": "sesam", "admin_api_key": "open", "reasoning_parser": "none", "cors_origin": ("https://good.example",)}
    with start_server({"model_path": str(folder)}, options) as server:
        server.wait_ready()
        with server.client() as client:
            routes = client.get("/openapi.json", headers={"authorization": "Bearer sesam"}).json()["paths"]
            for path, operations in routes.items():
                for method in operations:
                    expected = 200 if path in ("/health", "/ready", "/") else 401
                    assert client.request(method, path).status_code == expected, path
            for path in ("/nothing", "/docs", "/v1/models/"):
                assert fault(client.get(path), 401)["code"] == "invalid_api_key"
            answer = client.get("/v1/models", headers={"authorization": "Bearer é".encode()})
            assert fault(answer, 401) and answer.headers["www-authenticate"] == "Bearer"
            client.headers["authorization"] = "Bearer sesam"
            assert client.get("/v1/models").status_code == 200
            assert not {"sesam", "open"} & set(client.get("/server_info").text.split('"'))
            assert chat(client).json()["choices"][0]["message"] == {"role": "assistant", "content": REPLY}
            assert fault(client.post("/flush_cache"), 401)
            assert client.post("/flush_cache", headers={"authorization": "Bearer open"}).json() == {"flushed": True}
            _check_cors(client)


def _check_cors(client: httpx.Client) -> None:
    asked = {"access-control-request-method": "POST", "access-control-request-headers": "authorization,content-type"}
    good, evil = ({"origin": f"https://{name}.example"} for name in ("good", "evil"))
    del client.headers["authorization"]
    preflight = client.options("/v1/chat/completions", headers=good | asked)
    assert preflight.status_code == 200 and preflight.headers["access-control-allow-origin"] == "https://good.example"
    assert client.options("/v1/chat/completions", headers=evil | asked).status_code == 400
    client.headers["authorization"] = "Bearer sesam"
    assert chat(client, messages=[]).headers.get("access-control-allow-origin") is None
    answer = client.post("/v1/completions", json={"prompt": "x"}, headers=good)
    assert answer.status_code == 200 and answer.headers["access-control-allow-origin"] == "https://good.example"
    assert fault(client.post("/v1/completions", json={"prompt": "x"}, headers=evil), 403)["code"] == "origin_not_allowed"


def test_cors_is_off_unless_asked_for(client: httpx.Client) -> None:
    answer = client.get("/v1/models", headers={"origin": "https://good.example"})
    assert answer.status_code == 200 and "access-control-allow-origin" not in answer.headers
