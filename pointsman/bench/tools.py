"""Requests that a model must answer with one typed tool call, or without a tool, and the check of its answer.

`problems(split, seed)` is an endless stream. A tool belongs to the held-out split if the SHA-256 of its name falls into one bucket of
eight; a problem's tools are all of its split, so that no tool of a held-out problem was ever seen in training.
"""

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from random import Random
from typing import Any

from pointsman.bench import arithmetic, toolscenes, toolvalues, toolwords

HELDOUT_BUCKETS = 8


@dataclass(frozen=True, kw_only=True)
class ToolProblem:
    """A conversation with tools, and the one right continuation: a call, or a reply without one."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]]
    call: tuple[str, dict[str, Any]] | None
    thinking: str
    reply: str
    kind: str
    answer: int | None = None


@dataclass(frozen=True)
class Tool:
    """An OpenAI function and the plain words a person would use for it."""

    verb: str
    noun: str
    parameters: tuple[toolvalues.Parameter, ...]
    function: dict[str, Any]
    scene: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return str(self.function["name"])


def is_heldout(name: str) -> bool:
    """True for the tool names that training never sees."""
    return hashlib.sha256(name.lower().encode()).digest()[0] % HELDOUT_BUCKETS == 0


def problems(split: str, seed: int) -> Iterator[ToolProblem]:
    """Endless problems of the split "train" or "heldout": calls, requests that fit no tool, and answers from a tool's result."""
    if split not in ("train", "heldout"):
        raise ValueError(f"split is {split!r}: it must be 'train' or 'heldout'")
    rng = Random(f"{split}-{seed}")
    heldout = split == "heldout"
    sums = arithmetic.problems(split, seed + 1, follow_ups=0.0)
    while True:
        kind = rng.random()
        if kind < 0.72:
            yield call_problem(rng, heldout)
        elif kind < 0.80:
            yield missing_problem(rng, heldout)
        elif kind < 0.86:
            yield sum_problem(rng, heldout, next(sums))
        else:
            yield result_problem(rng, heldout)


def draw_tool(rng: Random, heldout: bool, verb: str = "", noun: str = "") -> Tool:
    """A tool of the split; its name is a verb and a noun in one of several styles."""
    while True:
        verb_, noun_ = verb or rng.choice(toolwords.VERBS), noun or rng.choice(toolwords.NOUNS)
        parts = [*verb_.split("_"), *noun_.split("_")]
        if rng.random() < 0.25:
            parts += rng.choice(toolwords.TOOL_DETAILS).split("_")
        style = rng.random()
        if style < 0.7:
            name = "_".join(parts)
        elif style < 0.9:
            name = parts[0] + "".join(part.capitalize() for part in parts[1:])
        else:
            name = noun_ + "_" + verb_
        if is_heldout(name) == heldout:
            break
    verb_, noun_ = verb_.replace("_", " "), noun_.replace("_", " ")
    parameters = toolvalues.draw_parameters(rng)
    schema = {
        "type": "object",
        "properties": {parameter.name: parameter.schema for parameter in parameters},
        "required": [parameter.name for parameter in parameters if parameter.required],
    }
    description = rng.choice(
        ("{Verb} a {noun}.", "{Verb} the {noun}.", "{Verb} {noun}.", "Use this to {verb} a {noun}.", "A tool to {verb} the {noun}.")
    )
    description = description.format(Verb=verb_.capitalize(), verb=verb_, noun=noun_)
    return Tool(verb_, noun_, parameters, {"name": name, "description": description, "parameters": schema})


def draw_scene(rng: Random, heldout: bool) -> Tool:
    """An everyday tool of the split."""
    while True:
        names, description, parameters, requests = rng.choice(toolscenes.SCENES)
        name = rng.choice(names)
        if rng.random() < 0.3:
            name += "_" + rng.choice(toolwords.TOOL_DETAILS)
        if is_heldout(name) == heldout:
            break
    drawn = toolvalues.scene_parameters(rng, parameters)
    schema = {
        "type": "object",
        "properties": {parameter.name: parameter.schema for parameter in drawn},
        "required": [parameter.name for parameter in drawn if parameter.required],
    }
    return Tool("", names[0], drawn, {"name": name, "description": description, "parameters": schema}, requests)


def draw_tools(rng: Random, heldout: bool) -> list[Tool]:
    """One to four tools of different names; some share the verb or the noun with the first."""
    if rng.random() < 0.25:
        tools = [draw_scene(rng, heldout) for _ in range(rng.randint(1, 3))]
        return list({tool.noun: tool for tool in tools}.values())
    tools = [draw_tool(rng, heldout)]
    for _ in range(rng.choice((0, 1, 1, 2, 2, 3))):
        first, likeness = tools[0], rng.random()
        verb = first.verb.replace(" ", "_") if likeness < 0.2 else ""
        noun = first.noun.replace(" ", "_") if 0.2 <= likeness < 0.4 else ""
        tool = draw_tool(rng, heldout, verb, noun)
        if all((tool.verb, tool.noun) != (other.verb, other.noun) for other in tools):
            tools.append(tool)
    return tools


SAYINGS = {
    "get": ("get", "fetch me", "give me"),
    "find": ("find", "look for"),
    "search": ("search", "search for"),
    "create": ("create", "make"),
    "delete": ("delete", "remove for good"),
    "book": ("book",),
    "buy": ("buy", "get me"),
    "show": ("show", "show me"),
    "check": ("check",),
    "look_up": ("look up",),
    "compute": ("compute", "work out"),
    "send": ("send",),
    "stop": ("stop",),
    "update": ("update", "change"),
}
OPENINGS = (
    "",
    "",
    "",
    "Please ",
    "Can you ",
    "Could you please ",
    "I want to ",
    "I need you to ",
    "I would like to ",
    "Hey, ",
    "Now ",
    "Will you ",
)


def request(rng: Random, tool: Tool, literal: bool = False) -> tuple[str, dict[str, Any]]:
    """A request in plain words that gives every required argument and some of the optional ones; `literal` keeps to the tool's verb."""
    if tool.scene:
        return toolvalues.draw_scene_request(rng, tool.parameters, rng.choice(tool.scene))
    arguments: dict[str, Any] = {}
    tails: list[str] = []
    clauses: list[str] = []
    for parameter in tool.parameters:
        if parameter.required or rng.random() < 0.5:
            arguments[parameter.name], tail, clause = toolvalues.draw_value(rng, parameter)
            (tails if tail else clauses).append(tail or clause)
    rng.shuffle(tails)
    opening = rng.choice(OPENINGS)
    saying = tool.verb if literal else rng.choice(SAYINGS.get(tool.verb.replace(" ", "_"), (tool.verb,)))
    text = f"{opening}{saying} {rng.choice(('the', 'a', 'my', 'the'))} {tool.noun}"
    if tool.verb in ("get", "check", "show", "report", "look up", "fetch") and not literal and rng.random() < 0.3:
        opening, text = "Can ", f"What is the {tool.noun}"
    text = " ".join([text, *tails]) + (
        "?" if opening.startswith(("Can", "Could", "Will")) else rng.choice((".", ".", "")) or "." * bool(clauses)
    )
    text = " ".join([text[0].upper() + text[1:], *clauses])
    return text, arguments


def call_turns(rng: Random, tool: Tool, tools: list[Tool]) -> tuple[dict[str, Any], dict[str, Any], tuple[str, dict[str, Any]], str]:
    """A user turn, the assistant turn that calls the tool, the call and the reasoning."""
    text, arguments = request(rng, tool, literal=any(tool.noun == other.noun for other in tools if other is not tool))
    thinking = f"The request fits {tool.name}."
    calls = [{"id": "call_1", "type": "function", "function": {"name": tool.name, "arguments": arguments}}]
    turn = {"role": "assistant", "content": "", "reasoning_content": thinking, "tool_calls": calls}
    return {"role": "user", "content": text}, turn, (tool.name, arguments), thinking


def offered(rng: Random, tools: list[Tool]) -> list[dict[str, Any]]:
    shuffled = rng.sample(tools, len(tools))
    return [{"type": "function", "function": tool.function} for tool in shuffled]


def call_problem(rng: Random, heldout: bool) -> ToolProblem:
    """One of the tools fits; now and then an earlier call of another tool comes before."""
    tools = draw_tools(rng, heldout)
    user, _, call, thinking = call_turns(rng, tools[0], tools)
    messages = [user]
    if rng.random() < 0.1:
        before, turn, _, _ = call_turns(rng, tools[-1], tools)
        result, reply = toolvalues.draw_result(rng)
        messages = [
            before,
            turn,
            {"role": "tool", "content": result, "tool_call_id": "call_1"},
            {"role": "assistant", "content": reply},
            user,
        ]
    return ToolProblem(messages=messages, tools=offered(rng, tools), call=call, thinking=thinking, reply="", kind="call")


def missing_problem(rng: Random, heldout: bool) -> ToolProblem:
    """The request is for a tool that is not there, nor one that could be meant."""
    tools = draw_tools(rng, heldout)
    topics = {topic for tool in tools for topic in topics_of(tool)}
    while True:
        wanted = draw_scene(rng, heldout) if rng.random() < 0.35 else draw_tool(rng, heldout)
        if not topics & topics_of(wanted) and not (tools[0].scene and not wanted.scene):
            break
    text, _ = request(rng, wanted)
    return ToolProblem(
        messages=[{"role": "user", "content": text}],
        tools=offered(rng, tools),
        call=None,
        kind="missing",
        thinking="None of the tools fits this request.",
        reply="Sorry, I have no tool for that.",
    )


NEAR = {
    "forecast": "weather",
    "alarm": "timer",
    "reminder": "timer",
    "email": "message",
    "contact": "message",
    "web": "search",
    "track": "package",
    "time": "timer",
    "event": "timer",
}


def topics_of(tool: Tool) -> set[str]:
    """What a tool is about, coarsely: words of its noun, near ones taken together."""
    topics = set(tool.noun.replace("_", " ").split()) - {"get", "set", "send", "create", "book", "make"}
    return {NEAR.get(topic, topic) for topic in topics}


def sum_problem(rng: Random, heldout: bool, problem: arithmetic.ArithmeticProblem) -> ToolProblem:
    """A word problem that needs no tool."""
    return ToolProblem(
        messages=problem.messages,
        tools=offered(rng, draw_tools(rng, heldout)),
        call=None,
        kind="sum",
        thinking=problem.thinking,
        reply=problem.reply,
        answer=problem.answer,
    )


def result_problem(rng: Random, heldout: bool) -> ToolProblem:
    """The tool has answered, and the model says what it found."""
    tools = draw_tools(rng, heldout)
    user, turn, _, _ = call_turns(rng, tools[0], tools)
    result, reply = toolvalues.draw_result(rng)
    messages = [user, turn, {"role": "tool", "content": result, "tool_call_id": "call_1"}]
    return ToolProblem(
        messages=messages, tools=offered(rng, tools), call=None, thinking="The tool has answered.", reply=reply, kind="result"
    )


def call_text(name: str, arguments: dict[str, Any]) -> str:
    """The call as the model must write it."""
    lines = "".join(
        f'<parameter name="{key}">{value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)}</parameter>\n'
        for key, value in arguments.items()
    )
    return f'<minimax:tool_call>\n<invoke name="{name}">\n{lines}</invoke>\n</minimax:tool_call>'


def read_call(text: str, tools: list[dict[str, Any]]) -> tuple[str, dict[str, Any]] | None:
    """The first call in a text, arguments converted by the tool's schema; None if there is none. ValueError if it is malformed."""
    block = re.search(r'<invoke name="([^"]+)">(.*?)</invoke>', text, re.DOTALL)
    if block is None:
        if "<minimax:tool_call>" in text:
            raise ValueError("a tool call without a complete <invoke>")
        return None
    schemas = {tool["function"]["name"]: tool["function"]["parameters"]["properties"] for tool in tools}
    if block[1] not in schemas:
        raise ValueError(f"{block[1]!r} is none of the tools")
    arguments = {}
    for name, value in re.findall(r'<parameter name="([^"]+)">(.*?)</parameter>', block[2], re.DOTALL):
        if name not in schemas[block[1]]:
            raise ValueError(f"{block[1]} has no parameter {name!r}")
        arguments[name] = toolvalues.convert(value, schemas[block[1]][name]["type"])
    return block[1], arguments


def check(problem: ToolProblem, completion: str) -> str:
    """ "right", "wrong" or "invalid" (a malformed call): the name and every argument with its type, or no call and the right words."""
    text = completion.rpartition("</think>")[2]
    try:
        found = read_call(text, problem.tools)
    except ValueError:
        return "invalid"
    if problem.call is not None or found is not None:
        return "right" if found is not None and problem.call is not None and same_call(found, problem.call) else "wrong"
    if problem.answer is not None:
        numbers = re.findall(r"-?\d[\d,]*(?:\.\d+)?", text)
        return "right" if numbers and float(numbers[-1].rstrip(",").replace(",", "")) == problem.answer else "wrong"
    if problem.kind == "missing":
        return "right" if text.strip() else "wrong"
    return "right" if " ".join(problem.reply.split()) in " ".join(text.split()) else "wrong"


def same_call(found: tuple[str, dict[str, Any]], wanted: tuple[str, dict[str, Any]]) -> bool:
    """Equal names, keys and values; true is not 1, but 20.0 is 20 where the schema says number."""

    def typed(arguments: dict[str, Any]) -> dict[str, Any]:
        return {key: (isinstance(value, bool), isinstance(value, str), value) for key, value in arguments.items()}

    return found[0] == wanted[0] and typed(found[1]) == typed(wanted[1])
