"""Servers as processes of their own, with the engine that `fake_engine` is."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from pointsman.engine.processes import command
from tests.exchange import folders, greedy

__all__ = ["folders", "greedy"]

ROOT = Path(__file__).parents[2]
FAKE = "from tests.server.fake_engine import run; sys.exit(run())"
TEMPLATE = """\
{% if boom %}{{ raise_exception('no such luck') }}{% endif %}
{% if tools %}{{ tools | tojson }}{% endif %}
{% for message in messages %}]~b]{{ 'ai' if message.role == 'assistant' else message.role }}
{% if message.role == 'assistant' and message.reasoning_content %}<think>{{ message.reasoning_content }}</think>{% endif %}
{% for call in message.tool_calls or [] %}{{ call.function.name }}{{ call.function.arguments.items() | list }}{% endfor %}
{{ message.content }}[e~[
{% endfor %}{{ extra | default('') }}{% if add_generation_prompt %}]~b]ai
<think>
{% endif %}"""


class Server:
    """A running `pointsman serve`."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.url = ""
        self.output = ""

    def wait_ready(self) -> str:
        """Read the line that says so."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, self.process.communicate()[1]
        self.url = line.split(" at ")[1].split(" ")[0]
        return line

    def client(self, **options: Any) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=30, **options)

    def end(self, number: int = signal.SIGTERM) -> tuple[int, str]:
        """Send a signal; the exit code and what was written to standard error."""
        self.process.send_signal(number)
        return self.ended()

    def ended(self) -> tuple[int, str]:
        """Wait for the end of both processes: the engine's has the same standard error, which ends only with the last of them."""
        self.output, errors = self.process.communicate(timeout=30)
        return self.process.returncode, errors


@contextlib.contextmanager
def start_server(
    engine: dict[str, Any], server: dict[str, Any] | None = None, program: str | None = FAKE, prelude: str = ""
) -> Iterator[Server]:
    """Run `serve` with these flags, after some lines of Python; killed at the end if it still runs."""
    options = {"port": 0, "log_level": "warning", **(server or {})}
    last = "" if program is None else f", program={program!r}"
    source = prelude + (
        "from pointsman.config import ServerConfig, engine_config; from pointsman.server.serve import serve; "
        f"sys.exit(serve(engine_config(**{engine!r}), ServerConfig(**{options!r}){last}))"
    )
    path = [str(ROOT), *sys.path]
    process = subprocess.Popen(command(source, path), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    try:
        yield Server(process)
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        if process.stdout and not process.stdout.closed:
            process.communicate(timeout=30)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint's folder with everything but weights: each byte is a token, tags are one token each."""
    folder = tmp_path_factory.mktemp("checkpoint")
    vocabulary = {character: index for index, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["]~b]", "[e~["])
    backend.add_tokens([AddedToken("<think>", normalized=False), AddedToken("</think>", normalized=False)])
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "[e~["}))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


@pytest.fixture(scope="session")
def server(folder: Path) -> Iterator[Server]:
    """One server for all tests that leave it as it was."""
    with start_server({"model_path": str(folder), "served_model_name": "fake"}) as server:
        server.wait_ready()
        yield server


@pytest.fixture
def client(server: Server) -> Iterator[httpx.Client]:
    with server.client() as client:
        yield client
