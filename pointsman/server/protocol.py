"""What clients may ask, in OpenAI's words, and the shape of every error.

A body is read in two steps: JSON to plain values, then plain values to one of the classes below. Between the two, each name at the
top is looked up, so that a field that is misspelt, or that other servers have and this one does not, is refused by its name and
never ignored. A value that changes nothing, such as an empty list of tools, is no reason to refuse.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, TypeVar

import msgspec

from pointsman.config import nearest
from pointsman.request import MAX_CHOICES, MAX_LOGPROBS, SamplingParams

MAX_BODY_BYTES = 16 << 20
MAX_MESSAGES = 8192
MAX_PROMPTS = 1024
MAX_ANSWERS = 1024
MAX_DEPTH = 16
MAX_SALT = 256
MAX_PRIORITY = 1 << 31
MAX_TEMPLATE_VARIABLES = 64
COMPLETION_TOKENS = 16
TEMPLATE_ARGUMENTS = {"self", "messages", "tools", "add_generation_prompt", "continue_final_message"}

# Fields of OpenAI and of other servers that are not supported, with the values that change nothing.
NO_EFFECT: dict[str, tuple[Any, ...]] = {
    "audio": (None,),
    "best_of": (None, 1),
    "custom_logit_processor": (None,),
    "documents": (None, []),
    "ebnf": (None, ""),
    "function_call": (None, "none", "auto"),
    "functions": (None, []),
    "guided_choice": (None,),
    "guided_grammar": (None,),
    "guided_json": (None,),
    "guided_regex": (None,),
    "json_schema": (None,),
    "lora_path": (None,),
    "metadata": (None, {}),
    "modalities": (None, ["text"]),
    "parallel_tool_calls": (None, True, False),
    "prediction": (None,),
    "prompt_cache_key": (None,),
    "reasoning_effort": (None,),
    "regex": (None, ""),
    "replay_routed_experts": (None,),
    "response_format": (None, {"type": "text"}),
    "return_hidden_states": (None, False),
    "return_routed_experts": (None, False),
    "return_token_ids": (None, False),
    "rid": (None,),
    "routed_experts_format": (None,),
    "routed_experts_start": (None,),
    "safety_identifier": (None,),
    "service_tier": (None, "auto", "default"),
    "store": (None, False),
    "stream_reasoning": (None, True),
    "structural_tag": (None,),
    "suffix": (None, ""),
    "tool_choice": (None, "none", "auto"),
    "tools": (None, []),
    "use_beam_search": (None, False),
    "verbosity": (None, "medium"),
    "web_search_options": (None,),
}


class ApiError(Exception):
    """An answer that is an error.

    Attributes:
        status: of HTTP.
        param: the field at fault.
        code: for programs to tell errors apart.
    """

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code

    def body(self) -> dict[str, Any]:
        """The error in OpenAI's shape."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


class StreamOptions(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    include_usage: bool | None = None


class TextPart(msgspec.Struct, kw_only=True, tag_field="type", tag="text", forbid_unknown_fields=True):
    text: str


class Message(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """One turn. `reasoning_content` is an assistant's earlier thinking; what a chat template makes of it is its own affair."""

    role: str
    content: str | list[TextPart] | None = None
    name: str | None = None
    reasoning_content: str | None = None


class Fields(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """What chat and completions share. None is "not given"."""

    model: str | None = None
    max_tokens: int | None = None
    min_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    n: int | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    include_stop_str_in_output: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    priority: int | None = None
    cache_salt: str | None = None

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)


class ChatRequest(Fields, kw_only=True, forbid_unknown_fields=True):
    messages: list[Message]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    continue_final_message: bool | None = None
    add_generation_prompt: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    separate_reasoning: bool | None = None


class CompletionRequest(Fields, kw_only=True, forbid_unknown_fields=True):
    prompt: str | list[Any]
    echo: bool | None = None
    logprobs: int | None = None

    def prompts(self) -> list[str | list[int]]:
        """The prompts, each a text or token ids. Raises ApiError where the list is neither of texts nor of ids nor of lists of ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if _are(self.prompt, int):
            return [self.prompt]
        if len(self.prompt) > MAX_PROMPTS:
            raise ApiError(400, f"prompt has {len(self.prompt)} entries; at most {MAX_PROMPTS} are allowed", param="prompt")
        if _are(self.prompt, str) or (all(isinstance(entry, list) and _are(entry, int) for entry in self.prompt) and self.prompt):
            return self.prompt
        raise ApiError(400, "prompt must be a text, token ids, or a list of texts or of token ids, and not empty", param="prompt")


Body = TypeVar("Body", ChatRequest, CompletionRequest)


def parse(data: bytes, form: type[Body]) -> Body:
    """A request out of a body. Raises ApiError, which names what is wrong."""
    try:
        plain = msgspec.json.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ApiError(400, f"the body is not valid JSON: {error}") from None
    except RecursionError:
        raise ApiError(400, "the body is not valid JSON: it is nested too deep") from None
    if not isinstance(plain, dict):
        raise ApiError(400, "the body must be a JSON object")
    fields = {name: value for name, value in plain.items() if not _without_effect(name, value, form)}
    try:
        request = msgspec.convert(fields, form)
    except msgspec.ValidationError as error:
        raise ApiError(400, str(error), param=_at(str(error))) from None
    _check_shared(request)
    if isinstance(request, ChatRequest):
        _check_chat(request)
    return request


def _without_effect(name: str, value: Any, form: type[Body]) -> bool:
    """Whether a field is one that is not supported, with a value that changes nothing. Raises ApiError for any other unknown one."""
    known = form.__struct_fields__
    if name in known:
        return False
    if name not in NO_EFFECT:
        guess = nearest(name, known)
        raise ApiError(400, f"unknown field {name[:80]!r}{guess}", param=name[:80], code="unknown_parameter")
    if not any(type(value) is type(same) and value == same for same in NO_EFFECT[name]):
        raise ApiError(400, f"{name} is not supported by this server", param=name, code="unsupported_parameter")
    return True


def _check_shared(request: Fields) -> None:
    if request.stream_options is not None and not request.stream:
        raise ApiError(400, "stream_options is only allowed with stream true", param="stream_options")
    if abs(request.priority or 0) > MAX_PRIORITY:
        raise ApiError(400, f"priority is {request.priority}; it must be from {-MAX_PRIORITY} to {MAX_PRIORITY}", param="priority")
    if len(request.cache_salt or "") > MAX_SALT:
        raise ApiError(
            400, f"cache_salt has {len(request.cache_salt or '')} characters; at most {MAX_SALT} are allowed", param="cache_salt"
        )
    if request.n is not None and not 1 <= request.n <= MAX_CHOICES:
        raise ApiError(400, f"n is {request.n}; it must be from 1 to {MAX_CHOICES}", param="n")


def _check_chat(request: ChatRequest) -> None:
    if not 1 <= len(request.messages) <= MAX_MESSAGES:
        raise ApiError(400, f"messages has {len(request.messages)} entries; it must have 1 to {MAX_MESSAGES}", param="messages")
    for index, message in enumerate(request.messages):
        _check_message(index, message)
    if request.top_logprobs and not request.logprobs:
        raise ApiError(400, "top_logprobs needs logprobs true", param="top_logprobs")
    if not 0 <= (request.top_logprobs or 0) <= MAX_LOGPROBS:
        raise ApiError(400, f"top_logprobs is {request.top_logprobs}; it must be from 0 to {MAX_LOGPROBS}", param="top_logprobs")
    if request.max_tokens is not None and request.max_completion_tokens not in (None, request.max_tokens):
        raise ApiError(400, "max_tokens and max_completion_tokens differ; give one of them", param="max_completion_tokens")
    last = request.messages[-1].role
    if request.continue_final_message and last != "assistant":
        raise ApiError(400, f"continue_final_message needs a last message of the assistant, not of role {last!r}", param="messages")
    if request.add_generation_prompt is not None and request.add_generation_prompt == bool(request.continue_final_message):
        raise ApiError(400, "add_generation_prompt must be the opposite of continue_final_message", param="add_generation_prompt")
    variables = request.chat_template_kwargs or {}
    if taken := TEMPLATE_ARGUMENTS & variables.keys():
        text = f"chat_template_kwargs has {min(taken)!r}, which cannot be set as a variable of the chat template"
        raise ApiError(400, text, param="chat_template_kwargs")
    if len(variables) > MAX_TEMPLATE_VARIABLES or not _shallow(variables, MAX_DEPTH):
        text = f"chat_template_kwargs may have {MAX_TEMPLATE_VARIABLES} entries, nested {MAX_DEPTH} deep"
        raise ApiError(400, text, param="chat_template_kwargs")


def _check_message(index: int, message: Message) -> None:
    """A role that there is; what the model is told to be comes first, because chat templates drop it elsewhere."""
    place = f"messages[{index}]"
    if message.role == "tool":
        raise ApiError(400, f"{place}.role is 'tool'; tools are not supported by this server", param=f"{place}.role")
    if message.role not in ("system", "developer", "user", "assistant"):
        raise ApiError(400, f"{place}.role is {message.role[:80]!r}; it must be system, user or assistant", param=f"{place}.role")
    if message.role in ("system", "developer") and index:
        raise ApiError(400, f"{place}.role is {message.role!r}; only the first message may have it", param=f"{place}.role")
    if message.content is None and message.role != "assistant":
        raise ApiError(400, f"{place}.content is missing", param=f"{place}.content")


def sampling_of(request: ChatRequest | CompletionRequest, defaults: dict[str, int | float]) -> SamplingParams:
    """How to sample, with the checkpoint's advice where the request says nothing. Raises ApiError for a value out of range."""
    names = [name for name in SamplingParams.__dataclass_fields__ if name in Fields.__struct_fields__ and name != "max_tokens"]
    given = {name: getattr(request, name) for name in names}
    values: dict[str, Any] = defaults | {name: value for name, value in given.items() if value is not None}
    values["logit_bias"] = {_token_id(token): bias for token, bias in (request.logit_bias or {}).items()}
    values["max_tokens"] = request.max_tokens
    if isinstance(request, ChatRequest):
        if request.max_tokens is None:
            values["max_tokens"] = request.max_completion_tokens
        values["logprobs"] = (request.top_logprobs or 0) if request.logprobs else None
    else:
        if request.max_tokens is None:
            values["max_tokens"] = max(COMPLETION_TOKENS, request.min_tokens or 0)
        values["logprobs"] = request.logprobs
        values["prompt_logprobs"] = request.logprobs if request.echo else None
    try:
        return SamplingParams(**values)
    except ValueError as error:
        name = str(error).split(" ", 1)[0].split("[", 1)[0]
        raise ApiError(400, str(error), param=name if name in request.__struct_fields__ else None) from None


def _token_id(text: str) -> int:
    if not text.isascii() or not text.isdigit() or len(text) > 10:
        raise ApiError(400, f"logit_bias has the key {text[:80]!r}; keys must be token ids", param="logit_bias")
    return int(text)


def _are(entries: Sequence[Any], kind: type) -> bool:
    """Whether a list has entries, all of this type and none of a type derived from it: True is no number."""
    return bool(entries) and all(type(entry) is kind for entry in entries)


def _shallow(value: Any, depth: int) -> bool:
    """Whether a JSON value is nested at most this deep."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return depth >= 0 and all(_shallow(entry, depth - 1) for entry in inner)


def _at(message: str) -> str | None:
    """The place that a message of msgspec names, as a path."""
    found = re.search(r"at `\$\.?([^`]*)`", message)
    return found[1] if found and found[1] else None
