"""The tools that a request offers, and what it says about calling them.

A tool is kept as the client wrote it, to the order of its keys, because that is what the chat template prints and the model reads.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from pointsman.server.bounds import MAX_TOOLS, FunctionName, too_deep
from pointsman.server.errors import ApiError
from pointsman.server.reading import explain


class Function(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """`parameters` is the JSON schema of an object."""

    name: FunctionName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    function: Function
    type: Literal["function"] = "function"


class FunctionOfChoice(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    name: FunctionName


class NamedChoice(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """This tool must be called."""

    type: Literal["function"]
    function: FunctionOfChoice


ToolChoice = Literal["none", "auto", "required"] | NamedChoice
Tools = Annotated[
    list[dict[str, Any]], Meta(max_length=MAX_TOOLS, extra_json_schema={"items": {"$ref": "#/components/schemas/Tool"}})
]  # fmt: skip


def check_tools(tools: list[dict[str, Any]] | None, choice: ToolChoice | None) -> None:
    """Raises ApiError where a tool is none, or where the choice asks for one that is not there."""
    names = [_check_tool(f"tools[{index}]", tool) for index, tool in enumerate(tools or ())]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ApiError(400, f"tools has {twice!r} twice; names must differ", param="tools")
    if isinstance(choice, NamedChoice) and choice.function.name not in names:
        raise ApiError(400, f"tool_choice names {choice.function.name!r}, which is not among the tools", param="tool_choice")
    if choice == "required" and not names:
        raise ApiError(400, "tool_choice is 'required', but there are no tools", param="tool_choice")


def _check_tool(place: str, tool: dict[str, Any]) -> str:
    try:
        name = msgspec.convert(tool, Tool).function.name
    except msgspec.ValidationError as error:
        path, message = explain(str(error), tool, Tool)
        param = f"{place}.{path}" if path else place
        raise ApiError(400, f"{place}.{message}" if path else f"{place}: {message}", param=param) from None
    if too_deep(tool):
        raise ApiError(400, f"{place} is nested too deep", param=place)
    return name
