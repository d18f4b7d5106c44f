"""The rows of docs/parsing.md as texts with their meaning; `value_cases` has those about values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pointsman.request import FinishReason
from pointsman.server.events import Message, ToolCall
from pointsman.server.output import Reasoning

PROPERTIES: dict[str, Any] = {
    "text": {"type": "string"},
    "city": {"type": "string"},
    "count": {"type": "integer"},
    "size": {"type": "number"},
    "flag": {"type": "boolean"},
    "nothing": {"type": "null"},
    "options": {"type": "object"},
    "items": {"type": "array"},
    "unit": {"enum": ["celsius", "kelvin", 5, None]},
    "mode": {"const": "fast"},
    "anything": {"description": "no type"},
    "either": {"anyOf": [{"type": "string"}, {"type": "integer"}]},
    "one": {"oneOf": [{"type": "boolean"}, {"type": "array"}]},
    "all": {"allOf": [{"type": ["string", "number"]}, {"type": ["number", "null"]}]},
    "level": {"$ref": "#/$defs/Level"},
    "tree": {"$ref": "#/$defs/Tree"},
    "lost": {"$ref": "#/$defs/Nowhere"},
    "maybe": {"type": ["string", "null"]},
    "optional": {"type": "string", "nullable": True},
    "optional_count": {"anyOf": [{"type": "integer"}, {"type": "null"}]},
    "odd": {"type": "int"},
    "clash": {"type": "string", "enum": [1, 2]},
    'a"b': {"type": "integer"},
}
DEFINITIONS = {
    "Level": {"type": "integer"},
    "Tree": {"anyOf": [{"type": "object"}, {"type": "array", "items": {"$ref": "#/$defs/Tree"}}]},
}
TOOLS = [
    {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": PROPERTIES, "$defs": DEFINITIONS}}},
    {"type": "function", "function": {"name": "g"}},
    {"type": "function", "function": {"name": "h", "parameters": {"additionalProperties": {"type": "integer"}}}},
]


@dataclass(frozen=True, kw_only=True)
class Case:
    """A text, how it is read, and what it means."""

    text: str
    message: Message
    reasoning: Reasoning | None = None
    opened: bool = True
    tools: list[dict[str, Any]] | None = None
    reason: FinishReason = FinishReason.STOP


def call(name: str, arguments: str = "{}", *, complete: bool = True) -> ToolCall:
    return ToolCall(name, arguments, complete)


def block(*calls: str) -> str:
    return "<minimax:tool_call>\n" + "\n".join(calls) + "\n</minimax:tool_call>"


def invoke(name: str, *parameters: tuple[str, str]) -> str:
    lines = "".join(f'<parameter name="{key}">{value}</parameter>\n' for key, value in parameters)
    return f'<invoke name="{name}">\n{lines}</invoke>'


def said(text: str, content: str = "", *calls: ToolCall, reason: FinishReason = FinishReason.STOP) -> Case:
    """An answer without thinking."""
    return Case(text=text, message=Message("", content, calls), tools=TOOLS, reason=reason)


def thought(
    text: str,
    reasoning: str,
    content: str = "",
    *calls: ToolCall,
    opened: bool = True,
    tools: list[dict[str, Any]] | None = TOOLS,
    reason: FinishReason = FinishReason.STOP,
) -> Case:
    return Case(text=text, message=Message(reasoning, content, calls), reasoning="minimax", opened=opened, tools=tools, reason=reason)


def cut(text: str, content: str = "", *calls: ToolCall) -> Case:
    return said(text, content, *calls, reason=FinishReason.LENGTH)


F = invoke("f")
OPEN = "<minimax:tool_call>\n"

THINKING = {
    "thinking-then-answer": [
        thought("so\n</think>\n\nyes", "so", "yes"),
        thought("\n so \n\n</think>\r\n yes\n\n", " so ", " yes\n\n", tools=None),
        thought("</think>yes", "", "yes"),
    ],
    "thinking-without-end": [
        thought("\nI wonder\n", "I wonder\n"),
        thought("half </thin", "half </thin", reason=FinishReason.LENGTH),
        thought("", ""),
    ],
    "think-at-the-start": [
        thought("<think>\nso</think>yes", "so", "yes"),
        thought("\n <think>so <think> on</think>yes", "so <think> on", "yes"),
        thought("<thin air</think>yes", "<thin air", "yes"),
        thought("<think>", ""),
    ],
    "think-closed-twice": [thought("so</think>yes\n</think>\nno", "so", "yes\n</think>\nno")],
    "think-not-opened": [
        thought(" <think>so\n</think>\nyes", "so", "yes", opened=False),
        thought("\n yes </think> <think>", "", "\n yes </think> <think>", opened=False),
        thought("<thin", "", "<thin", opened=False),
        thought(" \n", "", " \n", opened=False),
        thought(f"\n{block(F)}", "", "", call("f"), opened=False),
    ],
    "append-think": [
        Case(text="so</think>\nyes", message=Message("", "<think>so</think>\nyes"), reasoning="minimax-append-think"),
        Case(text="\n<think>so", message=Message("", "\n<think>so"), reasoning="minimax-append-think"),
        Case(text="yes", message=Message("", "yes"), reasoning="minimax-append-think", opened=False),
        Case(text=f"{block(F)}yes", message=Message("", "<think>\nyes", (call("f"),)), reasoning="minimax-append-think", tools=TOOLS),
        Case(text="", message=Message(), reasoning="minimax-append-think"),
        Case(
            text=f"so</think>\n\n{block(F)}\n",
            message=Message("", "<think>so</think>", (call("f"),)),
            reasoning="minimax-append-think",
            tools=TOOLS,
        ),
    ],
    "no-reasoning-parser": [said("<think>so</think>\nyes", "<think>so</think>\nyes")],
}

CALLS = {
    "one-call": [
        said(block(invoke("f", ("city", "Paris"), ("count", "3"))), "", call("f", '{"city": "Paris", "count": 3}')),
        thought(f"so\n</think>\n\n{block(F)}", "so", "", call("f")),
        said(
            '<minimax:tool_call><invoke name="f"><parameter name="count">3</parameter></invoke></minimax:tool_call>',
            "",
            call("f", '{"count": 3}'),
        ),
    ],
    "several-calls": [said(block(invoke("f", ("count", "1")), invoke("g")), "", call("f", '{"count": 1}'), call("g"))],
    "several-blocks": [said(f"{block(F)}\n\n{block(invoke('g'))}\n", "", call("f"), call("g"))],
    "equal-parameter-names": [
        said(block(invoke("f", ("count", "1")), invoke("f", ("count", "2"))), "", call("f", '{"count": 1}'), call("f", '{"count": 2}'))
    ],
    "repeated-parameter": [said(block(invoke("f", ("count", "1"), ("count", "2"))), "", call("f", '{"count": 1, "count": 2}'))],
    "no-parameters": [said(block(F), "", call("f")), said(block('<invoke name="g"></invoke>'), "", call("g"))],
    "unknown-tool": [said(block(invoke("nobody", ("count", "1")), F), "", call("nobody", '{"count": "1"}'), call("f"))],
    "undeclared-parameter": [
        said(block(invoke("f", ("who", "1"))), "", call("f", '{"who": "1"}')),
        said(block(invoke("g", ("who", "null"))), "", call("g", '{"who": "null"}')),
        said(block(invoke("h", ("who", "1"))), "", call("h", '{"who": 1}')),
    ],
    "no-tools-given": [
        Case(text=f"a\n{block(F)}\nb", message=Message("", f"a\n{block(F)}\nb")),
        Case(text=f"a\n{block(F)}\n", message=Message("", f"a\n{block(F)}\n"), tools=[]),
        thought(f"a\n{block(F)}</think>b", f"a\n{block(F)}", "b", tools=None),
    ],
}

PROSE = {
    "text-around-calls": [
        said(f"Let me look.\n\n{block(F)}\n\nDone.\n", "Let me look.\nDone.\n", call("f")),
        said(f"a{block(F)}b{block(F)} c \n", "a\nb\n c \n", call("f"), call("f")),
        said(f"\n{block(F)}\r\n\n", "", call("f")),
        said(f" {block(F)} b", " \n b", call("f")),
    ],
    "text-between-calls": [said(f"a\n{OPEN}{F}\n and {F} c\n</minimax:tool_call>d", "a\nand\nc\nd", call("f"), call("f"))],
    "text-inside-a-call": [
        said(block('<invoke name="f">\nhm\n<parameter name="count">1</parameter>\n</invoke>'), "hm", call("f", '{"count": 1}')),
        said(block('<invoke name="f">{"count": 1}</invoke>'), '{"count": 1}', call("f")),
        said(block('<invoke name="f"><parameters></invoke>'), "<parameters>", call("f")),
    ],
    "call-inside-thinking": [
        thought(f"so\n{block(F)}\nthen</think>\nyes", "so\nthen", "yes", call("f")),
        thought(f"so\n{block(F)}\n</think>\n{block(F)}", "so", "", call("f"), call("f")),
        thought(block(invoke("f", ("text", "</think>"))) + "</think>yes", "", "yes", call("f", '{"text": "</think>"}')),
    ],
    "call-before-the-end-of-thinking": [
        thought(f"so\n{block(F)}", "so", "", call("f")),
        thought(f"so\n{block(F)}\n\nthen", "so\nthen", "", call("f")),
    ],
    "thinking-ends-in-a-call": [
        thought('so <minimax:tool_call>\n<invoke name="f">\nno\n</think>\nyes', "so \nno", "yes", call("f", complete=False)),
        thought(f"so\n{OPEN}{F}\n</think>\nyes", "so", "yes", call("f")),
    ],
    "block-tag-in-prose": [
        said("Write <minimax:tool_call> first.", "Write <minimax:tool_call> first."),
        said("<minimax:tool_call>\n</minimax:tool_call>", "<minimax:tool_call>\n</minimax:tool_call>"),
        said("a\n<minimax:tool_call>\n\n", "a\n<minimax:tool_call>\n\n"),
        thought("<minimax:tool_call></think>a", "<minimax:tool_call>", "a"),
        said("<minimax:tool_call>" + " " * 300 + F, "<minimax:tool_call>" + " " * 300 + F),
    ],
    "call-without-a-block": [said(f"a\n{F}\n</minimax:tool_call>\n", f"a\n{F}\n</minimax:tool_call>\n")],
}

MALFORMED = {
    "call-not-closed": [
        said('<minimax:tool_call><invoke name="f"></minimax:tool_call>a', "a", call("f")),
        said('<minimax:tool_call><invoke name="f"><invoke name="g"></minimax:tool_call>', "", call("f"), call("g")),
        said(f'{OPEN}<invoke name="f"><parameter name="count">1</parameter>\n</minimax:tool_call>a', "a", call("f", '{"count": 1}')),
        said(
            f'{OPEN}<invoke name="f"><parameter name="count">1</parameter>\n{F}\n</minimax:tool_call>',
            "",
            call("f", '{"count": 1}'),
            call("f"),
        ),
        said(f'{OPEN}<invoke name="f">\n{block(invoke("g"))}', "", call("f"), call("g")),
    ],
    "block-not-closed": [
        said(f"{OPEN}{F}\n", "", call("f")),
        said(f"{OPEN}{F}\n Done. \n", "Done. \n", call("f")),
    ],
    "block-opened-twice": [said(f"{OPEN}{F}\n{OPEN}{F}\n</minimax:tool_call>", "", call("f"), call("f"))],
    "value-not-closed": [
        said(
            f'{OPEN}<invoke name="f"><parameter name="text">a</invoke>\n</minimax:tool_call>',
            "",
            call("f", '{"text": "a</invoke>\\n</minimax:tool_call>"}', complete=False),
        ),
    ],
    "call-without-a-name": [
        said(block("<invoke>\n</invoke>"), "<invoke>\n</invoke>"),
        said(
            block('<invoke name="">\n<parameter name="count">1</parameter>\n</invoke>', F),
            '<invoke name="">\n<parameter name="count">1</parameter>\n</invoke>',
            call("f"),
        ),
    ],
    "parameter-without-a-name": [
        said(block('<invoke name="f"><parameter>1</parameter></invoke>'), "", call("f", '{"": "1"}')),
        said(block('<invoke name="f"><parameter name="">1</parameter></invoke>'), "", call("f", '{"": "1"}')),
    ],
    "name-without-a-quote": [
        said(
            block('<invoke name="f>\n<parameter name="count>1</parameter><parameter name="size">2</parameter></invoke>'),
            "",
            call("f", '{"count": 1, "size": 2}'),
        ),
        said(
            block("<invoke name=f>\n<parameter name = 'count' >1</parameter><parameter size>2</parameter></invoke>"),
            "",
            call("f", '{"count": 1, "size": 2}'),
        ),
        said(f"{OPEN}<invoke name=f>", "", call("f", complete=False)),
    ],
    "name-without-an-end": [
        said(
            block('<invoke name="f"\n<parameter name="count">1</parameter>\n</invoke>'),
            '<invoke name="f"\n<parameter name="count">1</parameter>\n</invoke>',
        ),
        said(block(f'<invoke name="{"f" * 1100}">'), f'<invoke name="{"f" * 1100}">'),
    ],
    "name-with-quotes": [
        said(block(invoke("f", ('a"b', "1"), ("a>b", "1"), ("a<b", "1"))), "", call("f", '{"a\\"b": 1, "a>b": "1", "a<b": "1"}')),
    ],
}

START = f'{OPEN}<invoke name="f">\n'
ENDS = {
    "cut-in-a-string": [
        cut(f'{START}<parameter name="text">so f', "", call("f", '{"text": "so f"}', complete=False)),
        cut(
            f'{START}<parameter name="count">1</parameter>\n<parameter name="text">',
            "",
            call("f", '{"count": 1, "text": ""}', complete=False),
        ),
    ],
    "cut-in-another-value": [
        cut(f'{START}<parameter name="count">12', "", call("f", '{"count": "12"}', complete=False)),
        cut(f'{START}<parameter name="items">[1, "a', "", call("f", '{"items": "[1, \\"a"}', complete=False)),
        cut(f'{START}<parameter name="maybe">null', "", call("f", '{"maybe": "null"}', complete=False)),
        cut(f'{START}<parameter name="count">', "", call("f", '{"count": ""}', complete=False)),
    ],
    "cut-in-the-end-of-a-value": [
        cut(f'{START}<parameter name="text">so</para', "", call("f", '{"text": "so"}', complete=False)),
        cut(f'{START}<parameter name="count">1</parameter', "", call("f", '{"count": "1"}', complete=False)),
        cut(f'{START}<parameter name="count">1</parameter>', "", call("f", '{"count": 1}', complete=False)),
        cut(f'{START}<parameter name="count">1</parameter>\n</inv', "", call("f", '{"count": 1}', complete=False)),
    ],
    "cut-in-a-name": [
        cut("a\n<minimax:tool_call>", "a"),
        cut(f"a\n{OPEN}", "a"),
        cut(f'a\n{OPEN}<invoke name="get_wea', "a"),
        cut(f'{START}<parameter name="cou', "", call("f", complete=False)),
        cut(f"{START}<parameter na", "", call("f", complete=False)),
        cut(f"{OPEN}{F}\n<invoke", "", call("f")),
        thought(f"so\n{OPEN}<inv", "so", reason=FinishReason.LENGTH),
    ],
    "cut-after-a-call": [
        cut(f"{OPEN}{F}", "", call("f")),
        cut(f"{OPEN}{F}\n</minimax:tool", "", call("f")),
        cut(f"{OPEN}{F}\n</minimax:tool_call>\nSo", "So", call("f")),
    ],
    "cut-in-prose": [cut("2 <", "2 <"), cut("a\n<minimax:tool", "a\n<minimax:tool"), cut("a\n\n", "a\n\n")],
    "stop-in-a-call": [
        said(f'{START}<parameter name="text">so <', "", call("f", '{"text": "so <"}', complete=False)),
        said(f'{START}<parameter name="count">12', "", call("f", '{"count": "12"}', complete=False)),
        said(f'{START}<parameter name="count">1</parameter>\n', "", call("f", '{"count": 1}', complete=False)),
        said(f'{START}<parameter name="cou', '<parameter name="cou', call("f", complete=False)),
    ],
    "stop-in-a-name": [
        said("a\n<minimax:tool_call>\n", "a\n<minimax:tool_call>\n"),
        said(f'a\n{OPEN}<invoke name="get_wea', 'a\n<invoke name="get_wea'),
        said(f'{OPEN}{F}\n<invoke name="get_wea', '<invoke name="get_wea', call("f")),
    ],
}

PARSING_CASES: dict[str, list[Case]] = THINKING | CALLS | PROSE | MALFORMED | ENDS
