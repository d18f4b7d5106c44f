"""Flags against the configuration they come from: the fields are the oracle."""

import dataclasses
import typing
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pointsman.cli.flags import UsageError, add_flags, build, new_parser, parse
from pointsman.config import EngineConfig, Flag, ServerConfig, engine_config, flag, flags


@dataclass(frozen=True, kw_only=True)
class Inner:
    depth: int = flag(1, "how deep", low=1, high=9)
    words: tuple[str, ...] = flag((), "some words")


@dataclass(frozen=True, kw_only=True)
class Outer:
    text: str = flag("", "a text")
    sizes: tuple[int, ...] = flag((1, 2), "100 % of the sizes", low=1, high=50)
    loud: bool = flag(False, "make noise")
    share: float | None = flag(None, "a share", names=("--part",), low=0, high=1)
    colour: str = flag("red", "a colour", choices=("red", "green"))
    inner: Inner = field(default_factory=Inner)


def read(*words, config=Outer, positional="text"):
    parser = new_parser("program", "A program.")
    add_flags(parser, config, positional)
    return parse(parser, words)


def test_only_what_was_given_is_returned():
    assert read() == {}
    assert read("--loud", "--depth", "3") == {"loud": True, "depth": 3}


def test_lists_and_aliases_and_the_positional():
    words = ("hello there", "--part=0.5", "--words", "a", "--words", "b", "--sizes", "3", "4")
    assert read(*words) == {"text": "hello there", "share": 0.5, "words": ("a", "b"), "sizes": (3, 4)}


def test_a_text_may_start_with_a_dash():
    assert read("--", "-x") == {"text": "-x"}
    assert read("-") == {"text": "-"}
    assert read("-5 + 3 = ?") == {"text": "-5 + 3 = ?"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--dept", "3"], "unknown flag '--dept'; did you mean '--depth'?"),
        (["--loud=yes"], "--loud: ignored explicit argument 'yes'"),
        (["--colur=red"], "unknown flag '--colur'; did you mean '--colour'?"),
        (["--zzz"], "unknown flag '--zzz'"),
        (["a", "b"], "unexpected argument 'b' (a text of several words needs quotes)"),
        (["--depth", "0"], "--depth is 0; it must be from 1 to 9"),
        (["--depth", "1.5"], "--depth is '1.5'; it must be a number"),
        (["--share", "nan"], "--share is nan"),
        (["--sizes", "1", "51"], "--sizes is 51; it must be from 1 to 50"),
        (["--colour", "blue"], "--colour is 'blue'; it must be one of red, green"),
        (["--depth"], "--depth: expected one argument"),
    ],
)
def test_refusals_name_the_flag_and_what_is_right(words, message):
    with pytest.raises(UsageError) as caught:
        read(*words)
    assert str(caught.value).startswith(message)


def test_build_fills_sections():
    assert build(Outer, {"depth": 4, "loud": True}) == Outer(loud=True, inner=Inner(depth=4))


def test_help_names_every_flag_with_its_help_and_default():
    parser = new_parser("program", "A program.")
    add_flags(parser, Outer, "text")
    text = " ".join(parser.format_help().split())
    assert "program TEXT [FLAGS]" in text
    for name, entry in flags(Outer).items():
        assert entry.help in text
        if name != "text":
            assert all(spelling in text for spelling in entry.names)
    assert "100 % of the sizes (default: 1 2)" in text


def values_of(entry: Flag) -> st.SearchStrategy[typing.Any]:
    low, high = entry.low, entry.high
    if entry.type is bool:
        return st.just(True)
    if entry.choices:
        return st.sampled_from(entry.choices)
    if entry.type is int:
        return st.integers(int(low or 0), int(high) if high is not None else 1 << 40)
    if entry.type is float:
        return st.floats(low, high)
    return st.text(st.characters(codec="utf-8", exclude_characters="\0"))


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_every_flag_under_every_name_reads_back_as_the_keyword_would(data):
    known = flags(EngineConfig)
    chosen = data.draw(st.lists(st.sampled_from(sorted(known)), unique=True))
    values = {name: data.draw(values_of(known[name])) for name in chosen}
    words = []
    for name, value in values.items():
        spelling = data.draw(st.sampled_from(known[name].names))
        words.append(spelling if value is True else f"{spelling}={value}")
    assert engine_config(**read(*words, config=EngineConfig, positional=None)) == engine_config(**values)


@settings(deadline=None, max_examples=200)
@given(
    st.lists(
        st.text(st.characters(codec="utf-8"), max_size=12) | st.sampled_from(["--port", "--host", "--", "-", "--tp=", "-h2", "@x"]),
        max_size=5,
    )
)
def test_rubbish_is_refused_in_one_line_or_understood(words):
    parser = new_parser("program", "A program.")
    add_flags(parser, ServerConfig)
    words = [word for word in words if word not in ("-h", "--help") and not word.startswith("-h")]
    try:
        values = parse(parser, words)
    except UsageError as error:
        assert str(error)
    else:
        assert set(values) <= {item.name for item in dataclasses.fields(ServerConfig)}
