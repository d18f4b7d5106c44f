"""Questions about texts that need no step of the engine: tokens, tool calls, thinking."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from pointsman.server import bounds
from pointsman.server.errors import ApiError
from pointsman.server.output import Reasoning, parse_output, parse_tool_calls
from pointsman.server.prompts import ServedModel
from pointsman.server.protocol import Messages, TemplateVariables, check_conversation
from pointsman.server.tools import ToolChoice, Tools, check_tools

_TOKENS = {"$ref": "#/components/schemas/Tokens"}  # none at all is the empty text
_TOKEN_LISTS = {"anyOf": [_TOKENS, {"type": "array", "items": _TOKENS, "minItems": 1, "maxItems": bounds.MAX_PROMPTS}]}
_Texts = Annotated[list[str], Meta(min_length=1, max_length=bounds.MAX_PROMPTS)]


class TokenizeRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A text, several, or a conversation."""

    model: str | None = None
    prompt: str | _Texts | None = None
    add_special_tokens: bool | None = None
    messages: Messages | None = None
    tools: Tools | None = None
    tool_choice: ToolChoice | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: TemplateVariables | None = None


class DetokenizeRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Tokens, or several lists of them."""

    tokens: Annotated[list[Any], Meta(extra_json_schema=_TOKEN_LISTS)]
    model: str | None = None
    skip_special_tokens: bool | None = None


class ParseFunctionCallRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A text that a model has written after its thinking, and the tools that it was offered."""

    text: str
    tools: Tools
    tool_call_parser: Literal["minimax-m2"] | None = None


class SeparateReasoningRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A text that a model has written, from the start of its thinking."""

    text: str
    reasoning_parser: Reasoning | None = None


def tokenize(model: ServedModel, request: TokenizeRequest) -> dict[str, Any]:
    """The tokens that a request with this text or conversation would have. Raises ApiError."""
    model.check_name(request.model)
    if (request.prompt is None) == (request.messages is None):
        raise ApiError(400, "give prompt or messages, and not both", param="prompt" if request.prompt is None else "messages")
    tokens: list[int] | list[list[int]]
    most = max(model.info.context_length, bounds.MAX_COUNTED_TOKENS)
    if request.messages is not None:
        if request.add_special_tokens is not None:
            raise ApiError(400, "add_special_tokens is for a prompt; a chat template writes them itself", param="add_special_tokens")
        check_conversation(request)  # type: ignore[arg-type]  # messages are there
        tokens = model.prompt_of(request, most=most).ids  # type: ignore[arg-type]
        count: int | list[int] = len(tokens)
    else:
        special = request.add_special_tokens is not False
        texts = [request.prompt] if isinstance(request.prompt, str) else request.prompt or []
        encoded = [list(model.encode(text, "prompt", add_special_tokens=special, most=most)) for text in texts]
        tokens = encoded[0] if isinstance(request.prompt, str) else encoded
        count = len(encoded[0]) if isinstance(request.prompt, str) else [len(each) for each in encoded]
    return {"tokens": tokens, "count": count, "max_model_len": model.info.context_length}


def detokenize(model: ServedModel, request: DetokenizeRequest) -> dict[str, Any]:
    """The text of tokens. Raises ApiError."""
    model.check_name(request.model)
    several = bool(request.tokens) and all(isinstance(entry, list) for entry in request.tokens)
    lists: list[list[int]] = request.tokens if several else [request.tokens]
    if len(lists) > bounds.MAX_PROMPTS:
        raise ApiError(400, f"tokens has {len(lists)} lists; at most {bounds.MAX_PROMPTS} are allowed", param="tokens")
    for ids in lists:
        if not all(type(token) is int for token in ids):
            raise ApiError(400, "tokens must be token ids, or lists of token ids", param="tokens")
        model.check_ids("tokens", ids)
    texts = [model.decode(ids, request.skip_special_tokens is not False) for ids in lists]
    return {"text": texts if several else texts[0]}


def parse_function_call(model: ServedModel, request: ParseFunctionCallRequest) -> dict[str, Any]:
    """A text and the calls in it, apart. Raises ApiError."""
    check_tools(request.tools, None)
    if request.tool_call_parser is None and not model.reads_calls:
        raise ApiError(400, "give tool_call_parser: this server has none for its model", param="tool_call_parser")
    message = parse_tool_calls(request.text, request.tools)
    calls = [
        {"tool_index": index, "name": call.name, "parameters": call.arguments} for index, call in enumerate(message.tool_calls)
    ]  # fmt: skip
    return {"normal_text": message.content, "calls": calls}


def separate_reasoning(model: ServedModel, request: SeparateReasoningRequest) -> dict[str, Any]:
    """Thinking and answer, apart. Raises ApiError."""
    reasoning = request.reasoning_parser or model.reasoning
    if reasoning is None:
        raise ApiError(400, "give reasoning_parser: this server has none for its model", param="reasoning_parser")
    message = parse_output(request.text, reasoning, None)
    return {"reasoning_text": message.reasoning, "text": message.content}
