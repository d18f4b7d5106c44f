"""Few-shot GSM8K as serving engines report it, so that figures can be compared.

The first problems of the file are the shots. A prompt is plain text, without a chat template: `Question: ...\nAnswer: ...`, the shots
before, the question to answer last. Of an answer the last run of digits counts, commas left out, no sign, no decimals; an answer
without one is invalid. Other engines leave the shots among the problems that are answered, which makes those known
(`--shots-in-set`); here they are left out.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from pointsman.bench.machine import here
from pointsman.bench.options import Gsm8kOptions
from pointsman.bench.serving.backends import BACKENDS, Wish
from pointsman.bench.serving.http import HttpClient, Origin
from pointsman.bench.serving.load import NO_TOKENS, Load
from pointsman.bench.serving.query import Query
from pointsman.bench.serving.run import first_model
from pointsman.bench.shares import wilson
from pointsman.bench.subject import machine, settle
from pointsman.engine.llm import LLM
from pointsman.request import SamplingParams

STOP = ("Question", "Assistant:", "<|separator|>")
NUMBER = re.compile(r"\d+")
VERDICTS = ("right", "wrong", "invalid")


class Problem(msgspec.Struct, frozen=True):
    """A line of the file; the answer ends with `#### ` and the number."""

    question: str
    answer: str

    @property
    def label(self) -> int:
        """Raises ValueError where the answer has no number."""
        number = last_number(self.answer)
        if number is None:
            raise ValueError(f"the answer to {self.question[:60]!r} has no number")
        return number


@dataclass(frozen=True)
class Reply:
    """What a model wrote; an error in its place counts as invalid."""

    text: str
    num_tokens: int
    error: str | None = None


def eval_gsm8k(engine: dict[str, Any], options: Gsm8kOptions) -> int:
    """`pointsman eval gsm8k`; 1 where a request failed."""
    logging.basicConfig(level=options.log_level.upper())
    if options.save is not None:
        Path(options.save).touch()
    is_remote = options.base_url is not None or options.host is not None
    if is_remote and engine:
        raise ValueError(f"{', '.join(engine)} {'is' if len(engine) == 1 else 'are'} for an engine here; the server has its own")
    shots, problems = choose(read(options.data_path), options.num_shots, options.num_questions, options.shots_in_set)
    prompts = [prompt(shots, problem) for problem in problems]
    if is_remote:
        replies, seconds, source = asyncio.run(_ask(prompts, options))
    else:
        replies, seconds, source = _generate(prompts, engine, options)
    summary = summarize(problems, replies, seconds) | {"num_shots": options.num_shots, "shots_in_set": options.shots_in_set} | source
    if options.save is not None:
        lines = [_record(*each) for each in zip(problems, replies, strict=True)]
        Path(options.save).write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    low, high = summary["accuracy_95"]
    print(f"Accuracy: {summary['accuracy']:.3f} (95 % interval {low:.3f} to {high:.3f}, {len(problems)} questions)")
    print(f"Invalid: {summary['invalid']:.3f}")
    print(f"Latency: {summary['latency_s']:.3f} s")
    print(f"Output throughput: {summary['output_throughput']:.3f} token/s")
    failed = [reply.error for reply in replies if reply.error is not None]
    if failed:
        print(f"{len(failed)} requests failed, the first with: {failed[0]}")
    print(json.dumps(summary, allow_nan=False))
    return 1 if failed else 0


def read(path: str) -> list[Problem]:
    """The problems of a file of JSON lines. Raises ValueError that names the line at fault."""
    problems = []
    for number, line in enumerate(Path(path).read_bytes().splitlines(), 1):
        if not line.strip():
            continue
        try:
            problem = msgspec.json.decode(line, type=Problem)
            _ = problem.label
        except (msgspec.MsgspecError, ValueError) as error:
            raise ValueError(f"line {number} of {path} is no problem of GSM8K: {error}") from None
        problems.append(problem)
    return problems


def choose(problems: Sequence[Problem], num_shots: int, num_questions: int, shots_in_set: bool) -> tuple[list[Problem], list[Problem]]:
    """The shots, and the problems to answer: those that follow, or with `shots_in_set` all from the first on. Raises ValueError."""
    shots = list(problems[:num_shots])
    rest = list(problems if shots_in_set else problems[num_shots:])
    if len(shots) < num_shots or len(rest) < num_questions:
        left = f"{num_shots} shots leave {len(rest)}"
        raise ValueError(f"the file has {len(problems)} problems; {left}, and --num-questions is {num_questions}")
    return shots, rest[:num_questions]


def prompt(shots: Sequence[Problem], problem: Problem) -> str:
    """The text to continue."""
    return "".join(f"Question: {shot.question}\nAnswer: {shot.answer}\n\n" for shot in shots) + f"Question: {problem.question}\nAnswer:"


def last_number(text: str) -> int | None:
    """The last run of digits, commas left out."""
    found = NUMBER.findall(text.replace(",", ""))
    return int(found[-1]) if found else None


def verdict(problem: Problem, reply: Reply) -> str:
    """One of VERDICTS."""
    number = None if reply.error is not None else last_number(reply.text)
    if number is None:
        return "invalid"
    return "right" if number == problem.label else "wrong"


def summarize(problems: Sequence[Problem], replies: Sequence[Reply], seconds: float) -> dict[str, Any]:
    """The figures that are printed."""
    verdicts = [verdict(*each) for each in zip(problems, replies, strict=True)]
    total, num_tokens = len(problems), sum(reply.num_tokens for reply in replies)
    low, high = wilson(verdicts.count("right"), total)
    return {
        "eval": "gsm8k",
        "num_questions": total,
        "accuracy": round(verdicts.count("right") / total, 4),
        "accuracy_95": [round(low, 4), round(high, 4)],
        "invalid": round(verdicts.count("invalid") / total, 4),
        "failed": sum(reply.error is not None for reply in replies),
        "latency_s": round(seconds, 3),
        "output_tokens": num_tokens,
        "output_throughput": round(num_tokens / seconds, 3),
    }


async def _ask(prompts: Sequence[str], options: Gsm8kOptions) -> tuple[list[Reply], float, dict[str, Any]]:
    """Answers of a server."""
    origin = Origin.parse(options.base_url) if options.base_url else Origin.of(options.host or "", options.port)
    client = HttpClient(origin, {} if options.api_key is None else {"Authorization": f"Bearer {options.api_key}"})
    try:
        model = await first_model(client)
        load = Load(client=client, backend=BACKENDS["openai"], wish=Wish(model=model), max_concurrency=options.parallel)
        queries = [Query(text=text, input_len=None, output_len=options.max_tokens, stop=STOP) for text in prompts]
        run = await load.run(queries, [0.0] * len(queries))
    finally:
        client.close()
    replies = [Reply(outcome.text, outcome.output_len, _fault(outcome.error)) for outcome in run.outcomes]
    return replies, run.duration_s, {"server": str(origin), "model": model, "parallel": options.parallel} | here()


def _fault(error: str | None) -> str | None:
    """An answer that stopped before its first token is an answer, if an empty one."""
    return None if error == NO_TOKENS else error


def _generate(prompts: Sequence[str], engine: dict[str, Any], options: Gsm8kOptions) -> tuple[list[Reply], float, dict[str, Any]]:
    """Answers of an engine here."""
    with contextlib.closing(LLM(**{"max_running_requests": options.parallel} | engine)) as llm:
        settle(llm.engine)
        params = SamplingParams(temperature=0.0, max_tokens=options.max_tokens, stop=STOP)
        start = time.perf_counter()
        results = llm.generate(list(prompts), params)
        seconds = time.perf_counter() - start
        replies = [Reply(result.outputs[0].text, len(result.outputs[0].token_ids)) for result in results]
        return replies, seconds, machine(llm.engine) | {"parallel": options.parallel}


def _record(problem: Problem, reply: Reply) -> dict[str, Any]:
    return {
        "question": problem.question,
        "completion": reply.text,
        "wanted": problem.label,
        "verdict": verdict(problem, reply),
        "num_tokens": reply.num_tokens,
        "error": reply.error,
    }
