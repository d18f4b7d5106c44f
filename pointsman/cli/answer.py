"""One answer on its way to a person: the thinking dimmed, then the answer.

The text is split by the parser that the server uses, and written as it is: rich says how a terminal is spoken to, but its own
printing would expand tabs. Control characters are left out on a terminal: a model must not be able
to move the cursor or set the title.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TextIO

from rich.console import COLOR_SYSTEMS, Console
from rich.style import Style

from pointsman.engine.llm import LLM
from pointsman.server.events import ContentDelta, Event, Message, ReasoningDelta
from pointsman.server.output import OutputParser, parse_output
from pointsman.server.tags import THINK_OPEN

TAIL_TOKENS = 8
_CONTROLS = {code: None for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in "\n\t"}


class AnswerPrinter:
    """Prints one answer as it comes, and keeps its two parts.

    Args:
        opened: the prompt ends inside the thinking.
        hide_thinking: print the answer alone.
        stream: where to print.
    """

    def __init__(self, *, opened: bool, hide_thinking: bool, stream: TextIO) -> None:
        self.reasoning = ""
        self.content = ""
        self._parser = OutputParser("minimax", None, opened=opened)
        self._hide_thinking = hide_thinking
        console = Console(file=stream)
        self._terminal = console.is_terminal
        self._colors = COLOR_SYSTEMS[console.color_system] if console.color_system else None
        self._style = Style(dim=True)
        self._stream = stream

    def feed(self, text: str) -> None:
        self._show(self._parser.push(text))

    def finish(self) -> None:
        """Print what was kept back, and end the line."""
        self._show(self._parser.finish())
        shown = self.content or ("" if self._hide_thinking else self.reasoning)
        if not shown.endswith("\n"):
            self._write("\n")

    def _show(self, events: Sequence[Event]) -> None:
        for event in events:
            if isinstance(event, ReasoningDelta):
                self.reasoning += event.text
                if not self._hide_thinking:
                    self._write(event.text, dim=True)
            elif isinstance(event, ContentDelta):
                if not self.content and self.reasoning and not self._hide_thinking:
                    self._write("\n\n")
                self.content += event.text
                self._write(event.text)

    def _write(self, text: str, *, dim: bool = False) -> None:
        if not text:
            return
        if self._terminal:
            text = text.translate(_CONTROLS)
        self._stream.write(self._style.render(text, color_system=self._colors) if dim else text)
        self._stream.flush()


def render(llm: LLM, messages: Sequence[Mapping[str, Any]]) -> tuple[list[int], bool]:
    """The prompt of a conversation, and whether it ends inside the thinking. Raises ValueError where there is no chat template."""
    tokens = llm.render(messages)
    assert llm.engine.tokenizer is not None
    tail = llm.engine.tokenizer.decode(tokens[-TAIL_TOKENS:], skip_special_tokens=False)
    return tokens, tail.rstrip().endswith(THINK_OPEN)


def split(text: str, *, opened: bool) -> Message:
    """A whole answer in its two parts."""
    return parse_output(text, "minimax", None, opened=opened)
