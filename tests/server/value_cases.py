"""The rows of docs/parsing.md that are about values: one parameter each of the tool f."""

from __future__ import annotations

import json

from tests.server.parsing_cases import Case, block, call, invoke, said

MARKUP = 'if a < b && x["k"] == \'v\': {\n\t"<b>&amp;</b>" } </invoke>\n</minimax:tool_call> </think> <parameter name="text">'
NESTED = json.dumps({"a": [1, 2.50, {"b": None}], "c": "</parameter"})


def value(name: str, text: str, json_text: str) -> Case:
    """One parameter of the tool f."""
    return said(block(invoke("f", (name, text))), "", call("f", f"{{{json.dumps(name)}: {json_text}}}"))


STRINGS = {
    "value-with-markup": [value("text", MARKUP, json.dumps(MARKUP))],
    "value-with-its-own-end": [
        value("text", "a</parameter> b</parameter>\nc</parameter", '"a</parameter> b</parameter>\\nc</parameter"'),
        value("text", "</parameter></parameter>", '"</parameter></parameter>"'),
        said(block(invoke("f", ("text", "a</parameter>\n</invoke>b"))), "b</parameter>\n</invoke>", call("f", '{"text": "a"}')),
        value("text", "a</parameter>" + " " * 300, json.dumps("a</parameter>" + " " * 300)),
    ],
    "value-with-blanks": [value("text", "\n a\t\r\n\n", '"\\n a\\t\\r\\n\\n"'), value("text", " ", '" "')],
    "empty-value": [value("text", "", '""'), value("count", "", '""'), value("anything", "", '""'), value("maybe", "", '""')],
    "unicode-value": [value("text", "naïve 東京 🚂\u2028\x00\x1f\x7f", '"naïve 東京 🚂\u2028\\u0000\\u001f\x7f"')],
    "null-like-words": [value("text", word, json.dumps(word)) for word in ("null", "None", "nil", "true", "5", '"a"', "{}", "NaN")],
}

TYPES = {
    "string": [value("city", "Paris", '"Paris"'), value("city", '"Paris"', '"\\"Paris\\""')],
    "integer": [value("count", "-12", "-12"), value("count", " 7\n", "7"), value("count", "9" * 40, "9" * 40)],
    "number": [value("size", "2.50", "2.50"), value("size", "-3", "-3"), value("size", "1e-7", "1e-7")],
    "boolean": [value("flag", "true", "true"), value("flag", "\nfalse ", "false")],
    "null": [value("nothing", "null", "null")],
    "object": [value("options", NESTED, NESTED), value("options", "\n{ }\n", "{ }")],
    "array": [value("items", "[1, [true], {}]", "[1, [true], {}]")],
    "enum": [
        value("unit", "kelvin", '"kelvin"'),
        value("unit", "\nkelvin\n", '"kelvin"'),
        value("unit", "5", "5"),
        value("unit", "null", "null"),
        value("unit", " newton ", '" newton "'),
        value("mode", "fast", '"fast"'),
    ],
    "missing-type": [
        value("anything", "5", "5"),
        value("anything", "[1]", "[1]"),
        value("anything", "true", "true"),
        value("anything", "True", '"True"'),
        value("anything", "null", "null"),
        value("anything", " a ", '" a "'),
        value("anything", "[1", '"[1"'),
        value("lost", "5", "5"),
    ],
    "union": [
        value("either", "5", "5"),
        value("either", "five", '"five"'),
        value("either", "5.0", '"5.0"'),
        value("one", "[]", "[]"),
        value("one", "False", "false"),
        value("all", "5.5", "5.5"),
        value("all", "null", '"null"'),
        value("all", "a", '"a"'),
    ],
    "reference": [value("level", "5", "5"), value("tree", "[[]]", "[[]]"), value("tree", "5", '"5"')],
    "nullable": [
        value("maybe", "null", "null"),
        value("maybe", "nul", '"nul"'),
        value("maybe", "nullify", '"nullify"'),
        value("maybe", "None", '"None"'),
        value("maybe", " null", '" null"'),
        value("optional", "null", "null"),
        value("optional", "no", '"no"'),
        value("optional_count", "null", "null"),
        value("optional_count", "5", "5"),
    ],
    "unknown-type": [value("odd", "5", '"5"'), value("clash", "1", '"1"')],
    "slips": [
        value("flag", "True", "true"),
        value("flag", "FALSE", "false"),
        value("optional_count", "None", "null"),
        value("count", "5.0", "5"),
        value("count", "1e3", "1000"),
    ],
    "does-not-fit": [
        value("count", "five", '"five"'),
        value("count", "5.5", '"5.5"'),
        value("count", "007", '"007"'),
        value("flag", "1", '"1"'),
        value("options", "[1]", '"[1]"'),
        value("options", "{'a': 1}", "\"{'a': 1}\""),
        value("items", "[1,]", '"[1,]"'),
        value("nothing", " 0 ", '" 0 "'),
        value("size", "٣", '"٣"'),
    ],
    "not-finite": [
        value("size", "NaN", '"NaN"'),
        value("size", "-Infinity", '"-Infinity"'),
        value("size", "1e999", '"1e999"'),
        value("count", "1e999", '"1e999"'),
        value("count", "9" * 400, f'"{"9" * 400}"'),
        value("items", "[1, NaN]", '"[1, NaN]"'),
        value("items", f"[{'9' * 400}]", f'"[{"9" * 400}]"'),
        value("options", '{"a": -1e999}', '"{\\"a\\": -1e999}"'),
        value("anything", "Infinity", '"Infinity"'),
    ],
    "too-deep": [
        value("items", "[" * 128 + "]" * 128, "[" * 128 + "]" * 128),
        value("items", "[" * 129 + "]" * 129, f'"{"[" * 129 + "]" * 129}"'),
        value("items", '["[[', '"[\\"[["'),
    ],
}

VALUE_CASES: dict[str, list[Case]] = STRINGS | TYPES
