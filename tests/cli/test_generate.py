"""`pointsman generate` and `chat` with scripted answers: what a person sees, what a program reads, what the model is asked."""

import contextlib
import io
import json
import os
import pty
import signal
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pointsman import cli
from pointsman.cli.answer import AnswerPrinter, split
from pointsman.request import FinishReason

from .scripted import ScriptedLLM

THOUGHT = "3 + 4 = 7\n</think>\n\nThat is 7."


@pytest.fixture
def run(monkeypatch, capsys):
    """Run a command with a scripted model; returns code, standard output and standard error."""

    def run_with(llm, *words, stdin=""):
        monkeypatch.setattr("pointsman.cli.generate.LLM", llm)
        monkeypatch.setattr("pointsman.cli.chat.LLM", llm)
        monkeypatch.setattr("sys.stdin", io.StringIO(stdin))
        code = cli.main(words)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run_with


def test_a_person_gets_thinking_and_answer(run):
    llm = ScriptedLLM(THOUGHT)
    assert run(llm, "generate", "What is 3 + 4?") == (0, "3 + 4 = 7\n\nThat is 7.\n", "")
    assert llm.prompts[0].endswith("]~b]user\nWhat is 3 + 4?[e~[\n]~b]ai\n<think>\n")
    assert llm.closed


def test_hidden_thinking(run):
    assert run(ScriptedLLM(THOUGHT), "generate", "x", "--hide-thinking") == (0, "That is 7.\n", "")


def test_thinking_without_an_answer(run):
    llm = ScriptedLLM("3 + 4", finish=FinishReason.LENGTH)
    assert run(llm, "generate", "x", "--max-tokens", "3") == (0, "3 + 4\n", "pointsman generate: cut off at the token limit\n")
    assert llm.params[0].max_tokens == 3


def test_raw_is_the_text_and_nothing_else(run):
    llm = ScriptedLLM(" </think> c")
    assert run(llm, "generate", "a b", "--raw") == (0, " </think> c\n", "")
    assert llm.prompts == ["a b"]


def test_the_prompt_from_standard_input(run):
    llm = ScriptedLLM(THOUGHT)
    assert run(llm, "generate", "-", stdin="What is\n3 + 4?\n")[0] == 0
    assert "]~b]user\nWhat is\n3 + 4?\n[e~[" in llm.prompts[0]
    assert run(llm, "generate", "-", stdin="\n") == (1, "", "pointsman generate: the prompt is empty\n")


def test_a_system_message(run):
    llm = ScriptedLLM(THOUGHT)
    run(llm, "generate", "x", "--system", "Be brief.")
    assert llm.prompts[0].startswith("]~!b[]~b]system\nBe brief.[e~[\n")


def test_json(run):
    llm = ScriptedLLM(THOUGHT, "and so on", finish=FinishReason.LENGTH)
    code, out, err = run(llm, "generate", "x", "--json", "--n", "2")
    answer = json.loads(out)
    assert (code, err, out.count("\n")) == (0, "", 1)
    first, second = answer["choices"]
    assert first["text"] == THOUGHT
    assert (first["reasoning"], first["content"]) == ("3 + 4 = 7", "That is 7.")
    assert (second["reasoning"], second["content"], second["finish_reason"]) == ("and so on", "", "length")
    assert first["token_ids"] == [ord(character) for character in THOUGHT]
    usage = {"prompt_tokens": len(answer["prompt_token_ids"]), "completion_tokens": len(THOUGHT) + 9, "cached_tokens": 0}
    assert answer["usage"] == usage
    assert answer["model"] == "scripted"


def test_several_answers(run):
    out = run(ScriptedLLM(THOUGHT, THOUGHT), "generate", "x", "--n", "2")[1]
    assert out == "[0]\n3 + 4 = 7\n\nThat is 7.\n[1]\n3 + 4 = 7\n\nThat is 7.\n"


def test_sampling_is_the_checkpoints_unless_given(run):
    llm = ScriptedLLM(THOUGHT, THOUGHT)
    run(llm, "generate", "x")
    run(llm, "generate", "x", "--temperature", "0", "--top-p", "0.5", "--stop", "a", "--stop", "b", "--seed", "7", "--ignore-eos")
    first, second = llm.params
    assert (first.temperature, first.top_k, first.top_p, first.max_tokens) == (0.6, 20, 1.0, None)
    assert (second.temperature, second.top_k, second.top_p) == (0.0, 20, 0.5)
    assert (second.stop, second.seed, second.ignore_eos) == (("a", "b"), 7, True)


def test_without_a_template_nothing_is_guessed(run):
    code, _, err = run(ScriptedLLM(template=False), "generate", "x")
    assert (code, err) == (1, "pointsman generate: scripted has no chat template; --raw continues the text as it is\n")
    assert run(ScriptedLLM(template=False), "chat")[0] == 1
    assert run(ScriptedLLM(" y", template=False), "generate", "x", "--raw")[:2] == (0, " y\n")


def test_an_answer_that_the_engine_gave_up_on(run):
    llm = ScriptedLLM("3", finish=FinishReason.ERROR, error="logits are not finite")
    assert run(llm, "generate", "x") == (1, "3\n", "pointsman generate: the engine gave up: logits are not finite\n")
    llm = ScriptedLLM("3", finish=FinishReason.ERROR, error="logits are not finite")
    assert run(llm, "generate", "x", "--json") == (1, "", "pointsman generate: request 0 failed: logits are not finite\n")
    llm = ScriptedLLM("3", finish=FinishReason.ERROR, error="logits are not finite")
    assert run(llm, "chat", stdin="x\n") == (1, "3\n", "pointsman chat: the engine gave up: logits are not finite\n")


def test_chat_remembers_resets_and_takes_a_system_message(run):
    llm = ScriptedLLM(*[THOUGHT] * 4)
    lines = "one\n\ntwo\n/reset\nthree\n/system Be brief.\nfour\n/exit\nfive\n"
    code, out, err = run(llm, "chat", "--hide-thinking", stdin=lines)
    assert (code, out, err) == (0, "That is 7.\n" * 4, "")
    first, second, third, fourth = llm.prompts
    assert "one" in first
    assert "]~b]user\none[e~[\n]~b]ai\nThat is 7.[e~[\n]~b]user\ntwo[e~[" in second
    assert "one" not in third
    assert fourth.startswith("]~!b[]~b]system\nBe brief.[e~[\n]~b]user\nfour[e~[")


def test_chat_commands(run):
    code, out, err = run(ScriptedLLM(), "chat", stdin="/help\n/rest\n")
    assert all(name in out for name in ("/help", "/reset", "/system", "/exit"))
    assert (code, err) == (1, "pointsman chat: unknown command '/rest'; did you mean '/reset'?\n")


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_on_a_terminal_thinking_is_dim_and_control_characters_are_gone(monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    terminal = Terminal()
    printer = AnswerPrinter(opened=True, hide_thinking=False, stream=terminal)
    for character in "hm\x1b]0;title\x07\n</think>[bold]7[/bold] :smile: \x1b[2J\x9b1A\n\tdone":
        printer.feed(character)
    printer.finish()
    shown = terminal.getvalue()
    assert "\x1b[2mh\x1b[0m\x1b[2mm\x1b[0m" in shown
    assert shown.replace("\x1b[2m", "").replace("\x1b[0m", "") == "hm]0;title\n\n[bold]7[/bold] :smile: [2J1A\n\tdone\n"


@settings(deadline=None, max_examples=100)
@given(
    st.lists(st.sampled_from(["a", "\n", "</think>", "<think>", "</thi", " b", "ü"]), max_size=12), st.booleans(), st.booleans(), st.data()
)
def test_what_is_printed_does_not_depend_on_how_the_text_came(pieces, opened, hide_thinking, data):
    text = "".join(pieces)
    whole = split(text, opened=opened)
    shown = []
    for cuts in ([], sorted(data.draw(st.lists(st.integers(0, len(text)))))):
        stream = io.StringIO()
        printer = AnswerPrinter(opened=opened, hide_thinking=hide_thinking, stream=stream)
        for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True):
            printer.feed(text[start:end])
        printer.finish()
        assert (printer.reasoning, printer.content) == (whole.reasoning, whole.content)
        shown.append(stream.getvalue())
    assert shown[0] == shown[1]
    assert shown[0].endswith("\n")


# A fast step ends its answer before anybody can interrupt it.
SLOWLY = ("--load-format", "dummy", "--ignore-eos", "--cpu-step", "torch")


# Where the tests run in the background of a shell, Ctrl-C is ignored, and processes inherit that.
PROGRAM = """
import signal, sys
from pointsman.cli import main
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.exit(main())
"""


def started(*words):
    command = [sys.executable, "-c", PROGRAM, *words, *SLOWLY]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def test_ctrl_c_is_quiet():
    process = started("generate", "hello", "--raw")
    assert process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    assert process.communicate()[1] == b""
    assert process.returncode == cli.INTERRUPTED


class Person:
    """Somebody at a terminal."""

    def __init__(self, descriptor):
        self.descriptor = descriptor
        self.unread = b""

    def type(self, text):
        os.write(self.descriptor, text)

    def read_until(self, text):
        """What is shown up to and with this text; the rest stays for the next time."""
        while text not in self.unread:
            self.unread += os.read(self.descriptor, 4096)
        before, _, self.unread = self.unread.partition(text)
        return before


def ctrl_d(person, process):
    person.type(b"\x04")
    assert process.wait() == 0


def ctrl_c(person, process):
    """Readline misses a signal that comes just before it waits for a key, so it must be seen to wait, and asked again if it was not."""
    person.type(b"x")
    person.read_until(b"x")
    while process.poll() is None:
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(20)
    assert process.returncode == cli.INTERRUPTED


@pytest.mark.parametrize("leave", [ctrl_d, ctrl_c])
def test_ctrl_c_ends_an_answer_and_the_conversation_goes_on(leave):
    outer, inner = pty.openpty()
    command = [sys.executable, "-c", PROGRAM, "chat", *SLOWLY]
    with subprocess.Popen(command, stdin=inner, stdout=inner, stderr=inner, env=os.environ | {"TERM": "xterm"}) as process:
        os.close(inner)
        person = Person(outer)
        person.read_until(b"> ")
        person.type(b"hello\n")
        person.read_until(b"\x1b[2m")
        process.send_signal(signal.SIGINT)
        assert b"Traceback" not in person.read_until(b"(broken off, and forgotten)")
        person.read_until(b"> ")
        person.type(b"/rest\n")
        person.read_until(b"did you mean '/reset'?")
        person.read_until(b"> ")
        leave(person, process)
    os.close(outer)
