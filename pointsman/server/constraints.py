"""From what a request says about the form of its answer to the one grammar that the engine keeps to.

    response_format, json_schema, regex, ebnf     one of them
    tool_choice required, or a tool's name        calls in the model's own form, and nothing else
    tools and one of the first                    a call, or an answer of that form

Where the prompt has opened the model's thinking, thinking is free, and what follows it is constrained.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pointsman.grammar import Grammar, call_or_answer, tool_call_grammar
from pointsman.server.errors import ApiError
from pointsman.server.formats import JsonObjectFormat, JsonSchemaFormat, ResponseFormat
from pointsman.server.protocol import ChatRequest, CompletionRequest
from pointsman.server.tools import NamedChoice


def of_chat(request: ChatRequest, tools: Sequence[Mapping[str, Any]] | None, after: str | None) -> Grammar | None:
    """The grammar of an assistant's turn, or None where it is free. Raises ApiError."""
    answer = of_completion(request, after)
    choice = request.tool_choice.function.name if isinstance(request.tool_choice, NamedChoice) else request.tool_choice or "auto"
    forced = choice != "auto"
    if not tools or (answer is None and not forced):
        return answer
    if answer is not None and forced:
        text = "tool_choice says that a tool must be called, and an answer has no other form then; leave out the form, or the tool_choice"
        raise ApiError(400, text, param="tool_choice")
    parallel = request.parallel_tool_calls is not False
    calls = _checked("tools", lambda: tool_call_grammar(tools, choice if forced else "required", parallel=parallel, after=after))
    return calls if answer is None else _checked("tools", lambda: call_or_answer(calls, answer))


def of_completion(request: ChatRequest | CompletionRequest, after: str | None = None) -> Grammar | None:
    """The grammar of an answer without calls, or None where it is free. Raises ApiError."""
    return of_answer(
        response_format=request.response_format, json_schema=request.json_schema, regex=request.regex, ebnf=request.ebnf, after=after
    )


def of_answer(
    *,
    response_format: ResponseFormat | None = None,
    json_schema: str | dict[str, Any] | None,
    regex: str | None,
    ebnf: str | None,
    after: str | None = None,
    place: str = "",
) -> Grammar | None:
    """The grammar that these fields ask for, or None. Raises ApiError; `place` is where the fields stand in the body."""
    asked: dict[str, Callable[[], Grammar]] = {}
    match response_format:
        case JsonObjectFormat():
            asked["response_format"] = lambda: Grammar.json_object(after=after)
        case JsonSchemaFormat(json_schema=named):
            asked["response_format"] = lambda: Grammar.json_schema(named.schema, after=after)
    if json_schema is not None:
        asked["json_schema"] = lambda: Grammar.json_schema(json_schema, after=after)
    if regex is not None:
        asked["regex"] = lambda: Grammar.regex(regex, after=after)
    if ebnf is not None:
        asked["ebnf"] = lambda: Grammar.ebnf(ebnf, after=after)
    if len(asked) > 1:
        raise ApiError(400, f"{' and '.join(asked)} each say what form the answer has; give one", param=place + list(asked)[1])
    return next((_checked(place + name, make) for name, make in asked.items()), None)


def _checked(param: str, make: Callable[[], Grammar]) -> Grammar:
    try:
        return make()
    except ValueError as error:
        raise ApiError(400, str(error), param=param) from None
