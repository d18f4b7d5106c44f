"""What an answer consists of, piece by piece and whole.

A whole answer is its events joined, so a client that adds up a stream has what a client that waits gets.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class ReasoningDelta:
    """More thinking."""

    text: str


@dataclass(frozen=True, slots=True)
class ContentDelta:
    """More of the answer."""

    text: str


@dataclass(frozen=True, slots=True)
class ToolCallStart:
    """A call begins; calls count from 0 through the answer."""

    index: int
    name: str


@dataclass(frozen=True, slots=True)
class ToolArgumentsDelta:
    """More of the JSON object that a call's arguments are."""

    index: int
    text: str


@dataclass(frozen=True, slots=True)
class ToolCallEnd:
    """A call's arguments are a whole JSON object; `complete` is false where the model has not closed the call."""

    index: int
    complete: bool


Event = ReasoningDelta | ContentDelta | ToolCallStart | ToolArgumentsDelta | ToolCallEnd


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call; `arguments` is the text of a JSON object."""

    name: str
    arguments: str
    complete: bool = True


@dataclass(frozen=True, slots=True)
class Message:
    """One answer."""

    reasoning: str = ""
    content: str = ""
    tool_calls: tuple[ToolCall, ...] = ()


def merge(events: Iterable[Event]) -> list[Event]:
    """The same events, neighbours that add to the same text in one."""
    merged: list[Event] = []
    for _, group in itertools.groupby(events, key=lambda event: (type(event), getattr(event, "index", None))):
        first, *others = group
        if isinstance(first, ReasoningDelta | ContentDelta | ToolArgumentsDelta) and others:
            texts = [event.text for event in (first, *others) if not isinstance(event, ToolCallStart | ToolCallEnd)]
            merged.append(replace(first, text="".join(texts)))
        else:
            merged += [first, *others]
    return merged


def join(events: Iterable[Event]) -> Message:
    """The answer that these events make."""
    reasoning: list[str] = []
    content: list[str] = []
    names: list[str] = []
    arguments: list[list[str]] = []
    complete: list[bool] = []
    for event in events:
        match event:
            case ReasoningDelta(text):
                reasoning.append(text)
            case ContentDelta(text):
                content.append(text)
            case ToolCallStart(_, name):
                names.append(name)
                arguments.append([])
            case ToolArgumentsDelta(index, text):
                arguments[index].append(text)
            case ToolCallEnd(_, closed):
                complete.append(closed)
    calls = [ToolCall(name, "".join(texts), closed) for name, texts, closed in zip(names, arguments, complete, strict=True)]
    return Message("".join(reasoning), "".join(content), tuple(calls))
