"""The playground at `/`: one page, put together from the files of the folder beside this module.

Styles and scripts are written into the page when it is loaded, so that there is one answer, nothing to build and nothing to fetch
from anywhere. The content security policy names the two by their hashes: whatever else a text of a model might smuggle into the page
does not run, and the page talks to this server alone. The page holds nothing that needs a key; what it asks the server for does.
"""

from __future__ import annotations

import base64
import hashlib
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).parent / "playground"
SCRIPTS = ("api.js", "record.js", "heat.js", "answer.js", "routing.js", "chat.js", "main.js")


@dataclass(frozen=True)
class Page:
    """The page as it is sent."""

    body: bytes
    headers: dict[str, str]

    @classmethod
    def load(cls) -> Page:
        style = _read("style.css")
        script = "\n".join(map(_read, SCRIPTS))
        html = _read("page.html").replace("/*style.css*/", style).replace("/*scripts*/", script)
        policy = {
            "default-src": "'none'",
            "script-src": _hash(script),
            "style-src": _hash(style),
            "connect-src": "'self'",
            "img-src": "data:",
            "base-uri": "'none'",
            "form-action": "'none'",
            "frame-ancestors": "'none'",
        }
        headers = {
            "content-type": "text/html; charset=utf-8",
            "content-security-policy": "; ".join(f"{name} {value}" for name, value in policy.items()),
            "x-content-type-options": "nosniff",
            "referrer-policy": "no-referrer",
            "cache-control": "no-cache",
        }
        return cls(html.encode(), headers)


def _read(name: str) -> str:
    return (FOLDER / name).read_text("utf-8")


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
