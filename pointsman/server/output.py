"""What a model has written, read while it is being written: thinking, answer and tool calls.

One parser serves streams and whole answers: a whole answer is everything pushed at once. Whatever way a text is cut, the events say
the same, because nothing is said before it is certain, and only the shortest end of the text that may still mean something else is
kept back. docs/parsing.md has what every text means. The rule behind it: what is a tag never shows as text, what is not clearly a tag
is text and stays where it is written, and no text raises.

    START ----> PROSE <----> BLOCK <----> CALL <----> VALUE
                thinking,    <minimax:    <invoke     <parameter
                or answer    tool_call>   name="">    name="">

Text in a block or in a call that belongs to no value is prose too, and prose is thinking until the tag that closes thinking has come.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import Enum, auto
from typing import Any, Literal, get_args

from pointsman.request import FinishReason
from pointsman.server.events import (
    ContentDelta,
    Event,
    Message,
    ReasoningDelta,
    ToolArgumentsDelta,
    ToolCallEnd,
    ToolCallStart,
    join,
    merge,
)
from pointsman.server.parameter_types import BLANKS
from pointsman.server.tags import THINK_OPEN, Finder, Match, Tag, settle, skip_gap
from pointsman.server.tool_calls import Arguments, Toolbox

LINE_ENDS = "\r\n"
Reasoning = Literal["minimax", "minimax-append-think"]


class _Place(Enum):
    START = auto()
    PROSE = auto()
    BLOCK = auto()
    CALL = auto()
    VALUE = auto()


_BLOCK_TAGS = (Tag.BLOCK_OPEN, Tag.BLOCK_CLOSE, Tag.CALL_OPEN)
_TAGS = {
    _Place.PROSE: (Tag.BLOCK_OPEN,),
    _Place.BLOCK: _BLOCK_TAGS,
    _Place.CALL: (*_BLOCK_TAGS, Tag.CALL_CLOSE, Tag.VALUE_OPEN),
}
_FINDERS = {place: Finder(tags) for place, tags in _TAGS.items()} | {_Place.VALUE: Finder((Tag.VALUE_CLOSE,))}
_THINKING_FINDERS = _FINDERS | {place: Finder((*tags, Tag.THINK_CLOSE)) for place, tags in _TAGS.items()}
_THINKING_FINDER = Finder((Tag.THINK_CLOSE,))


class OutputParser:
    """Reads one choice.

    Args:
        reasoning: `minimax` splits thinking from answer; `minimax-append-think` leaves both in the answer and begins it with the
            `<think>` that is in the prompt; None takes everything for answer.
        tools: what the request offers, as OpenAI has it. None or empty: tags of calls are text.
        opened: the prompt ends inside `<think>`.

    Raises:
        ValueError: there is no such `reasoning`.
    """

    def __init__(self, reasoning: Reasoning | None, tools: Sequence[Mapping[str, Any]] | None, *, opened: bool = True) -> None:
        if reasoning is not None and reasoning not in get_args(Reasoning):
            raise ValueError(f"reasoning is {reasoning!r}; it must be {', '.join(get_args(Reasoning))} or None")
        self._splits = reasoning == "minimax"
        self._restores = reasoning == "minimax-append-think" and opened
        self._toolbox = Toolbox(tools) if tools else None
        self._place = _Place.START if self._splits or self._restores else _Place.PROSE
        self._thinking = self._splits and opened
        self._finder = None if self._place is _Place.START else self._choose_finder()
        self._ended: FinishReason | None = None
        self._text = ""
        self._at = 0
        # Of prose: blanks that a tag may follow, and what a tag has left to do.
        self._blanks: list[str] = []
        self._trim = False
        self._spoken = False
        self._break = False
        self._call: Arguments | None = None
        self._index = -1
        self._events: list[Event] = []

    @property
    def thinking(self) -> bool:
        """Whether the tag that closes thinking is still to come."""
        return self._thinking

    @property
    def answered(self) -> bool:
        """Whether the answer has begun: what comes now is not thinking."""
        return self._place is not _Place.START and not self._thinking

    @property
    def num_calls(self) -> int:
        """How many calls have begun."""
        return self._index + 1

    @property
    def num_held(self) -> int:
        """How many characters are kept back to be looked at again; blanks before a tag and unfinished values are not."""
        return len(self._text)

    def push(self, text: str) -> list[Event]:
        """Take the next piece of text, and return what is certain by now."""
        assert self._ended is None
        self._text += text
        self._read()
        return self._said()

    def finish(self, reason: FinishReason = FinishReason.STOP) -> list[Event]:
        """The text has ended, for this reason: return the rest. Where it was cut off, half a tag within a block is dropped."""
        assert self._ended is None
        self._ended = reason
        self._read()
        if self._place is _Place.START:
            self._place = _Place.PROSE
        self._end_call(complete=False)
        self._say("".join(self._blanks))
        return self._said()

    def _read(self) -> None:
        while self._at < len(self._text) and (self._start() if self._place is _Place.START else self._step()):
            pass
        self._text, self._at = self._text[self._at :], 0

    def _said(self) -> list[Event]:
        events, self._events = self._events, []
        return merge(events) if len(events) > 1 else events

    def _start(self) -> bool:
        """Decide how the text begins; False where that takes more text."""
        after = skip_gap(self._text, self._at)
        beginning = self._text[after : after + len(THINK_OPEN)]
        tagged = beginning == THINK_OPEN
        if THINK_OPEN.startswith(beginning) and not tagged and self._ended is None:
            return False
        self._place = _Place.PROSE
        if self._splits:
            self._thinking = self._trim = self._thinking or tagged
            self._at = after + len(THINK_OPEN) if tagged else self._at
        elif not tagged:
            self._say(THINK_OPEN)
            self._spoken = True
        self._finder = self._choose_finder()
        return True

    def _step(self) -> bool:
        """Read up to and with the next tag; False where more text must tell whether it is one."""
        match = self._finder.find(self._text, self._at) if self._finder else None
        self._take(len(self._text) if match is None else match.start)
        if match is None:
            return True
        if match.end is None:
            if self._ended is None:
                return False
            match = self._settled(match)
        if match is not None and match.end is not None:
            self._at = match.end
            self._enter(match)
        return True

    def _choose_finder(self) -> Finder | None:
        """Of the tags that mean something here; None where no tag does."""
        if self._toolbox is None:
            return _THINKING_FINDER if self._thinking else None
        return (_THINKING_FINDERS if self._thinking else _FINDERS)[self._place]

    def _settled(self, match: Match) -> Match | None:
        """What an undecided place is, now that the text has ended: a tag; or nothing, and then it has been read."""
        cut = self._ended is not FinishReason.STOP
        if cut and match.tag is not Tag.VALUE_CLOSE and (self._place is not _Place.PROSE or match.tag is Tag.BLOCK_OPEN):
            self._blanks.clear()
            self._at = len(self._text)
            return None
        settled = settle(self._text, match)
        if settled is None:
            self._take(len(self._text))
        return settled

    def _enter(self, match: Match) -> None:
        """Go where a tag leads. The blanks around it are its own; prose that goes on behind it does so on a line of its own."""
        self._blanks.clear()
        self._trim = True
        self._break = self._spoken
        match match.tag:
            case Tag.THINK_CLOSE:
                self._leave(_Place.PROSE, complete=False)
                self._thinking = self._spoken = self._break = False
            case Tag.BLOCK_OPEN:
                self._leave(_Place.BLOCK)
            case Tag.BLOCK_CLOSE:
                self._leave(_Place.PROSE)
            case Tag.CALL_OPEN:
                self._leave(_Place.CALL)
                self._begin_call(match.name)
            case Tag.CALL_CLOSE:
                self._leave(_Place.BLOCK)
            case Tag.VALUE_OPEN:
                self._place = _Place.VALUE
                self._argue(self._arguments.open(match.name))
            case Tag.VALUE_CLOSE:
                self._place = _Place.CALL
                self._argue(self._arguments.close())
        self._finder = self._choose_finder()

    def _leave(self, place: _Place, *, complete: bool = True) -> None:
        """Go to a place outside of any call."""
        self._end_call(complete=complete)
        self._place = place

    def _begin_call(self, name: str) -> None:
        assert self._toolbox is not None
        self._call = Arguments(self._toolbox.parameters(name))
        self._index += 1
        self._events.append(ToolCallStart(self._index, name))

    def _end_call(self, *, complete: bool) -> None:
        if self._call is not None:
            self._argue(self._call.end())
            self._events.append(ToolCallEnd(self._index, complete))
            self._call = None

    @property
    def _arguments(self) -> Arguments:
        assert self._call is not None
        return self._call

    def _argue(self, text: str) -> None:
        if text:
            self._events.append(ToolArgumentsDelta(self._index, text))

    def _take(self, end: int) -> None:
        """Read the text up to here, which has no tag."""
        text, self._at = self._text[self._at : end], end
        if self._place is _Place.VALUE:
            self._argue(self._arguments.add(text))
        else:
            self._prose(text)

    def _prose(self, text: str) -> None:
        """Say what a tag cannot take back."""
        blanks = LINE_ENDS if self._place is _Place.PROSE else BLANKS
        if self._trim:
            text = text.lstrip(blanks)
            self._trim = not text
        body = text.rstrip(blanks) if self._finder else text
        if body:
            self._say("\n" * self._break + "".join(self._blanks) + body)
            self._blanks.clear()
            self._break = False
            self._spoken = True
        if len(body) < len(text):
            self._blanks.append(text[len(body) :])

    def _say(self, text: str) -> None:
        if text:
            self._events.append(ReasoningDelta(text) if self._thinking else ContentDelta(text))


def parse_output(
    text: str,
    reasoning: Reasoning | None,
    tools: Sequence[Mapping[str, Any]] | None,
    *,
    opened: bool = True,
    reason: FinishReason = FinishReason.STOP,
) -> Message:
    """Read a whole text."""
    parser = OutputParser(reasoning, tools, opened=opened)
    return join([*parser.push(text), *parser.finish(reason)])


def parse_tool_calls(text: str, tools: Sequence[Mapping[str, Any]] | None) -> Message:
    """Read a whole text that has no thinking."""
    return parse_output(text, None, tools)
