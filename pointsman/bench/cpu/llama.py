"""llama.cpp to be compared with: the one door to `xllamacpp`, a wheel of it with its server."""

from __future__ import annotations

import contextlib
import http.client
import json
from typing import Any
from urllib.parse import urlsplit

SECONDS = 600.0


class LlamaServer:
    """llama.cpp's server in this process.

    Args:
        gguf: the model's file.
        slots: sequences at once.
        room: tokens of a sequence.

    Raises:
        ValueError: xllamacpp is not installed.
    """

    def __init__(self, gguf: str, slots: int, room: int, threads: int) -> None:
        try:
            import xllamacpp  # noqa: PLC0415 - of this benchmark only
        except ImportError as error:
            raise ValueError(f"llama.cpp is run through xllamacpp, which is not installed ({error}): pip install xllamacpp") from None
        params = xllamacpp.CommonParams()
        params.model.path = gguf
        params.n_parallel, params.n_ctx = slots, slots * room
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
        params.fit_params, params.cache_ram_mib, params.port, params.verbosity = False, 0, 0, 0
        self._server = xllamacpp.Server(params)
        self.address: str = self._server.listening_address

    def complete(self, body: dict[str, Any]) -> Any:
        """An answer in the form of OpenAI's completions, with llama.cpp's own timings; nothing is taken from its cache."""
        return self._server.handle_completions(body | {"cache_prompt": False})

    def native(self, body: dict[str, Any]) -> Any:
        """An answer of its native API, which has token ids."""
        place = urlsplit(self.address)
        content = json.dumps(body | {"cache_prompt": False, "return_tokens": True})
        with contextlib.closing(http.client.HTTPConnection(place.hostname or "", place.port, timeout=SECONDS)) as connection:
            connection.request("POST", "/completion", content, {"Content-Type": "application/json"})
            return json.load(connection.getresponse())
