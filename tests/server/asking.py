"""What tests ask a server, and how they read what it answers."""

from __future__ import annotations

import json
from typing import Any

import httpx

HELLO = [{"role": "user", "content": "hello"}]


def chat(client: httpx.Client, **fields: Any) -> httpx.Response:
    return client.post("/v1/chat/completions", json={"messages": HELLO, **fields})


def say(client: httpx.Client, text: str, **fields: Any) -> httpx.Response:
    """Have the fake engine answer a conversation with this text."""
    return chat(client, messages=[{"role": "user", "content": f"SAY {text}"}], **fields)


def complete(client: httpx.Client, **fields: Any) -> httpx.Response:
    return client.post("/v1/completions", json={"prompt": "hello", **fields})


def generate(client: httpx.Client, **fields: Any) -> httpx.Response:
    return client.post("/generate", json=fields)


def events(response: httpx.Response) -> list[dict[str, Any]]:
    """The events of a stream that ended as it should."""
    assert response.headers["content-type"].startswith("text/event-stream"), response.text
    lines = response.text.split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""], lines[-3:]
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]


def fault(response: httpx.Response, status: int) -> dict[str, Any]:
    """The error of an answer, in OpenAI's shape."""
    assert response.status_code == status, response.text
    error: dict[str, Any] = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert "secret" not in response.text
    return error
