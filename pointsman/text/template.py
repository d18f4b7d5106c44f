"""Chat messages to the text of a prompt, by the checkpoint's own Jinja template.

A template is a program that came with the weights, so it runs in Jinja's immutable sandbox: it reaches no private attribute, no
module and no file, and cannot change what it is given. Bounded besides: `range` (100,000 numbers a call, the sandbox's own limit),
the results of `*` and `**`, recursion, and the length of the rendered text. Not bounded: the time of loops within loops, and
widths in string formatting; a template is therefore read from the checkpoint's folder only, never from a client.

Functions and filters are those that transformers gives to templates. `strftime_now` tells the local time, so a template that uses it
renders another prompt tomorrow; `clock` fixes that.

Content in parts (`{"type": "text"}`) is joined without a separator, as MiniMax's template does by itself, and arguments of tool
calls, which the API has as JSON text, become objects: templates walk through them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

MAX_RENDERED = 1 << 24
MAX_PRODUCT = 1 << 20
MAX_POWER_BITS = 1 << 12

Message = Mapping[str, Any]

# Stands at the end of the message to continue while the template runs: what comes after it is what the template adds.
# Letters only, so that no filter splits or escapes it.
_CONTINUE = "PointsmanContinuesTheMessageHere"


class ChatTemplate:
    """A compiled template; `special_tokens` are variables in it.

    Raises:
        ValueError: the source is not a template.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str] | None = None, clock: Callable[[], datetime] = datetime.now) -> None:
        environment = _Sandbox(trim_blocks=True, lstrip_blocks=True, autoescape=False, extensions=[_Generation, "jinja2.ext.loopcontrols"])
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = lambda form: clock().strftime(form)
        try:
            self._template = environment.from_string(source)
        except (jinja2.TemplateError, RecursionError) as error:
            raise ValueError(f"the chat template cannot be compiled: {error}") from error
        self.source = source
        self._special_tokens = dict(special_tokens or {})
        arguments = {"messages", "tools", "add_generation_prompt", "continue_final_message"}
        self._reserved = arguments | set(environment.globals) | set(self._special_tokens)

    def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        **kwargs: Any,
    ) -> str:
        """The prompt of a conversation, special tokens in it as text.

        Args:
            messages: each with a `role`; `content` is a text, None, or a list of text parts.
            tools: descriptions of functions, as the API has them.
            add_generation_prompt: end with what opens the assistant's turn.
            continue_final_message: end inside the last message, which is the assistant's, in place of the generation prompt.
            kwargs: further variables of the template.

        Raises:
            ValueError: a message is malformed, or the template failed or refused; the message has the reason.
        """
        taken = sorted(self._reserved & kwargs.keys())
        if taken:
            raise ValueError(f"{taken[0]!r} cannot be set as a variable of the chat template")
        prepared = [prepare(index, message) for index, message in enumerate(messages)]
        if continue_final_message:
            _mark_end(prepared)
        variables = self._special_tokens | kwargs
        prompt = self._run(
            variables
            | {"messages": prepared, "tools": tools, "add_generation_prompt": add_generation_prompt and not continue_final_message}
        )
        if not continue_final_message:
            return prompt
        before, *after = prompt.split(_CONTINUE)
        if len(after) != 1:
            raise ValueError("the last message cannot be continued: the chat template does not put its content into the prompt as it is")
        return before

    def _run(self, variables: dict[str, Any]) -> str:
        pieces, length = [], 0
        try:
            for piece in self._template.generate(variables):
                pieces.append(piece)
                length += len(piece)
                if length > MAX_RENDERED:
                    raise ValueError(f"it renders more than {MAX_RENDERED} characters")
        except (jinja2.TemplateError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError) as error:
            # The template is foreign code: all that it can raise is the fault of the messages or of the template.
            raise ValueError(f"the chat template failed: {error}") from error
        return "".join(pieces)


class _Sandbox(ImmutableSandboxedEnvironment):
    """Jinja's immutable sandbox, with bounds on what two small numbers can make large."""

    intercepted_binops = frozenset({"*", "**"})

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "**" and isinstance(left, int) and isinstance(right, int):
            size, limit = left.bit_length() * right, MAX_POWER_BITS
        elif operator == "*":
            size, limit = _times(left, right), MAX_PRODUCT
        else:
            size, limit = 0, 0
        if size > limit:
            raise jinja2.exceptions.SecurityError(f"the result of {operator!r} would be too large")
        return super().call_binop(context, operator, left, right)


def _times(left: Any, right: Any) -> int:
    """The length of left * right where one of them is a sequence, else its bits."""
    if isinstance(left, int) and isinstance(right, int):
        return left.bit_length() + right.bit_length()
    for sequence, count in ((left, right), (right, left)):
        if isinstance(sequence, (str, bytes, list, tuple)) and isinstance(count, int):
            return len(sequence) * count
    return 0


class _Generation(Extension):
    """`{% generation %}` marks the assistant's words for training; here it only shows what is inside."""

    tags = {"generation"}  # noqa: RUF012 (the attribute's type is Jinja's)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """As transformers has it: Jinja's own filter escapes HTML and sorts keys."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.exceptions.TemplateRuntimeError(message)


def prepare(index: int, message: Message) -> dict[str, Any]:
    """A copy of a message with content as one text and arguments of tool calls as objects; of such a copy, the same again."""
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise ValueError(f"messages[{index}] must be an object with a role")
    prepared = dict(message)
    content = prepared.get("content")
    if isinstance(content, list):
        prepared["content"] = "".join(_part_text(f"messages[{index}].content[{at}]", part) for at, part in enumerate(content))
    elif content is not None and not isinstance(content, str):
        raise ValueError(f"messages[{index}].content must be a text or a list of parts, not {type(content).__name__}")
    calls = prepared.get("tool_calls")
    if calls is not None:
        if not isinstance(calls, list):
            raise ValueError(f"messages[{index}].tool_calls must be a list")
        prepared["tool_calls"] = [_prepare_call(f"messages[{index}].tool_calls[{at}]", call) for at, call in enumerate(calls)]
    return prepared


def _part_text(name: str, part: Any) -> str:
    if not isinstance(part, Mapping) or part.get("type") != "text":
        kind = part.get("type") if isinstance(part, Mapping) else part
        raise ValueError(f"{name} is of type {kind!r:.80}; only parts of type 'text' are supported")
    text = part.get("text")
    if not isinstance(text, str):
        raise ValueError(f"{name}.text must be a text")
    return text


def _prepare_call(name: str, call: Any) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise ValueError(f"{name} must be an object with a function that has a name")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments) if arguments else {}
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{name}.function.arguments of {function['name']!r:.80} is not JSON: {error}") from error
    if arguments is None:
        arguments = {}
    if not isinstance(arguments, Mapping):
        raise ValueError(f"{name}.function.arguments of {function['name']!r:.80} must be an object")
    return {**call, "function": {**function, "arguments": arguments}}


def _mark_end(messages: list[dict[str, Any]]) -> None:
    """Put the mark at the end of the last message, which must be one that can be continued."""
    last = messages[-1] if messages else {}
    if last.get("role") != "assistant":
        raise ValueError("continue_final_message needs a last message of role 'assistant'")
    if last.get("tool_calls"):
        raise ValueError("the last message cannot be continued: it ends with tool calls")
    last["content"] = (last.get("content") or "") + _CONTINUE
