"""The grammars of an engine: what is compiled, kept, dropped and remembered, and what happens to those who wait when processes end."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pointsman import tiny
from pointsman.engine import grammars as module
from pointsman.engine.grammars import Grammars
from pointsman.grammar import Grammar
from pointsman.sampling.grammar_messages import Limits
from pointsman.text import Tokenizer

TOKENIZER = Tokenizer.load(tiny.path())
HUGE = Grammar.ebnf("root ::= r0\n" + "\n".join(f'r{i} ::= "x" r{i + 1} | r{i + 1}' for i in range(4000)) + '\nr4000 ::= "a"')


@pytest.fixture(scope="module")
def kept() -> Iterator[Grammars]:
    found = Grammars(TOKENIZER, TOKENIZER.vocab_size, 4, Limits(compile_seconds=0.5))
    yield found
    found.close()


def wait(grammars: Grammars, done: Callable[[], bool]) -> None:
    while not done():
        grammars.progress(0.05)


def number(index: int) -> Grammar:
    return Grammar.regex(f"[0-9]{{{index + 1}}}")


def compiled(grammars: Grammars, grammar: Grammar) -> Grammar:
    assert grammars.hold(grammar)
    wait(grammars, lambda: grammars.ready(grammar))
    return grammar


def test_a_grammar_is_compiled_once_for_all_who_hold_it(kept: Grammars) -> None:
    compiled(kept, number(0))
    channel = kept._entries[number(0)].channel
    assert kept.hold(number(0)) and kept.ready(number(0)), "nothing to wait for"
    kept.release(number(0))
    kept.release(number(0))
    assert kept.hold(number(0)) and kept._entries[number(0)].channel is channel, "kept for the next"
    kept.release(number(0))


def test_what_nobody_holds_goes_first_and_what_is_held_stays(kept: Grammars, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_GRAMMARS", 3)
    for index in range(10, 13):
        compiled(kept, number(index))
    assert not kept.hold(number(13)), "all are in use"
    kept.release(number(11))
    assert kept.hold(number(13)) and set(kept._entries) == {number(10), number(12), number(13)}
    for index in (10, 12, 13):
        kept.release(number(index))


def test_memory_is_a_bound_as_well(kept: Grammars, monkeypatch: pytest.MonkeyPatch) -> None:
    for index in range(20, 23):
        compiled(kept, number(index))
        kept.release(number(index))
    monkeypatch.setattr(module, "MAX_KEPT_BYTES", 1)
    compiled(kept, number(23))
    assert set(kept._entries) == {number(23)}, "what is held is not dropped for its size"
    kept.release(number(23))
    assert len(kept) == 0


def test_what_could_not_be_compiled_is_remembered_for_a_while(kept: Grammars, monkeypatch: pytest.MonkeyPatch) -> None:
    for grammar, reason in ((Grammar.regex("(a"), "parenthesis"), (HUGE, "too large or too complex")):
        assert kept.hold(grammar)
        with pytest.raises(ValueError, match=reason):
            wait(kept, lambda: kept.ready(grammar))  # noqa: B023 - called in this round
        kept.release(grammar)
        assert kept.hold(grammar)
        with pytest.raises(ValueError, match=reason):
            kept.ready(grammar)
        kept.release(grammar)
        monkeypatch.setattr(module, "FAILURE_SECONDS", -1.0)
        assert kept.hold(grammar) and not kept.ready(grammar), "it is tried anew"
        monkeypatch.undo()
        with pytest.raises(ValueError, match=reason):
            wait(kept, lambda: kept.ready(grammar))  # noqa: B023
        kept.release(grammar)


def test_a_slow_one_does_not_hold_up_the_others(kept: Grammars) -> None:
    assert kept.hold(HUGE.__class__("ebnf", HUGE.text + "\n")) and kept.hold(number(30))
    wait(kept, lambda: kept.ready(number(30)))
    other = next(grammar for grammar in kept._entries if grammar.text == HUGE.text + "\n")
    assert not kept.ready(other)
    kept.release(number(30))
    kept.release(other)


def test_an_idle_process_that_has_ended_is_replaced(kept: Grammars) -> None:
    channel = kept._entries[compiled(kept, number(40))].channel
    kept.release(number(40))
    assert channel is not None
    channel._connection.shutdown(2)
    compiled(kept, number(40))
    assert kept._entries[number(40)].channel is not channel
    kept.release(number(40))


def test_a_host_that_ends_is_replaced_for_the_next(kept: Grammars) -> None:
    compiled(kept, number(50))
    assert kept._host is not None
    kept._host._process.kill()
    kept._host._process.wait()
    assert kept.hold(number(51))
    with pytest.raises(ValueError, match="structured output is not available"):
        wait(kept, lambda: kept.ready(number(51)))
    kept.release(number(51))
    compiled(kept, number(51))
    assert kept.ready(number(50))
    for index in (50, 51):
        kept.release(number(index))


def test_nothing_runs_before_a_grammar_is_held_and_after_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    grammars = Grammars(TOKENIZER, TOKENIZER.vocab_size, 4)
    grammars.progress()
    assert grammars._host is None
    monkeypatch.setattr(sys, "executable", str(tmp_path / "none"))
    assert grammars.hold(number(0))
    with pytest.raises(ValueError, match="could not be started"):
        wait(grammars, lambda: grammars.ready(number(0)))
    started = time.monotonic()
    grammars.close()
    assert len(grammars) == 0 and time.monotonic() - started < 60
