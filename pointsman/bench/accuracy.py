"""Accuracy on held-out problems that are generated here: word problems, and tool calls.

Every answer is greedy and goes through the engine like anyone's request, so the number moves when a kernel, a runner or a cache
dtype is wrong. The interval is Wilson's, which stays inside 0 and 1: with 500 questions a share of 0.95 is known to about 0.02.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pointsman.bench import arithmetic, tools
from pointsman.bench.options import AccuracyOptions
from pointsman.bench.shares import wilson
from pointsman.bench.subject import machine, settle
from pointsman.engine.llm import LLM
from pointsman.request import FinishReason, RequestOutput, SamplingParams

VERDICTS = ("right", "wrong", "invalid")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """One kind of problem.

    Attributes:
        problems: split and seed to an endless stream of problems, each with `messages`.
        check: problem and completion to a verdict.
        group: what the table breaks the accuracy down by.
        wanted: the right answer, to show beside a wrong one.
    """

    name: str
    problems: Callable[[str, int], Iterator[Any]]
    check: Callable[[Any, str], str]
    group: Callable[[Any], str]
    wanted: Callable[[Any], Any]


ARITHMETIC = Task(
    name="arithmetic",
    problems=arithmetic.problems,
    check=arithmetic.check,
    group=lambda problem: f"{problem.steps} step{'s' * (problem.steps != 1)}",
    wanted=lambda problem: problem.answer,
)
TOOLS = Task(
    name="tools",
    problems=tools.problems,
    check=tools.check,
    group=lambda problem: problem.kind,
    wanted=lambda problem: problem.call or problem.reply,
)


@dataclasses.dataclass(frozen=True)
class Graded:
    """A problem, what the model wrote, and what it is worth."""

    problem: Any
    completion: str
    verdict: str
    num_tokens: int
    truncated: bool


def eval_arithmetic(engine: dict[str, Any], options: AccuracyOptions) -> int:
    """`pointsman eval arithmetic`."""
    return _evaluate(ARITHMETIC, engine, options)


def eval_tools(engine: dict[str, Any], options: AccuracyOptions) -> int:
    """`pointsman eval tools`."""
    return _evaluate(TOOLS, engine, options)


def _evaluate(task: Task, engine: dict[str, Any], options: AccuracyOptions) -> int:
    logging.basicConfig(level=options.log_level.upper())
    if options.save is not None:
        Path(options.save).touch()  # a path that cannot be written is told before the model loads
    with contextlib.closing(LLM(**engine)) as llm:
        settle(llm.engine)
        problems = held_out(task, options.num_questions, options.seed)
        graded, seconds = answer(task, llm, problems, options.max_tokens)
        summary = summarize(task, graded, seconds) | {"seed": options.seed, "max_tokens": options.max_tokens} | machine(llm.engine)
    if options.save is not None:
        Path(options.save).write_text("".join(json.dumps(_record(task, entry)) + "\n" for entry in graded), encoding="utf-8")
    _show([entry for entry in graded if entry.verdict != "right"][: options.show], task)
    _print_table(summary)
    print(json.dumps(summary, allow_nan=False))
    return 0


def held_out(task: Task, count: int, seed: int) -> list[Any]:
    """The first problems of the held-out stream, each conversation once."""
    found: dict[str, Any] = {}
    for problem in task.problems("heldout", seed):
        found.setdefault(json.dumps([problem.messages, getattr(problem, "tools", None)]), problem)
        if len(found) == count:
            break
    return list(found.values())


def answer(task: Task, llm: LLM, problems: list[Any], max_tokens: int) -> tuple[list[Graded], float]:
    """Grade the greedy answers to problems, and the seconds it took to write them."""
    prompts = [llm.render(problem.messages, tools=getattr(problem, "tools", None)) for problem in problems]
    start = time.perf_counter()
    results = llm.generate(prompts, SamplingParams(temperature=0.0, max_tokens=max_tokens))
    seconds = time.perf_counter() - start
    return [_grade(task, problem, result) for problem, result in zip(problems, results, strict=True)], seconds


def _grade(task: Task, problem: Any, result: RequestOutput) -> Graded:
    output = result.outputs[0]
    verdict = task.check(problem, output.text)
    assert verdict in VERDICTS, verdict
    return Graded(problem, output.text, verdict, len(output.token_ids), output.finish_reason is FinishReason.LENGTH)


def summarize(task: Task, graded: list[Graded], seconds: float) -> dict[str, Any]:
    """The figures of one evaluation."""
    verdicts = Counter(entry.verdict for entry in graded)
    low, high = wilson(verdicts["right"], len(graded))
    num_tokens = sum(entry.num_tokens for entry in graded)
    groups: dict[str, list[int]] = {}
    for entry in graded:
        group = groups.setdefault(task.group(entry.problem), [0, 0])
        group[0] += entry.verdict == "right"
        group[1] += 1
    return {
        "eval": task.name,
        "num_questions": len(graded),
        "accuracy": round(verdicts["right"] / len(graded), 4),
        "accuracy_95": [round(low, 4), round(high, 4)],
        "invalid": round(verdicts["invalid"] / len(graded), 4),
        "truncated": round(sum(entry.truncated for entry in graded) / len(graded), 4),
        "latency_s": round(seconds, 3),
        "output_tokens": num_tokens,
        "output_throughput": round(num_tokens / seconds, 1),
        "groups": dict(sorted(groups.items())),
    }


def _record(task: Task, entry: Graded) -> dict[str, Any]:
    return {
        "messages": entry.problem.messages,
        "tools": getattr(entry.problem, "tools", None),
        "completion": entry.completion,
        "wanted": task.wanted(entry.problem),
        "verdict": entry.verdict,
        "num_tokens": entry.num_tokens,
        "truncated": entry.truncated,
    }


def _show(entries: list[Graded], task: Task) -> None:
    for entry in entries:
        print(f"--- {entry.verdict}")
        print("\n".join(f"{message['role']}: {message['content']}" for message in entry.problem.messages))
        print(f"wanted: {task.wanted(entry.problem)}\ngot: {entry.completion.strip()}\n")


def _print_table(summary: dict[str, Any]) -> None:
    low, high = summary["accuracy_95"]
    for group, (hits, total) in summary["groups"].items():
        print(f"  {group}: {hits} of {total}")
    print(f"Accuracy: {summary['accuracy']:.3f} (95 % interval {low:.3f} to {high:.3f}, {summary['num_questions']} questions)")
    print(f"Invalid: {summary['invalid']:.3f}")
    if summary["truncated"]:
        print(f"Truncated: {summary['truncated']:.3f}")
    print(f"Latency: {summary['latency_s']:.3f} s")
    print(f"Output throughput: {summary['output_throughput']:.1f} token/s")
