"""OpenAI's API over small random checkpoints of each family, both processes and the real engine."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from pointsman.routed_experts import decode_record
from tests.models.families import build, save
from tests.server.asking import chat, complete, fault
from tests.server.conftest import start_server


@pytest.mark.parametrize("name", ["qwen, dense layers", "mixtral", "glm"])
def test_a_conversation_with_its_record(name: str, folder: Path, tmp_path: Path) -> None:
    model = save(build(name, vocab_size=300), tmp_path / "model")
    for file in folder.iterdir():
        if file.suffix != ".safetensors" and file.name != "config.json":
            shutil.copy(file, model)
    with start_server({"model_path": str(model), "cpu_step": "torch", "context_length": 400}, program=None) as server:
        server.wait_ready()
        with server.client() as client:
            ask = {"max_tokens": 8, "temperature": 0, "return_routed_experts": True, "ignore_eos": True}
            choice = chat(client, **ask).json()["choices"][0]
            assert choice["finish_reason"] == "length" and choice["message"]["content"]
            record = decode_record(choice["routed_experts"])
            layers = {"qwen, dense layers": (1, 3), "mixtral": (0, 1, 2), "glm": (1, 2)}[name]
            assert (record.layers, record.num_experts) == (layers, 8)
            again = chat(client, **ask, replay_routed_experts=choice["routed_experts"]).json()["choices"][0]
            assert again["routing_agreement"] == 1.0 and again["message"] == choice["message"]
            assert complete(client, max_tokens=4).json()["usage"]["completion_tokens"] > 0
            load = client.get("/routing_load").json()
            assert tuple(load["layers"]) == layers and len(load["counts"]) == len(layers)
            tools = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}]
            assert "--tool-call-parser" in fault(chat(client, tools=tools), 400)["message"]
