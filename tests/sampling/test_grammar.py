"""xgrammar behind its door: what its masks let through, walked at random, is read with other programs' eyes.

The vocabulary is bytes and some longer tokens, so that masks are tried within characters and across borders.
"""

from __future__ import annotations

import json
import random
import re
import urllib.parse
from typing import Any

import numpy as np
import pytest

from pointsman.grammar import Grammar, tool_call_grammar
from pointsman.sampling.grammar import Compiled, Compiler, Refused
from pointsman.sampling.grammar_messages import num_words
from tests.grammar.schemas import random_schema
from tests.grammar.validation import fits

EOS = 256
PIECES = ['": "', '", "', '"}', '{"', '[{"', "true", "null", "12", "  ", "\n  ", "ü", 'é"']
PIECES += ["</think>", "</think>x", "</think>\n", "think>12", "</parameter>\n", "<parameter"]
VOCABULARY = [bytes([byte]) for byte in range(256)] + [b""] + [piece.encode() for piece in PIECES]
_CLOSING = frozenset(b'",]}<')
PADDED = len(VOCABULARY) + 40


@pytest.fixture(scope="module")
def compiler() -> Compiler:
    return Compiler(VOCABULARY, PADDED, [EOS])


def allowed(words: np.ndarray[Any, np.dtype[np.int32]]) -> list[int]:
    found: list[int] = np.unpackbits(words.view(np.uint8), bitorder="little").nonzero()[0].tolist()
    assert all(token < len(VOCABULARY) for token in found), "tokens that the tokenizer does not have are never allowed"
    return found


def walk(compiled: Compiled, rng: random.Random, begun: str = "", limit: int = 300) -> str | None:
    """A text that ended of itself; None where it was cut. There is always a token to go on with."""
    matcher = compiled.matcher((EOS,))
    assert matcher.accept_text(begun.encode())
    words = np.zeros(num_words(PADDED), np.int32)
    text = b""
    for _ in range(limit):
        assert matcher.fill(words), f"nothing can follow {text!r}"
        tokens = allowed(words)
        if EOS in tokens and (len(tokens) == 1 or rng.random() < 0.5):
            return text.decode(errors="replace")
        structural = [token for token in tokens if token in _CLOSING]
        token = rng.choice(structural) if structural and rng.random() < 0.35 else rng.choice([token for token in tokens if token != EOS])
        assert matcher.accept(token)
        text += VOCABULARY[token]
    return None


def test_whatever_ends_fits_its_schema(compiler: Compiler) -> None:
    rng = random.Random(7)
    ended = 0
    for _ in range(150):
        schema = random_schema(rng)
        try:
            compiled = compiler.compile(Grammar.json_schema(schema))
        except ValueError:
            continue
        for _ in range(6):
            text = walk(compiled, rng)
            if text is not None:
                ended += 1
                assert fits(schema, json.loads(text)), (schema, text)
    assert ended > 600


PATTERNS = [
    *(r"^[\s\S]{1,3}$", '^"$', '^a"b|c$', r"^\\$", r"^\n$", r"^a\nb", '^"+$', r"^(a|\")$", r"^[\w.+-]+@[\w-]+\.[a-z]{2,}$"),
    *(r"^[^\"\\]*$", "^$", "", r"^\u00e9\x41\u{1F600}$", "^a*?b$", r"^[\d\-x]{2}$", "^(?:a|b|(?<n>c)){3}$", r"\$$", "^.{0,4}$"),
    *(r"^[^a-z]{2}$", "x|^y", "|a", r"^[\b\t]$", r"^\W\D\S$"),
]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_pattern_is_found_in_its_strings(compiler: Compiler, pattern: str) -> None:
    compiled = compiler.compile(Grammar.json_schema({"type": "string", "pattern": pattern}))
    oracle = pattern.replace("(?<n>", "(?P<n>").replace(r"\u{1F600}", "😀").replace("$", r"\Z").replace(r"\\Z", r"\$")
    rng = random.Random(3)
    texts = [walk(compiled, rng) for _ in range(40)]
    assert any(texts)
    for text in filter(None, texts):
        assert re.search(oracle, json.loads(text), re.ASCII), text


@pytest.mark.parametrize(("least", "most"), [(0, 0), (0, 3), (2, 2), (5, 40), (1, 1_000_000)])
def test_lengths_are_of_characters_and_every_character_can_be_written(compiler: Compiler, least: int, most: int) -> None:
    compiled = compiler.compile(Grammar.json_schema({"type": "string", "minLength": least, "maxLength": most}))
    for value in ["", "é", "😀a", 'q"', "\\\n", "\x01\x1f", "/x/", "a" * 5, "b" * 6, "\u007f"]:
        matcher = compiled.matcher((EOS,))
        fitted = matcher.accept_text(json.dumps(value, ensure_ascii=False).encode()) and matcher.accept(EOS)
        assert fitted == (least <= len(value) <= most), value
    for raw in ['"\n"', '"\t"', '"\x00"', '"\\x"', '"\\ud800"']:
        assert not (compiled.matcher((EOS,)).accept_text(raw.encode()) and least <= 1), raw


FORMATS = {
    "date": r"\d{4}-\d\d-\d\d",
    "date-time": r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?(Z|[+-]\d\d:\d\d)",
    "uuid": "[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}",
    "ipv4": r"\d{1,3}(\.\d{1,3}){3}",
    "email": "[^@]+@.+",
}


@pytest.mark.parametrize("name", [*FORMATS, "time", "duration", "hostname", "ipv6", "uri"])
def test_formats_are_json_strings_of_their_form(compiler: Compiler, name: str) -> None:
    compiled = compiler.compile(Grammar.json_schema({"type": "string", "format": name}))
    rng = random.Random(5)
    for text in filter(None, (walk(compiled, rng) for _ in range(40))):
        value = json.loads(text)
        assert re.fullmatch(FORMATS.get(name, ".+"), value)
        assert name != "uri" or urllib.parse.urlsplit(value).scheme


TOOL = {
    "name": "f",
    "strict": True,
    "parameters": {
        "type": "object",
        "$defs": {
            "mood": {"enum": ["so so", "good", 3]},
            "point": {"type": "object", "properties": {"x": {"type": "number"}}, "required": ["x"]},
        },
        "properties": {
            "free": {"type": "string"},
            "short": {"type": "string", "maxLength": 3},
            "code": {"type": ["string", "null"], "pattern": "^[a-c]{2}$"},
            "mood": {"$ref": "#/$defs/mood"},
            "point": {"$ref": "#/$defs/point"},
            "list": {"type": "array", "items": {"type": "string"}, "maxItems": 2},
            "flag": {"type": "boolean"},
            "any": {},
        },
        "required": ["free", "short", "code", "mood", "point", "list"],
    },
}
VALUES = {
    "free": r"[\s\S]*",
    "short": "[^<]{0,3}",
    "code": "[a-c]{2}|null",
    "mood": "so so|good|3",
    "point": r"\{[\s\S]*\}",
    "list": r"\[[\s\S]*\]",
    "flag": "true|false",
    "any": r"[\s\S]*",
}
CALL = re.compile(
    '<minimax:tool_call>\n((<invoke name="f">\n'
    + "".join(
        f'(<parameter name="{name}">({form})</parameter>\n){"" if name in TOOL["parameters"]["required"] else "?"}'  # type: ignore[index]
        for name, form in VALUES.items()
    )
    + '</invoke>\n)|(<invoke name="g">\n</invoke>\n))+</minimax:tool_call>'
)


@pytest.mark.parametrize("choice", ["required", "f"])
def test_calls_have_the_models_own_form(compiler: Compiler, choice: str) -> None:
    compiled = compiler.compile(tool_call_grammar([TOOL, {"name": "g"}], choice, parallel=False))
    rng = random.Random(2)
    texts = [text for text in (walk(compiled, rng, limit=900) for _ in range(60)) if text is not None]
    assert len(texts) > 10
    for text in texts:
        assert CALL.fullmatch(text), text
        for name in ("point", "list", "flag"):
            for value in re.findall(f'<parameter name="{name}">([\\s\\S]*?)</parameter>\n', text):
                json.loads(value)


def test_what_a_call_may_be(compiler: Compiler) -> None:
    compiled = compiler.compile(tool_call_grammar([TOOL, {"name": "g"}], "required"))
    values = {"free": 'a <b> "c"\n</param', "short": "x", "code": "null", "mood": "so so", "point": '{"x": 1}', "list": '["</param"]'}
    call = (
        '<invoke name="f">\n' + "".join(f'<parameter name="{name}">{value}</parameter>\n' for name, value in values.items()) + "</invoke>\n"
    )
    for text, fit in [
        (call, True),
        (call + call + '<invoke name="g">\n</invoke>\n', True),
        ("", False),
        (call.replace("so so", "so"), False),
        (call.replace('"</param"', '"</parameter>"'), False),
        ('<invoke name="h">\n</invoke>\n', False),
        (call.replace('<parameter name="short">x</parameter>\n', ""), False),
    ]:
        matcher = compiled.matcher((EOS,))
        whole = f"<minimax:tool_call>\n{text}</minimax:tool_call>"
        assert (matcher.accept_text(whole.encode()) and matcher.accept(EOS)) == fit, text


def test_after_is_part_of_what_is_matched(compiler: Compiler) -> None:
    """From a beginning of the mark on: tokens that complete it and go on are allowed where what they go on with fits."""
    compiled = compiler.compile(Grammar.regex("12[0-9]", after="</think>"))
    words = np.zeros(num_words(PADDED), np.int32)
    matcher = compiled.matcher((EOS,))
    assert matcher.accept_text(b"</") and matcher.fill(words)
    crossing = VOCABULARY.index(b"think>12")
    assert crossing in allowed(words) and EOS not in allowed(words)
    assert matcher.accept(crossing) and matcher.fill(words)
    assert [VOCABULARY[token] for token in allowed(words)] == [b"%d" % digit for digit in range(10)]
    other = compiler.compile(Grammar.regex("x", after="</think>")).matcher((EOS,))
    assert other.accept_text(b"</") and other.fill(words) and crossing not in allowed(words)
    assert compiler.crossing("</think>", compiled) == [VOCABULARY.index(b"</think>x")] and compiler.crossing(None, compiled) == []


def test_stop_tokens_are_allowed_when_the_text_is_complete_and_only_then(compiler: Compiler) -> None:
    matcher = compiler.compile(Grammar.regex("a{2,3}")).matcher((EOS, ord("z")))
    words = np.zeros(num_words(PADDED), np.int32)
    seen = []
    for _ in range(4):
        matcher.fill(words)
        seen.append(set(allowed(words)))
        matcher.accept(ord("a"))
    assert seen == [{ord("a")}, {ord("a")}, {ord("a"), EOS, ord("z")}, {EOS, ord("z")}]


@pytest.mark.parametrize(
    ("grammar", "reason"),
    [
        (Grammar.regex("(a"), "The parenthesis is not closed"),
        (Grammar.regex(r"(a)\1"), "Backreference"),
        (Grammar.regex(r"[^\s\S]"), "no text fits it"),
        (Grammar.ebnf("root ::= root"), "no text fits it"),
        (Grammar.ebnf("x ::= y"), "not defined|not found"),
        (Grammar.json_schema({"$ref": "#"}), "no text fits it"),
        (Grammar.json_schema({"$ref": "#/$defs/a"}), "Cannot find field"),
        (Grammar.json_schema({"type": "integer", "minimum": 3, "maximum": 1}), "minimum greater than maximum"),
        (Grammar("json_schema", "{"), "cannot be used"),
        (Grammar("json_schema", '{"properties": 5}'), "must be an object of schemas"),
        (Grammar("structural", '{"type": "json_schema", "json_schema": {"not": {}}}'), "has 'not'"),
        (Grammar("structural", "[]"), "cannot be used"),
        (Grammar("structural", '{"type": "tag"}'), "cannot be used"),
        (Grammar.regex(r"[^\s\S]", after="</think>"), "no text fits it"),
    ],
)
def test_what_is_refused(compiler: Compiler, grammar: Grammar, reason: str) -> None:
    with pytest.raises(Refused, match=reason) as refused:
        compiler.compile(grammar)
    assert "/cpp/" not in str(refused.value) and len(str(refused.value)) < 500
