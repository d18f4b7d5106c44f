"""Compiling grammars and matching tokens against them: xgrammar, and its only door.

Imported in the processes of `grammar_process` alone. The library is written in C++ and is given text by clients: a short regular
expression can cost it minutes, or gigabytes. So the engine never calls it; and it costs a server that never sees a grammar nothing.

Every kind of grammar becomes one structural tag, xgrammar's JSON form of "this, then that", so that what may precede the constrained
text is part of what is matched: a token with the end of the thinking and the beginning of the answer in it is judged by both halves.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import xgrammar
from numpy.typing import NDArray

from pointsman.grammar import Grammar
from pointsman.grammar.form import MAX_BLANKS
from pointsman.grammar.schema import checked_schema
from pointsman.sampling.grammar_messages import num_words
from pointsman.sampling.marked_schema import MarkedSchema

MAX_MESSAGE = 400

_LINE_ENDS = "\\n{0,2}"
_SOURCE = re.compile(r"\[\d\d:\d\d:\d\d\] \S+:\d+: (?:Check failed: \(.*?\) is false: )?")
Words = NDArray[np.int32]


class Refused(ValueError):
    """The grammar is none, or no text fits it; the message says why."""


class Compiler:
    """Compiles grammars for one vocabulary.

    Args:
        token_bytes: what each token adds to a text; nothing for tokens that no constrained text may have.
        vocab_size: as the model has it; tokens beyond those listed are never allowed.
        eos_ids: tokens that end a text.
    """

    def __init__(self, token_bytes: Sequence[bytes], vocab_size: int, eos_ids: Sequence[int]) -> None:
        assert len(token_bytes) <= vocab_size
        self._token_bytes = token_bytes
        self._vocab_size = vocab_size
        padded = [*token_bytes, *[b""] * (vocab_size - len(token_bytes))]
        info = xgrammar.TokenizerInfo(padded, xgrammar.VocabType.RAW, vocab_size=vocab_size, stop_token_ids=list(eos_ids))
        self._compiler = xgrammar.GrammarCompiler(info, max_threads=1, cache_enabled=False)

    def compile(self, grammar: Grammar) -> Compiled:
        """Raises Refused for a grammar that cannot be compiled, and for one that no text fits."""
        try:
            compiled = Compiled(self._compiler.compile_structural_tag(json.dumps(structural_tag(grammar))), self._vocab_size)
            first = compiled.matcher(())
        except (RuntimeError, ValueError) as error:  # all that the library raises
            raise Refused(f"the {grammar.kind} cannot be used: {_message(error)}") from None
        begun = "" if grammar.after is None else grammar.after + "\n\n"
        if not first.accept_text(begun.encode()) or not first.fill(np.zeros(num_words(self._vocab_size), np.int32)):
            raise Refused(f"the {grammar.kind} cannot be used: no text fits it")
        return compiled

    def crossing(self, after: str | None, compiled: Compiled) -> list[int]:
        """Tokens that have all of `after` in them, and behind it something that does not fit."""
        mark = (after or "").encode()
        whole = [token for token, data in enumerate(self._token_bytes) if mark and mark in data]
        return [token for token in whole if not compiled.matcher(()).accept_text(self._token_bytes[token])]


class Compiled:
    """A grammar that is ready."""

    def __init__(self, compiled: xgrammar.CompiledGrammar, vocab_size: int) -> None:
        self._compiled = compiled
        self._vocab_size = vocab_size

    @property
    def num_bytes(self) -> int:
        """About how much memory it holds."""
        return int(self._compiled.memory_size_bytes)

    def matcher(self, stop_ids: Collection[int]) -> Matcher:
        """A matcher of a new text.

        Args:
            stop_ids: tokens that may end the text when it is complete, and only then; empty: those that the compiler was given.
        """
        return Matcher(xgrammar.GrammarMatcher(self._compiled, override_stop_tokens=list(stop_ids) or None), self._vocab_size)


class Matcher:
    """Follows one text."""

    def __init__(self, matcher: xgrammar.GrammarMatcher, vocab_size: int) -> None:
        self._matcher = matcher
        self._last_word = np.int32((1 << vocab_size % 32) - 1 or -1)

    def accept_text(self, text: bytes) -> bool:
        """Go on by some text; false if it does not fit."""
        return not text or bool(self._matcher.accept_string(text))

    def accept(self, token: int) -> bool:
        """Go on by a token; false if it does not fit."""
        return bool(self._matcher.accept_token(token))

    def fill(self, words: Words) -> bool:
        """Set the bits of the tokens that may come next, and of no others; false if there are none."""
        self._matcher.fill_next_token_bitmask(words[np.newaxis])
        words[-1] &= self._last_word  # the library sets bits beyond the vocabulary
        return bool(words.any())


def structural_tag(grammar: Grammar) -> dict[str, Any]:
    """A grammar in xgrammar's terms."""
    body = _in_terms(grammar.structure())
    if grammar.after is not None:
        free = {"type": "tag", "begin": "", "content": {"type": "any_text"}, "end": grammar.after}
        body = {"type": "sequence", "elements": [free, {"type": "regex", "pattern": _LINE_ENDS}, body]}
    return {"type": "structural_tag", "format": body}


def _in_terms(part: Any) -> Any:
    """A structure, or a part of one, with its JSON schemas as they can be read without fault."""
    if isinstance(part, list):
        return [_in_terms(entry) for entry in part]
    if not isinstance(part, dict):
        return part
    if part.get("type") != "json_schema":
        return {word: _in_terms(value) for word, value in part.items()}
    marked = MarkedSchema(checked_schema(part.get("json_schema")))
    if not marked.any:
        return {"max_whitespace_cnt": MAX_BLANKS, **part, "json_schema": marked.schema}
    gbnf = str(xgrammar.Grammar.from_json_schema(json.dumps(marked.schema), max_whitespace_cnt=MAX_BLANKS))
    return {"type": "grammar", "grammar": marked.spelled(gbnf)}


def _message(error: Exception) -> str:
    """What the library says, without where it says it and without what was asked repeated."""
    lines = _SOURCE.sub("", str(error)).split("The JSON string", 1)[0].strip().splitlines()
    return (lines[0] if lines else "it is not valid")[:MAX_MESSAGE]
