"""`pointsman chat`: a conversation in the terminal.

On a terminal it prompts, keeps a history of lines and takes Ctrl-C during an answer as "enough": the answer ends between two
steps, so that the engine is never torn out of one. With standard input from a file or a pipe every line is a message, nothing
decorates the answers, and the first fault ends it.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import signal
import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

from pointsman.cli.answer import AnswerPrinter, render
from pointsman.cli.options import ChatOptions
from pointsman.config import nearest
from pointsman.engine.llm import LLM
from pointsman.request import FinishReason, RequestFailed

COMMANDS = {
    "/help": "what can be typed",
    "/reset": "forget the conversation",
    "/system": "set the system message, or with no text go back to the checkpoint's; forgets the conversation",
    "/exit": "leave (so does Ctrl-D)",
}


class Chat:
    """One conversation. `interactive`: a person types it."""

    def __init__(self, llm: LLM, options: ChatOptions, *, interactive: bool) -> None:
        self.messages: list[dict[str, Any]] = []
        self.system = options.system
        self._llm, self._options, self._interactive = llm, options, interactive
        self._params = options.sampling.params(llm.engine.generation_defaults)

    def take(self, line: str) -> bool:
        """Handle one line; False ends the conversation."""
        line = line.strip()
        command, _, rest = line.partition(" ")
        if not line:
            return True
        if not line.startswith("/"):
            self._answer(line)
        elif command == "/exit":
            return False
        elif command == "/help":
            print("\n".join(f"{name:9}{text}" for name, text in COMMANDS.items()))
        elif command in ("/reset", "/system"):
            self.messages = []
            if command == "/system":
                self.system = rest.strip() or None
        else:
            raise ValueError(f"unknown command {command!r}{nearest(command, COMMANDS) or '; there are ' + ', '.join(COMMANDS)}")
        return True

    def _answer(self, text: str) -> None:
        """Print the answer to a message and remember both; an answer that was broken off is not remembered."""
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        asked = [*self.messages, {"role": "user", "content": text}]
        tokens, opened = render(self._llm, [*system, *asked])
        printer = AnswerPrinter(opened=opened, hide_thinking=self._options.hide_thinking, stream=sys.stdout)
        reason, error = None, None
        with _enough(self._interactive) as enough, contextlib.closing(self._llm.stream(tokens, self._params)) as deltas:
            for delta in deltas:
                printer.feed(delta.text)
                reason, error = delta.finish_reason, delta.error
                if enough():
                    break
        printer.finish()
        if reason is None:
            print("(broken off, and forgotten)", file=sys.stderr)
            return
        if error is not None:
            raise RequestFailed(f"the engine gave up: {error}")
        if reason is FinishReason.LENGTH:
            print("pointsman chat: cut off at the token limit", file=sys.stderr)
        self.messages = [*asked, {"role": "assistant", "content": printer.content, "reasoning_content": printer.reasoning}]


def run(engine: dict[str, Any], options: ChatOptions) -> int:
    """Talk until standard input ends or `/exit`."""
    logging.basicConfig(level=options.log_level.upper())
    interactive = sys.stdin.isatty() and sys.stdout.isatty()
    with contextlib.closing(LLM(**engine)) as llm:
        if llm.engine.tokenizer is None or llm.engine.chat_template is None:
            raise ValueError(f"{llm.engine.model_name} has no chat template; `pointsman generate --raw` continues a text")
        chat = Chat(llm, options, interactive=interactive)
        if not interactive:
            for line in sys.stdin:
                if not chat.take(line):
                    break
            return 0
        print(f"{llm.engine.model_name}. /help lists what can be typed.")
        for line in _typed():
            if not _take_patiently(chat, line):
                break
        return 0


def _typed() -> Iterator[str]:
    """Lines from the terminal, with editing and history where Python has readline."""
    if importlib.util.find_spec("readline") is not None:
        importlib.import_module("readline")
    while True:
        try:
            yield input("> ")
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print()
            raise


def _take_patiently(chat: Chat, line: str) -> bool:
    """As `take`, but a fault is told and the conversation goes on."""
    try:
        return chat.take(line)
    except (ValueError, RequestFailed) as error:
        print(f"pointsman chat: {error}", file=sys.stderr)
        return True


@contextlib.contextmanager
def _enough(interactive: bool) -> Iterator[Callable[[], bool]]:
    """While it lasts, a first Ctrl-C is only noted, for the caller to ask about; a second one interrupts as ever."""
    pressed: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        if pressed:
            signal.default_int_handler(number, frame)
        pressed.append(number)

    before = signal.signal(signal.SIGINT, note) if interactive else None
    try:
        yield lambda: bool(pressed)
    finally:
        if interactive:
            signal.signal(signal.SIGINT, before)
