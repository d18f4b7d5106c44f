"""Arguments: at any time the beginning of one JSON object, and no later than they can be known."""

from __future__ import annotations

import json
from typing import Any

import pydantic_core
from hypothesis import given, settings
from hypothesis import strategies as st

from pointsman.server.parameter_types import Parameters, json_value
from pointsman.server.tool_calls import Arguments, Toolbox

PROPERTIES = {
    "text": {"type": "string"},
    "maybe": {"type": ["string", "null"]},
    "count": {"type": "integer"},
    "items": {"type": "array"},
    "word": {"enum": ["a", "b"]},
}
PARAMETERS = Parameters({"type": "object", "properties": PROPERTIES})
TEXTS = st.lists(st.sampled_from(["n", "ul", "l", "null", "5", "[", "]", '"', "\\", "\n", "é", "\x00", " a"]), max_size=5)


@settings(deadline=None, max_examples=500)
@given(values=st.lists(st.tuples(st.sampled_from([*PROPERTIES, "other", 'qu"ote', ""]), TEXTS), max_size=5), ended=st.booleans())
def test_pieces_are_the_beginning_of_one_object(values: list[tuple[str, list[str]]], ended: bool) -> None:
    arguments, written, expected = Arguments(PARAMETERS), "", []
    for name, texts in values:
        written += arguments.open(name)
        for text in texts:
            written += arguments.add(text)
            pydantic_core.from_json(written, allow_partial="trailing-strings")
        if ended or name != values[-1][0]:
            written += arguments.close()
            expected.append((name, json.loads(json_value("".join(texts), PARAMETERS.type_of(name)))))
        else:
            break
    else:
        assert json.loads(written + arguments.end(), object_pairs_hook=list) == expected
        return
    assert json.loads(written + arguments.end(), object_pairs_hook=list) == [*expected, (name, "".join(texts))]


def pieces(name: str, *texts: str) -> list[str]:
    arguments = Arguments(PARAMETERS)
    return [arguments.open(name), *(arguments.add(text) for text in texts), arguments.close(), arguments.end()]


def test_what_is_sent_when() -> None:
    assert pieces("text", "a\n", '"b') == ['{"text": "', "a\\n", '\\"b', '"', "}"]
    assert pieces("maybe", "null", "\n") == ['{"maybe": ', "", '"null\\n', '"', "}"]
    assert pieces("maybe", "n", "ul", "lify", "!") == ['{"maybe": ', "", "", '"nullify', "!", '"', "}"]
    assert pieces("maybe", "nul", "l") == ['{"maybe": ', "", "", "null", "}"]
    assert pieces("count", "1", "2") == ['{"count": ', "", "", "12", "}"]
    assert pieces("word", "a", "b") == ['{"word": ', "", "", '"ab"', "}"]
    assert pieces("other", "1") == ['{"other": "', "1", '"', "}"]
    assert Arguments(PARAMETERS).end() == "{}"


def test_tools_in_every_form_and_none() -> None:
    function = {"name": "f", "parameters": {"properties": PROPERTIES}}
    odd: list[dict[str, Any]] = [{"type": "function", "function": function}, {**function, "name": "g"}, {}, {"function": None}, {"name": 5}]
    toolbox = Toolbox(odd)
    for name in ("f", "g"):
        assert toolbox.parameters(name).type_of("count").kinds == {"integer"}
    assert toolbox.parameters("h").type_of("count").kinds == {"string"}
