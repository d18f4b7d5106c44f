"""Who may ask what: every route is closed unless it is named here.

    /health, /ready, /   anyone (the playground's page holds nothing; what it asks for needs the key)
    admin routes         the admin key; where there is none the API key; where there is neither, this machine alone
    all others           the API key, where there is one (the admin key opens them too)

Besides, against pages of other sites in a user's browser, which may post to this machine without asking:

* A request that a page of another origin makes is refused unless `--cors-origin` names that origin. Programs send no origin.
* A server on a loopback address without a key answers only to names of this machine: a page whose name its owner lets point to
  127.0.0.1 would otherwise be of the same origin as the server.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
from collections.abc import Collection
from urllib.parse import urlsplit

from starlette.types import ASGIApp, Receive, Scope, Send

from pointsman.config import ServerConfig
from pointsman.server.errors import ApiError
from pointsman.server.responses import error_response

OPEN_ROUTES = ("/health", "/ready")
PLAYGROUND = "/"


class Access:
    """Around the whole application: lets a request through or answers why not."""

    def __init__(self, app: ASGIApp, server: ServerConfig, admin_routes: Collection[str]) -> None:
        self._app = app
        self._admin_routes = admin_routes
        self._key = None if server.api_key is None else _digest(server.api_key.encode())
        self._admin_key = None if server.admin_api_key is None else _digest(server.admin_api_key.encode())
        self._origins = frozenset(server.cors_origin)
        self._host = server.host
        self._checks_host = server.api_key is None and is_loopback(server.host)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        error = self._refusal(scope) if scope["type"] == "http" else None
        if error is None:
            await self._app(scope, receive, send)
        else:
            await error_response(error)(scope, receive, send)

    def _refusal(self, scope: Scope) -> ApiError | None:
        headers = dict(scope["headers"])
        host = headers.get(b"host", b"").decode("latin-1")
        if self._checks_host and host and not self._is_ours(host):
            text = f"this server answers to localhost, not to {host[:200]!r}; start it with --api-key to give it other names"
            return ApiError(403, text, code="host_not_allowed")
        origin = headers.get(b"origin", b"").decode("latin-1")
        if origin and scope["method"] not in ("GET", "HEAD") and not self._allows(origin, host):
            text = f"requests from pages of {origin[:200]} are not allowed; --cors-origin allows them"
            return ApiError(403, text, code="origin_not_allowed")
        if scope["path"] in OPEN_ROUTES or scope["path"] == PLAYGROUND:
            return None
        given = _digest(_bearer(headers.get(b"authorization", b"")))
        if scope["path"] in self._admin_routes:
            return self._admin_refusal(given, scope)
        if self._key is None or _is(given, self._key) or _is(given, self._admin_key):
            return None
        return _wrong_key("a valid API key")

    def _admin_refusal(self, given: bytes, scope: Scope) -> ApiError | None:
        key = self._key if self._admin_key is None else self._admin_key
        if key is not None:
            return None if _is(given, key) else _wrong_key("a valid API key" if self._admin_key is None else "the admin API key")
        if is_loopback((scope.get("client") or ("",))[0]):
            return None
        return ApiError(403, "without --admin-api-key this is allowed only from the server's own machine", code="admin_key_needed")

    def _is_ours(self, host: str) -> bool:
        name = _host_name(host)
        return name == self._host or name == "localhost" or name.endswith(".localhost") or is_loopback(name)

    def _allows(self, origin: str, host: str) -> bool:
        return origin in self._origins or "*" in self._origins or urlsplit(origin).netloc.lower() == host.lower()


def is_loopback(name: str) -> bool:
    """Whether a host's name or address means this machine."""
    try:
        address = ipaddress.ip_address(name)
    except ValueError:
        return name == "localhost"
    mapped = getattr(address, "ipv4_mapped", None)
    return address.is_loopback if mapped is None else mapped.is_loopback


def _host_name(host: str) -> str:
    """The name in a Host header, without the port."""
    name = host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]
    return name.lower().rstrip(".")


def _bearer(header: bytes) -> bytes:
    scheme, _, token = header.partition(b" ")
    return token.strip() if scheme.lower() == b"bearer" else b""


def _digest(text: bytes) -> bytes:
    """Of equal length for all texts, so that comparing two takes the same time."""
    return hashlib.sha256(text).digest()


def _is(given: bytes, key: bytes | None) -> bool:
    return key is not None and hmac.compare_digest(given, key)


def _wrong_key(needed: str) -> ApiError:
    text = f"{needed} is needed: send it as 'Authorization: Bearer KEY'"
    return ApiError(401, text, code="invalid_api_key", headers={"www-authenticate": "Bearer"})
