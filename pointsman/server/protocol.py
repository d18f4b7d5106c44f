"""What clients may ask in OpenAI's words, with SGLang's words for what OpenAI has not.

Every field has a meaning here or is refused by its name (`reading`); its bounds are its type (`bounds`). None is "not given".
"""

from __future__ import annotations

from typing import Annotated, Any, Protocol

import msgspec
from msgspec import Meta

from pointsman.server import bounds
from pointsman.server.errors import ApiError
from pointsman.server.formats import GrammarText, ResponseFormat
from pointsman.server.messages import AssistantMessage, Message, check_messages, role_of
from pointsman.server.routing import Record, Records, RoutingFields
from pointsman.server.tools import ToolChoice, Tools, check_tools

TEMPLATE_ARGUMENTS = {"self", "messages", "tools", "add_generation_prompt", "continue_final_message", "most"}
_TOKENS = {"$ref": "#/components/schemas/PromptTokens"}
TOKEN_LISTS = {"anyOf": [_TOKENS, {"type": "array", "items": _TOKENS, "minItems": 1, "maxItems": bounds.MAX_PROMPTS}]}
_TEXTS = {"type": "array", "items": {"type": "string"}, "minItems": 1, "maxItems": bounds.MAX_PROMPTS}
PROMPT = {"anyOf": [_TEXTS, *TOKEN_LISTS["anyOf"]]}


class StreamOptions(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    include_usage: bool | None = None


class Fields(RoutingFields, kw_only=True, forbid_unknown_fields=True):
    """What chat and completions share. `user` is accepted for whoever has it, and kept nowhere."""

    model: str | None = None
    max_tokens: bounds.TokenCount | None = None
    min_tokens: bounds.TokenCount | None = None
    temperature: bounds.Temperature | None = None
    top_p: bounds.TopP | None = None
    top_k: bounds.TopK | None = None
    min_p: bounds.MinP | None = None
    repetition_penalty: bounds.RepetitionPenalty | None = None
    presence_penalty: bounds.Penalty | None = None
    frequency_penalty: bounds.Penalty | None = None
    logit_bias: bounds.LogitBias | None = None
    n: bounds.Choices | None = None
    seed: bounds.Seed | None = None
    stop: bounds.Stops | None = None
    stop_token_ids: bounds.StopTokens | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    include_stop_str_in_output: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    rid: bounds.RequestName | None = None
    priority: bounds.Priority | None = None
    cache_salt: bounds.Salt | None = None
    return_token_ids: bool | None = None
    response_format: ResponseFormat | None = None
    json_schema: str | dict[str, Any] | None = None
    regex: GrammarText | None = None
    ebnf: GrammarText | None = None

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)


Messages = Annotated[list[Message], Meta(min_length=1, max_length=bounds.MAX_MESSAGES)]
TemplateVariables = Annotated[dict[str, Any], Meta(max_length=bounds.MAX_TEMPLATE_VARIABLES)]


class Conversation(Protocol):
    """What a chat template turns into a prompt: a part of several requests."""

    messages: Messages
    tools: Tools | None
    tool_choice: ToolChoice | None
    continue_final_message: bool | None
    chat_template_kwargs: TemplateVariables | None


def offered(request: Conversation) -> list[dict[str, Any]] | None:
    """The tools that the model is told of: with `tool_choice` none there are none."""
    return request.tools if request.tools and request.tool_choice != "none" else None


def check_conversation(request: Conversation) -> None:
    """Raises ApiError for what the types cannot say."""
    check_messages(request.messages)
    check_tools(request.tools, request.tool_choice)
    if request.continue_final_message and not isinstance(request.messages[-1], AssistantMessage):
        role = role_of(request.messages[-1])
        raise ApiError(400, f"continue_final_message needs a last message of the assistant, not of role {role!r}", param="messages")
    variables = request.chat_template_kwargs or {}
    if taken := TEMPLATE_ARGUMENTS & variables.keys():
        text = f"chat_template_kwargs has {min(taken)!r}, which cannot be set as a variable of the chat template"
        raise ApiError(400, text, param="chat_template_kwargs")
    if bounds.too_deep(variables):
        raise ApiError(400, "chat_template_kwargs is nested too deep", param="chat_template_kwargs")


class ChatRequest(Fields, kw_only=True, forbid_unknown_fields=True):
    messages: Messages
    tools: Tools | None = None
    tool_choice: ToolChoice | None = None
    continue_final_message: bool | None = None
    add_generation_prompt: bool | None = None
    chat_template_kwargs: TemplateVariables | None = None
    max_completion_tokens: bounds.TokenCount | None = None
    logprobs: bool | None = None
    top_logprobs: bounds.Top | None = None
    parallel_tool_calls: bool | None = None
    separate_reasoning: bool | None = None
    stream_reasoning: bool | None = None
    replay_routed_experts: Record | None = None

    def check(self) -> None:
        """Raises ApiError for what the types cannot say."""
        check_conversation(self)
        check_shared(self)
        for name in ("return_routed_experts", "replay_routed_experts"):
            if self.tools and self.parallel_tool_calls is False and getattr(self, name):
                text = f"parallel_tool_calls false ends a turn before its routing is known; leave it out, or {name}"
                raise ApiError(400, text, param="parallel_tool_calls")
        if self.top_logprobs and not self.logprobs:
            raise ApiError(400, "top_logprobs needs logprobs true", param="top_logprobs")
        if self.max_tokens is not None and self.max_completion_tokens not in (None, self.max_tokens):
            raise ApiError(400, "max_tokens and max_completion_tokens differ; give one of them", param="max_completion_tokens")
        if self.add_generation_prompt is not None and self.add_generation_prompt == bool(self.continue_final_message):
            raise ApiError(400, "add_generation_prompt must be the opposite of continue_final_message", param="add_generation_prompt")


class CompletionRequest(Fields, kw_only=True, forbid_unknown_fields=True):
    prompt: str | Annotated[list[Any], Meta(extra_json_schema=PROMPT)]
    echo: bool | None = None
    logprobs: bounds.Top | None = None
    replay_routed_experts: Record | Records | None = None

    def check(self) -> None:
        """Raises ApiError for what the types cannot say."""
        check_shared(self)

    def prompts(self) -> list[str | list[int]]:
        """The prompts, each a text or token ids. Raises ApiError where the list is neither of texts nor of ids nor of lists of ids."""
        return prompts_of("prompt", self.prompt)


class AbortRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Which requests are to end."""

    rid: bounds.RequestName | None = None
    abort_all: bool | None = None


class FlushRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Nothing to say."""


def check_shared(request: Fields) -> None:
    """Raises ApiError for what the types cannot say of the fields that both have."""
    if request.stream_options is not None and not request.stream:
        raise ApiError(400, "stream_options is only allowed with stream true", param="stream_options")


def prompts_of(name: str, value: str | list[Any]) -> list[str | list[int]]:
    """Prompts out of a field that may hold one or several. Raises ApiError where it holds something else."""
    if isinstance(value, str):
        return [value]
    if _are(value, int):
        return [value]
    if len(value) > bounds.MAX_PROMPTS:
        raise ApiError(400, f"{name} has {len(value)} entries; at most {bounds.MAX_PROMPTS} are allowed", param=name)
    if _are(value, str) or (all(isinstance(entry, list) and _are(entry, int) for entry in value) and value):
        return value
    raise ApiError(400, f"{name} must be a text, token ids, or a list of texts or of token ids, and not empty", param=name)


def _are(entries: list[Any], kind: type) -> bool:
    """Whether a list has entries, all of this type and none of a type derived from it: True is no number."""
    return bool(entries) and all(type(entry) is kind for entry in entries)
