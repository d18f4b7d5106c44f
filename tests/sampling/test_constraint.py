"""A sequence kept to a grammar, against an oracle: one matcher that has followed the whole text from its beginning.

The channel is replaced by one that compiles and matches in this process and answers at once.
"""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest

from pointsman.grammar import Grammar
from pointsman.request import SamplingParams
from pointsman.sampling.constraint import Constraint
from pointsman.sampling.grammar import Compiled, Compiler
from pointsman.sampling.grammar_messages import Verdict, num_words
from pointsman.step import LaneStart

EOS, CONTROL = 256, 257
PIECES = ["</think>", "x</think>y", "think>", "</", "</think>\n\n", ">12", "think>7", "<<", "nk>", "12"]
VOCABULARY = [bytes([byte]) for byte in range(256)] + [b"", b""] + [piece.encode() for piece in PIECES]
SIZE = len(VOCABULARY)
GRAMMAR = Grammar.regex("[0-9]{3,5}", after="</think>")
ROW = 2


@pytest.fixture(scope="module")
def compiler() -> Compiler:
    return Compiler(VOCABULARY, SIZE, [EOS])


class Channel:
    """Stands for the process of one grammar, at one row."""

    def __init__(self, compiler: Compiler, grammar: Grammar) -> None:
        self._compiled = compiler.compile(grammar)
        self.verdict = Verdict(crossing=compiler.crossing(grammar.after, self._compiled))
        self.matcher: Any = None
        self.num_asked = 0

    def open(self, row: int, text: bytes, tokens: list[int], stop_ids: list[int]) -> None:
        assert row == ROW and self.matcher is None, "the text before has not been left"
        self.matcher = self._compiled.matcher(stop_ids)
        assert self.matcher.accept_text(text) and all(self.matcher.accept(token) for token in tokens)

    def accept(self, row: int, token: int) -> None:
        assert row == ROW and self.matcher.accept(token)

    def leave(self, row: int) -> None:
        assert row == ROW and self.matcher is not None
        self.matcher = None

    def mask(self, row: int) -> Any:
        self.num_asked += 1
        words = np.zeros(num_words(SIZE), np.int32)
        self.matcher.fill(words)
        return words


def started(compiler: Compiler, grammar: Grammar, output: list[int], **params: Any) -> tuple[Constraint, Channel]:
    channel = Channel(compiler, grammar)
    start = LaneStart(ROW, 7, (1, 2), tuple(output), SamplingParams(grammar=grammar, **params), 0)
    return Constraint(start, channel, [EOS], VOCABULARY.__getitem__), channel  # type: ignore[arg-type]


def open_tokens(constraint: Constraint) -> set[int]:
    logits = np.zeros(SIZE, np.float32)
    constraint.restrict(logits)
    return set(np.isfinite(logits).nonzero()[0].tolist())


def masked(compiled: Compiled, text: bytes, stop_ids: list[int]) -> set[int]:
    """The oracle: what may follow a text, by a matcher that has seen all of it."""
    matcher, words = compiled.matcher(stop_ids), np.zeros(num_words(SIZE), np.int32)
    assert matcher.accept_text(text)
    matcher.fill(words)
    return set(np.unpackbits(words.view(np.uint8), bitorder="little").nonzero()[0].tolist())


@pytest.mark.parametrize("grammar", [GRAMMAR, Grammar.regex("[0-9]{3,5}")], ids=["after", "from the start"])
def test_masks_are_those_of_the_whole_text(compiler: Compiler, grammar: Grammar) -> None:
    compiled = compiler.compile(grammar)
    rng = random.Random(4)
    in_mark = ended = 0
    for _ in range(60):
        constraint, channel = started(compiler, grammar, [], stop_token_ids=(ord("9"),))
        text, output = b"", list[int]()
        while not constraint.ended and len(output) < 60:
            tokens, oracle = open_tokens(constraint), masked(compiled, text, [EOS, ord("9")])
            free = grammar.after is not None and b"</think>" not in text
            if free and not any(text.endswith(b"</think>"[:size]) for size in range(1, 8)):
                assert channel.matcher is None, "nothing is asked while the text is free"
                assert tokens == oracle | {CONTROL}, "free but for the end, and what would run past the mark unseen"
            else:
                assert tokens == oracle
                in_mark += free
            again, _ = started(compiler, grammar, output, stop_token_ids=(ord("9"),))
            assert open_tokens(again) == tokens, "whoever comes back is where it was"
            likely = [token for token in tokens if token > CONTROL]
            token = rng.choice(likely if likely and rng.random() < 0.5 else sorted(tokens - {CONTROL}))
            constraint.commit(token)
            output.append(token)
            text += VOCABULARY[token] if token != EOS else b""
        ended += constraint.ended
    assert ended > 20 and (in_mark > 20 or grammar.after is None)


def test_a_control_token_in_free_text_stays_free(compiler: Compiler) -> None:
    constraint, channel = started(compiler, GRAMMAR, [])
    constraint.commit(CONTROL)
    assert channel.matcher is None and CONTROL in open_tokens(constraint) and EOS not in open_tokens(constraint)


def test_after_the_end_nothing_counts(compiler: Compiler) -> None:
    """A step that was planned before the end was known commits one token more."""
    constraint, channel = started(compiler, Grammar.regex("12?"), [ord("1")])
    constraint.commit(EOS)
    assert constraint.ended and channel.matcher is None
    constraint.commit(5)
    constraint.close()
    assert constraint.ended


def test_leaving_a_lane_ends_the_matching_once(compiler: Compiler) -> None:
    constraint, channel = started(compiler, Grammar.regex("1"), [])
    assert channel.matcher is not None
    constraint.close()
    constraint.close()
    assert channel.matcher is None
