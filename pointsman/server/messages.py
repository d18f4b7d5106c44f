"""The turns of a conversation: who may say what.

Fields that other servers write into an answer, and that clients therefore send back with the conversation, may be there as null.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from pointsman.server.bounds import MAX_PARTS, MAX_TOOL_CALLS, Name, too_deep
from pointsman.server.errors import ApiError


class TextPart(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A piece of a text; pieces are joined without a separator."""

    type: Literal["text"]
    text: str


Content = str | Annotated[list[TextPart], Meta(max_length=MAX_PARTS)]


class CalledFunction(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A call of the past. OpenAI has its arguments as the text of a JSON object; the object itself is understood too."""

    name: Name
    arguments: str | dict[str, Any] | None = None


class ToolCall(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    function: CalledFunction
    id: Name | None = None
    type: Literal["function"] = "function"
    index: int | None = None


class _Turn(msgspec.Struct, kw_only=True, tag_field="role", forbid_unknown_fields=True, omit_defaults=True):
    name: Name | None = None


class SystemMessage(_Turn, kw_only=True, tag="system"):
    """What the model is told to be; it comes first, because chat templates drop it elsewhere."""

    content: Content


class DeveloperMessage(_Turn, kw_only=True, tag="developer"):
    """OpenAI's later name for a system message."""

    content: Content


class UserMessage(_Turn, kw_only=True, tag="user"):
    content: Content


class AssistantMessage(_Turn, kw_only=True, tag="assistant"):
    """An earlier answer. `reasoning_content` is its thinking; what a chat template makes of that is its own affair."""

    content: Content | None = None
    reasoning_content: str | None = None
    tool_calls: Annotated[list[ToolCall], Meta(max_length=MAX_TOOL_CALLS)] | None = None
    annotations: Annotated[list[None], Meta(max_length=0)] | None = None
    audio: None = None
    function_call: None = None
    refusal: None = None


class ToolMessage(_Turn, kw_only=True, tag="tool"):
    """What a tool answered."""

    content: Content
    tool_call_id: Name | None = None


Message = SystemMessage | DeveloperMessage | UserMessage | AssistantMessage | ToolMessage


def check_messages(messages: list[Message]) -> None:
    """Raises ApiError where a message is in a place that it cannot have."""
    for index, message in enumerate(messages):
        place = f"messages[{index}]"
        role = role_of(message)
        if index and role in ("system", "developer"):
            raise ApiError(400, f"{place}.role is {role!r}; only the first message may have it", param=f"{place}.role")
        if role == "tool" and not (index and _calls_before(messages[index - 1])):
            raise ApiError(400, f"{place}.role is 'tool', but no tool was called right before it", param=f"{place}.role")
        if isinstance(message, AssistantMessage):
            for at, call in enumerate(message.tool_calls or ()):
                if too_deep(call.function.arguments):
                    param = f"{place}.tool_calls[{at}].function.arguments"
                    raise ApiError(400, f"{param} is nested too deep", param=param)


def role_of(message: Message) -> str:
    role = message.__struct_config__.tag
    assert isinstance(role, str)
    return role


def plain_messages(messages: list[Message]) -> list[dict[str, Any]]:
    """The messages as a chat template has them, with the results of tools in the order of the calls."""
    listed: list[dict[str, Any]] = [msgspec.to_builtins(message) for message in _in_call_order(messages)]
    if listed[0]["role"] == "developer":
        listed[0]["role"] = "system"
    return listed


def _calls_before(message: Message) -> bool:
    return isinstance(message, ToolMessage) or (isinstance(message, AssistantMessage) and bool(message.tool_calls))


def _in_call_order(messages: list[Message]) -> list[Message]:
    """Templates tell results apart by their place alone, while clients that run calls side by side go by their ids."""
    ordered: list[Message] = []
    order: dict[str | None, int] = {}
    results: list[ToolMessage] = []
    for message in [*messages, None]:
        if isinstance(message, ToolMessage):
            results.append(message)
            continue
        if len({result.tool_call_id for result in results} & order.keys()) == len(results):
            results.sort(key=lambda result: order[result.tool_call_id])
        ordered += results
        results = []
        if message is not None:
            ordered.append(message)
        calls = (message.tool_calls if isinstance(message, AssistantMessage) else None) or ()
        order = {call.id: index for index, call in enumerate(calls) if call.id is not None}
    return ordered
