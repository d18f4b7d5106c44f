"""The processes of grammars from the engine's end, with the bundled vocabulary: answers, faults, and that nobody waits for ever."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator

import numpy as np
import pytest

from pointsman import tiny
from pointsman.grammar import Grammar
from pointsman.sampling.grammar_client import Channel, ConstraintFault, Host
from pointsman.sampling.grammar_messages import Launch, Limits
from pointsman.text import Tokenizer

TOKENIZER = Tokenizer.load(tiny.path())
EOS = list(TOKENIZER.eos_ids)
ROWS = 300
LIMITS = Limits(compile_seconds=0.8, call_seconds=0.3, text_seconds=0.5, token_seconds=0.0005)


def until(part: Host | Channel, name: str) -> None:
    while not getattr(part, name):
        part.hear()
        time.sleep(0.005)


@pytest.fixture(scope="module")
def host() -> Iterator[Host]:
    host = Host(Launch(str(tiny.path()), TOKENIZER.vocab_size, LIMITS))
    until(host, "ready")
    yield host
    host.close()


@pytest.fixture
def digits(host: Host) -> Iterator[Channel]:
    channel = host.start(Grammar.regex("[0-9]*x"), ROWS)
    until(channel, "verdict")
    yield channel
    channel.close()


def texts(mask: np.ndarray) -> set[bytes]:  # type: ignore[type-arg]
    return {TOKENIZER.token_bytes(token) for token in np.unpackbits(mask.view(np.uint8), bitorder="little").nonzero()[0].tolist()}


def token(text: str) -> int:
    (found,) = TOKENIZER.encode(text)
    return found


def test_texts_on_many_rows_are_followed_apart(digits: Channel) -> None:
    for row in range(ROWS):
        digits.open(row, b"", [token("1")] * (row % 3), EOS)
    for row in range(0, ROWS, 2):
        digits.accept(row, token("x"))
    for row in range(ROWS):
        assert (texts(digits.mask(row)) == {b"[e~["}) == (row % 2 == 0)


def test_a_row_that_is_taken_again_has_no_answers_from_before(digits: Channel) -> None:
    digits.open(0, b"", [], EOS)
    digits.accept(0, token("x"))
    digits.leave(0)
    digits.open(0, b"12", [], EOS)
    assert b"x" in texts(digits.mask(0))


def test_a_mask_can_be_read_again(digits: Channel) -> None:
    digits.open(0, b"", [], EOS)
    assert texts(digits.mask(0)) == texts(digits.mask(0))


def test_long_texts_come_back_while_answers_pile_up(digits: Channel) -> None:
    """Neither side may wait for the other to read: hundreds of answers, and then messages beyond any buffer."""
    for _ in range(8):
        for row in range(ROWS):
            digits.open(row, b"", [token("1")] * 500, EOS)
    assert b"x" in texts(digits.mask(ROWS - 1)) and b"x" in texts(digits.mask(0))


def test_what_does_not_fit_is_a_fault_of_its_row(digits: Channel) -> None:
    digits.open(0, b"", [token("x"), token("1")], EOS)
    digits.open(1, b"", [], EOS)
    with pytest.raises(ConstraintFault, match="does not fit"):
        digits.mask(0)
    assert b"x" in texts(digits.mask(1))


def test_a_text_that_costs_too_much_is_a_fault_of_its_row(host: Host) -> None:
    channel = host.start(Grammar.ebnf('root ::= s\ns ::= s s s | "a" | "b" s "c" | [a-z]* | ""'), ROWS)
    until(channel, "verdict")
    channel.open(0, b"", [], EOS)
    with pytest.raises(ConstraintFault, match="takes too long"):
        for _ in range(2000):
            channel.mask(0)
            channel.accept(0, token("a"))
    channel.close()


def test_a_call_that_does_not_return_ends_the_process(host: Host) -> None:
    channel = host.start(Grammar.regex("((((((a{1,90}){1,90}){1,90}){1,90}){1,90}){1,90}){1,90}b"), ROWS)
    until(channel, "verdict")
    assert channel.verdict is not None and channel.verdict.error is None
    channel.open(0, b"a" * 400, [], EOS)
    with pytest.raises(ConstraintFault, match="takes too long"):
        channel.mask(0)
    assert channel.broken
    channel.accept(0, 1)
    with pytest.raises(ConstraintFault):
        channel.mask(0)
    channel.close()


def test_what_cannot_be_compiled(host: Host) -> None:
    wrong = host.start(Grammar.regex("(a"), ROWS)
    until(wrong, "verdict")
    assert wrong.verdict is not None and "parenthesis" in (wrong.verdict.error or "")
    wrong.close()
    chain = "\n".join(f'r{index} ::= "x" r{index + 1} | r{index + 1}' for index in range(4000))
    huge = host.start(Grammar.ebnf(f'root ::= r0\n{chain}\nr4000 ::= "a"'), 1)
    until(huge, "broken")
    assert huge.verdict is None
    huge.close()


def test_a_host_that_cannot_start_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    host = Host(Launch(str(tiny.path()), TOKENIZER.vocab_size, LIMITS))
    until(host, "failed")
    assert not host.ready
    host.close()


def test_a_host_that_is_killed_is_noticed_and_its_children_go_on(host: Host, digits: Channel) -> None:
    """The last test: it takes the host from the others."""
    host._process.kill()
    until(host, "failed")
    digits.open(0, b"", [], EOS)
    assert b"1" in texts(digits.mask(0))
