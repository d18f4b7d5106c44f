"""Against reading the text one character at a time and looking at its end with `str.endswith`."""

from hypothesis import given, settings
from hypothesis import strategies as st

from pointsman.text import StopStrings

letters = st.text(st.sampled_from("ab"), min_size=1, max_size=5)
pieces = st.lists(st.text(st.sampled_from("abc"), max_size=6), max_size=12)


def simulated(text: str, stops: list[str], include: bool) -> tuple[str, str | None]:
    for end in range(len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            stop = max(found, key=len)
            return text[: end if include else end - len(stop)], stop
    return text, None


def held_back(text: str, stops: list[str]) -> str:
    """The longest end of the text that begins a stop string."""
    ends = (text[start:] for start in range(len(text) + 1))
    return next(end for end in ends if not end or any(stop.startswith(end) for stop in stops))


@settings(deadline=None, max_examples=1000)
@given(pieces, st.lists(letters, max_size=4), st.booleans())
def test_the_same_however_it_is_cut(texts: list[str], stops: list[str], include: bool) -> None:
    matcher, emitted, pushed = StopStrings(stops, include), "", ""
    for text in texts:
        certain, matched = matcher.push(text)
        emitted, pushed = emitted + certain, pushed + text
        if matched is not None:
            break
        assert emitted + held_back(pushed, stops) == pushed
    ended_by = matcher.matched
    if ended_by is None:
        emitted += matcher.flush()
    assert (emitted, ended_by) == simulated("".join(texts), stops, include)


def test_across_pieces() -> None:
    matcher = StopStrings(["</s>"])
    assert [matcher.push(piece) for piece in ("one <", "/b> <", "/s", "> two")] == [
        ("one ", None),
        ("</b> ", None),
        ("", None),
        ("", "</s>"),
    ]


def test_the_first_to_be_complete_wins_and_then_the_longest() -> None:
    assert StopStrings(["abcd", "bc"]).push("xabcd") == ("xa", "bc")
    assert StopStrings(["c", "abc"]).push("xabcd") == ("x", "abc")
    assert StopStrings(["c", "abc"], include=True).push("xabcd") == ("xabc", "abc")


def test_without_a_match_everything_comes_out() -> None:
    matcher = StopStrings(["abc"])
    assert matcher.push("xab") == ("x", None)
    assert matcher.flush() == "ab" and matcher.flush() == ""
    assert matcher.push("c") == ("c", None)


def test_no_stop_strings() -> None:
    assert StopStrings([]).push("anything") == ("anything", None)
