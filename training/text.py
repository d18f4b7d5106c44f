"""Turns problems into the text that the checkpoint is trained on: the package's own chat template, then the gold continuation."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random

from jinja2.sandbox import ImmutableSandboxedEnvironment

from pointsman.bench import arithmetic, tools
from training import chat

TINY = Path(__file__).parent.parent / "pointsman" / "tiny"
END = "[e~["
MIX = {"arithmetic": 0.47, "tools": 0.49, "chat": 0.04}


@dataclass(frozen=True)
class Example:
    """A rendered prompt, ending inside the reasoning, and what must follow it."""

    prompt: str
    completion: str
    category: str


def chat_template():
    """The package's template, compiled as an engine would."""

    def refuse(message: str):
        raise ValueError(message)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.filters["tojson"] = lambda value, ensure_ascii=False: json.dumps(value, ensure_ascii=ensure_ascii)
    environment.globals["raise_exception"] = refuse
    return environment.from_string((TINY / "chat_template.jinja").read_text())


def continuation(thinking: str, reply: str, call: tuple[str, dict] | None = None) -> str:
    """What the model writes after the generation prompt."""
    return f"{thinking}\n</think>\n\n{tools.call_text(*call) if call else reply}{END}"


def examples(split: str, seed: int, mix: dict[str, float] = MIX) -> Iterator[Example]:
    """Endless examples of all kinds; a tenth of the training conversations has a system message of its own."""
    rng, template = Random(f"{split}-{seed}-mix"), chat_template()
    sums, calls, talk = arithmetic.problems(split, seed), tools.problems(split, seed), chat.talks(seed)
    kinds, weights = list(mix), list(mix.values())
    while True:
        kind = rng.choices(kinds, weights)[0]
        if kind == "chat":
            problem, offered, call, category = next(talk), None, None, "chat"
        elif kind == "arithmetic":
            problem = next(sums)
            offered, call = None, None
            category = "follow-up" if problem.follow_up else f"arithmetic-{problem.steps}"
        else:
            problem = next(calls)
            offered, call, category = problem.tools, problem.call, f"tools-{problem.kind}"
        messages = problem.messages
        if kind != "chat" and split == "train" and rng.random() < 0.1:
            messages = [{"role": "system", "content": chat.system_message(rng)[0]}, *messages]
        prompt = template.render(messages=messages, tools=offered, add_generation_prompt=True)
        yield Example(prompt, continuation(problem.thinking, problem.reply, call), category)
