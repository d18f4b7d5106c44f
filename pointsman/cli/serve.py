"""`pointsman serve`: hand the configuration to the server."""

from __future__ import annotations

from typing import Any

from pointsman.config import ServerConfig, engine_config
from pointsman.server.serve import serve


def run(engine: dict[str, Any], options: ServerConfig) -> int:
    """Serve until told to stop; the exit code is the server's."""
    return serve(engine_config(**engine), options)
