"""The tool-call problems: gold answers pass, near misses do not, and no held-out tool occurs in training."""

import json
from itertools import islice

import pytest

from pointsman.bench import tools


def drawn(split: str, seed: int, count: int) -> list[tools.ToolProblem]:
    return list(islice(tools.problems(split, seed), count))


def gold(problem: tools.ToolProblem) -> str:
    return f"{problem.thinking}\n</think>\n\n{tools.call_text(*problem.call) if problem.call else problem.reply}"


def names(problems: list[tools.ToolProblem]) -> set[str]:
    return {tool["function"]["name"] for problem in problems for tool in problem.tools}


def test_the_gold_answer_is_right():
    for problem in drawn("heldout", 3, 400):
        assert tools.check(problem, gold(problem)) == "right", gold(problem)


def test_no_tool_is_in_both_splits():
    train, heldout = names(drawn("train", 0, 3000)), names(drawn("heldout", 0, 1000))
    assert not train & heldout
    assert not any(map(tools.is_heldout, train))
    assert all(map(tools.is_heldout, heldout))


def test_the_stream_is_a_function_of_split_and_seed():
    assert drawn("heldout", 3, 50) == drawn("heldout", 3, 50)
    assert drawn("heldout", 3, 50) != drawn("heldout", 4, 50)
    with pytest.raises(ValueError, match="'test'"):
        next(tools.problems("test", 0))


def test_calls_fit_their_schema():
    """Every required argument is given, every value has the schema's type and is one of its options."""
    types = {"string": str, "integer": int, "number": (int, float), "boolean": bool}
    for problem in drawn("heldout", 8, 400):
        assert 1 <= len(problem.tools) <= 4
        if problem.call is None:
            continue
        name, arguments = problem.call
        [schema] = [tool["function"]["parameters"] for tool in problem.tools if tool["function"]["name"] == name]
        assert set(schema["required"]) <= set(arguments) <= set(schema["properties"])
        for key, value in arguments.items():
            kind = schema["properties"][key]
            assert isinstance(value, types[kind["type"]])
            assert isinstance(value, bool) == (kind["type"] == "boolean")
            assert value in kind.get("enum", [value])


def test_all_kinds_and_types_occur():
    problems = drawn("heldout", 0, 600)
    assert {problem.kind for problem in problems} == {"call", "missing", "sum", "result"}
    schemas = json.dumps([problem.tools for problem in problems])
    assert all(f'"type": "{kind}"' in schemas for kind in ("string", "integer", "number", "boolean"))
    assert '"enum"' in schemas


TOOL = {
    "type": "function",
    "function": {
        "name": "book",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string"},
                "nights": {"type": "integer"},
                "price": {"type": "number"},
                "late": {"type": "boolean"},
            },
        },
    },
}
CALL = ("book", {"city": "Oslo", "nights": 2, "price": 20, "late": True})


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        (tools.call_text(*CALL), "right"),
        (tools.call_text("book", CALL[1] | {"price": 20.0}), "right"),
        (tools.call_text("book", CALL[1] | {"city": "Bergen"}), "wrong"),
        (tools.call_text("book", {"city": "Oslo", "nights": 2, "price": 20}), "wrong"),
        (tools.call_text("book", CALL[1] | {"nights": 2.5}), "invalid"),
        (tools.call_text("book", CALL[1] | {"nights": "two"}), "invalid"),
        (tools.call_text("book", CALL[1] | {"late": "yes"}), "wrong"),
        (tools.call_text("rent", CALL[1]), "invalid"),
        (tools.call_text("book", CALL[1] | {"stars": 4}), "invalid"),
        ('<minimax:tool_call>\n<invoke name="book">', "invalid"),
        ("I have no tool for that.", "wrong"),
        (tools.call_text(*CALL) + "\n</think>\n\nDone.", "wrong"),
    ],
)
def test_name_and_all_arguments_count(text, verdict):
    problem = tools.ToolProblem(messages=[], tools=[TOOL], call=CALL, thinking="", reply="", kind="call")
    assert tools.check(problem, text) == verdict


def test_a_call_is_wrong_where_none_fits():
    problem = tools.ToolProblem(messages=[], tools=[TOOL], call=None, thinking="", reply="Sorry, I have no tool for that.", kind="missing")
    assert tools.check(problem, tools.call_text(*CALL)) == "wrong"
    assert tools.check(problem, problem.reply) == "right"
