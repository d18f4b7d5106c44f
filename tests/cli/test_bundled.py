"""The commands on the bundled checkpoint, as a user would type them.

Those that wait for the compiled step come first: on a machine's first run the others would each start a compiler.
"""

import io
import json

import pytest

from pointsman import cli, tiny

pytestmark = pytest.mark.skipif(not (tiny.path() / "model.safetensors").is_file(), reason="the bundled checkpoint is not there")


@pytest.mark.parametrize("name", ["arithmetic", "tools"])
def test_eval_finds_a_model_that_has_learnt(name, capsys):
    """A far lower bar than the checkpoint's own figure, so that it fails for a broken engine and not for bad luck."""
    assert cli.main(["eval", name, "--num-questions", "40"]) == 0
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert summary["accuracy"] > 0.7
    assert summary["step"] == "compiled"


def test_generate_answers_a_question(capsys):
    assert cli.main(["generate", "What is 17 + 25?", "--temperature", "0"]) == 0
    thinking, answer = capsys.readouterr().out.split("\n\n")
    assert thinking
    assert "42" in answer


def test_generate_for_a_program(capsys):
    assert cli.main(["generate", "What is 17 + 25?", "--temperature", "0", "--json", "--logprobs", "0"]) == 0
    report = json.loads(capsys.readouterr().out)
    (choice,) = report["choices"]
    assert choice["text"].startswith(choice["reasoning"])
    assert "42" in choice["content"]
    assert choice["finish_reason"] == "stop"
    assert [step[0]["id"] for step in choice["logprobs"]] == choice["token_ids"]
    assert all(step[0]["rank"] == 1 for step in choice["logprobs"])
    assert report["usage"]["completion_tokens"] == len(choice["token_ids"])


def test_chat_follows_up(monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO("What is 17 + 25?\nAnd with 8 more?\n"))
    assert cli.main(["chat", "--temperature", "0", "--hide-thinking"]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert "42" in first
    assert "50" in second
