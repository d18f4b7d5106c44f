"""The page of `pointsman routes --html`: one file that can be mailed, opened without a network, pointed at and walked with the arrow keys.

The map, its colours and the light and the dark palette are those of the playground; the page's own script and style lie beside this
module. Its content security policy names both by their hashes and lets nothing else in.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
from pathlib import Path

from pointsman.cli.routes.load import Load, balances
from pointsman.server.playground import FOLDER

OWN = Path(__file__).parent


def page(load: Load, title: str, subtitle: str) -> str:
    """The page, whole."""
    data = {
        "layers": list(load.layers),
        "counts": load.counts_LE.tolist(),
        "numTokens": load.num_tokens,
        "balances": [[round(entry.max_over_mean, 4), round(entry.entropy, 4), round(entry.effective, 2)] for entry in balances(load)],
    }
    palette = (FOLDER / "style.css").read_text("utf-8").partition("\n* {")[0]
    style = palette + (OWN / "page.css").read_text("utf-8")
    text = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
    script = (FOLDER / "heat.js").read_text("utf-8") + f"\nconst LOAD = {text};\n" + (OWN / "page.js").read_text("utf-8")
    policy = f"default-src 'none'; script-src {_hash(script)}; style-src {_hash(style)}; base-uri 'none'; form-action 'none'"
    parts = {"POLICY": policy, "TITLE": html.escape(title), "SUBTITLE": html.escape(subtitle), "STYLE": style, "SCRIPT": script}
    whole = (OWN / "page.html").read_text("utf-8")
    for name, part in parts.items():
        whole = whole.replace(f"/*{name}*/", part)
    return whole


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
