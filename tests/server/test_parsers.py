"""The reasoning parser against one rule: cutting a text differently changes nothing."""

from __future__ import annotations

import itertools

from hypothesis import example, given, settings
from hypothesis import strategies as st

from pointsman.server.parsers import CLOSE, OPEN, ReasoningParser

PIECES = st.sampled_from([OPEN, CLOSE, "<", "</", "<thi", "</thin", "think>", "\n", "\r", " ", "a", "é", "step 2", "</think"])
TEXTS = st.lists(PIECES, max_size=12).map("".join)


def parse(pieces: list[str], *, opened: bool) -> tuple[str, str]:
    parser = ReasoningParser(opened=opened)
    parts = [parser.feed(piece) for piece in pieces] + [parser.finish()]
    return "".join(part.reasoning for part in parts), "".join(part.content for part in parts)


def oracle(text: str, *, opened: bool) -> tuple[str, str]:
    """The meaning of a whole text, in a few lines."""
    if not opened and not text.lstrip().startswith(OPEN):
        return "", text
    body = text if opened else text.lstrip().removeprefix(OPEN)
    reasoning, tag, content = body.lstrip("\r\n").partition(CLOSE)
    return (reasoning.rstrip("\r\n"), content.lstrip("\r\n")) if tag else (reasoning, "")


@settings(deadline=None, max_examples=500)
@given(text=TEXTS, cuts=st.lists(st.integers(0, 60), max_size=8), opened=st.booleans())
@example(text="\nso\n</think>\n\nyes", cuts=[2, 5, 9], opened=True)
@example(text=" <think>so</think>yes", cuts=[3], opened=False)
def test_any_cut_gives_the_same_parts(text: str, cuts: list[int], opened: bool) -> None:
    edges = sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})
    pieces = [text[start:end] for start, end in itertools.pairwise(edges)]
    assert parse(pieces, opened=opened) == oracle(text, opened=opened)
    assert parse(list(text), opened=opened) == oracle(text, opened=opened)


@settings(deadline=None, max_examples=200)
@given(text=TEXTS)
def test_nothing_but_tags_and_line_ends_is_lost(text: str) -> None:
    reasoning, content = parse([text], opened=True)
    kept = text.replace(CLOSE, "", 1) if CLOSE in text else text
    assert (reasoning + content).replace("\n", "").replace("\r", "") == kept.replace("\n", "").replace("\r", "")


def test_what_is_certain_is_not_held_back() -> None:
    parser = ReasoningParser(opened=True)
    assert parser.feed("\n2 + 2").reasoning == "2 + 2"
    assert parser.feed(" = 4 <").reasoning == " = 4 "
    assert parser.feed("b").reasoning == "<b"
    assert parser.thinking
    assert parser.feed("</think>\n\nFour").content == "Four"
    assert parser.answered
    assert parser.feed("\n\n</think> stays").content == "\n\n</think> stays"
