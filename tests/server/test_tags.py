"""Finding tags: what is decided early is decided for good."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from pointsman.server.tags import MAX_GAP, MAX_HEADER, MAX_HELD, Finder, Match, Tag, settle

PIECES = [*Tag, "<invoke name=", '"', "'", ">", "<", " ", "\n", "f", "=", "name", '">', "/", "\t"]
TEXTS = st.lists(st.sampled_from(PIECES), max_size=12).map("".join)
SETS = st.lists(st.sampled_from(list(Tag)), min_size=1, max_size=7, unique=True)


@settings(deadline=None, max_examples=1000)
@given(text=TEXTS, more=TEXTS, tags=SETS)
def test_more_text_changes_no_decision(text: str, more: str, tags: list[Tag]) -> None:
    early, late = Finder(tags).find(text), Finder(tags).find(text + more)
    if early is None:
        assert late is None or late.start >= len(text)
    elif early.end is not None:
        assert late == early
    else:
        assert late is None or late.start >= early.start


@settings(deadline=None, max_examples=300)
@given(start=TEXTS, piece=st.sampled_from(PIECES), tags=SETS)
def test_little_is_undecided(start: str, piece: str, tags: list[Tag]) -> None:
    text = start + piece * 1500
    match = Finder(tags).find(text)
    assert match is None or match.end is not None or len(text) - match.start < MAX_HELD


def test_the_bounds() -> None:
    longest = '<invoke name="' + "f" * (MAX_HEADER - len(' name="">')) + '">'
    found = Finder([Tag.CALL_OPEN]).find(longest)
    assert found is not None
    assert found.end == len(longest)
    assert Finder([Tag.CALL_OPEN]).find(longest.replace('">', 'f">')) is None
    for blanks, match in ((MAX_GAP, Match(0, Tag.VALUE_CLOSE, len(Tag.VALUE_CLOSE))), (MAX_GAP + 1, None)):
        assert Finder([Tag.VALUE_CLOSE]).find("</parameter>" + "\n" * blanks + "</invoke>") == match


def test_the_end_of_the_text_decides() -> None:
    whole = Finder([Tag.VALUE_CLOSE]).find("</parameter>\n</in")
    assert whole == Match(0, Tag.VALUE_CLOSE)
    assert settle("</parameter>\n</in", whole) == Match(0, Tag.VALUE_CLOSE, len("</parameter>"))
    for text, settled in (("<invoke name=f>", Match(0, Tag.CALL_OPEN, 15, "f")), ("<invoke name=f", None), ("<invoke", None)):
        undecided = Finder([Tag.CALL_OPEN]).find(text)
        assert undecided == Match(0, Tag.CALL_OPEN)
        assert settle(text, undecided) == settled
    partial = Finder([Tag.CALL_CLOSE]).find("a</inv")
    assert partial == Match(1)
    assert settle("a</inv", partial) is None
