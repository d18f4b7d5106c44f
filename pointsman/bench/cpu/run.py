"""`pointsman bench cpu`: rounds over all contenders, the check of their answers, the table."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.metadata
import importlib.util
import json
import logging
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec

from pointsman import tiny
from pointsman.bench import accuracy
from pointsman.bench.cpu.gguf_file import write_gguf
from pointsman.bench.cpu.workers import MAKERS, MARK, Prompts, Task
from pointsman.bench.machine import here, peak_memory_mb
from pointsman.bench.options import CpuOptions
from pointsman.bench.serving.backends import BACKENDS, Wish
from pointsman.bench.serving.http import HttpClient, Origin
from pointsman.bench.serving.load import Load
from pointsman.bench.serving.metrics import percentile
from pointsman.bench.serving.query import Outcome, Query
from pointsman.bench.start_up import free_port, serve_flags
from pointsman.models.folder import locate
from pointsman.text import Tokenizer, chat_prompt

HTTP = ("pointsman http", "llama.cpp f16 http", "llama.cpp q8_0 http")
CONTENDERS = (*MAKERS, *HTTP)
NEEDS = {"transformers": ("transformers",), "llama.cpp": ("xllamacpp", "gguf")}
# What is to be reached, by batch size, against llama.cpp's best of the same kind.
TARGETS = {"pointsman": {1: 1.2, 8: 1.4, 32: 1.8}, "pointsman http": {1: 1.0, 32: 1.5}}
NUM_QUESTIONS = 8
ANSWER_LEN = 64
READY_SECONDS = 120.0


def run(engine: dict[str, Any], options: CpuOptions) -> int:
    """`pointsman bench cpu`; 1 where our answers are not those of Hugging Face's model."""
    logging.basicConfig(level=options.log_level.upper())
    names = options.contender or CONTENDERS
    _refuse(names)
    folder = locate(engine.pop("model", None) or str(tiny.path()))
    tokenizer = Tokenizer.load(folder)
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory() as scratch:
        if any(name.startswith("llama.cpp") for name in names):
            for kind in ("f16", "q8_0"):
                write_gguf(folder, Path(scratch) / f"{kind}.gguf", kind.upper())
        for turn in range(options.num_iters):
            for name in names:
                print(f"round {turn + 1} of {options.num_iters}: {name}", file=sys.stderr, flush=True)
                task = _task(name, folder, tokenizer, engine, options, turn, Path(scratch))
                found[name].append(_measure_http(name, task, scratch) if name in HTTP else _measure(name, task, scratch))
    rows = {name: summarize(results, options.input_len) for name, results in found.items()}
    agreement = {name: agreements(results[0], found) for name, results in found.items() if "answers" in results[0]}
    summary = {
        "bench": "cpu",
        "input_len": options.input_len,
        "output_len": options.output_len,
        "num_iters": options.num_iters,
        "threads": options.threads,
        "rows": rows,
        "same_tokens": agreement,
        "ratios": ratios(rows),
        "versions": {name: importlib.metadata.version(name) for name in ("transformers", "xllamacpp") if importlib.util.find_spec(name)},
    }
    if agreement.get("pointsman", 1.0) < 1.0 and "transformers" in names:
        share = f"{100 * agreement['pointsman']:.1f} %"
        print(f"pointsman bench cpu: {share} of our greedy tokens are those of Hugging Face's model; no speed is reported", file=sys.stderr)
        return 1
    _print(summary)
    print(json.dumps(summary | here(), allow_nan=False))
    return 0


def _refuse(names: Sequence[str]) -> None:
    """Raise ValueError for a contender that there is not, or that is not installed."""
    for name in names:
        if name not in CONTENDERS:
            raise ValueError(f"--contender is {name!r}; there are {', '.join(CONTENDERS)}")
        for kind, modules in NEEDS.items():
            missing = [module for module in modules if importlib.util.find_spec(module) is None]
            if name.startswith(kind) and missing:
                raise ValueError(f"{name} needs {' and '.join(missing)}: pip install {' '.join(missing)}, or leave it out with --contender")


def _task(name: str, folder: Path, tokenizer: Tokenizer, engine: dict[str, Any], options: CpuOptions, turn: int, scratch: Path) -> Task:
    """Prompts are held-out problems, joined and cut; those of a round are new to every cache."""
    draws = random.Random(f"{options.seed}-{turn}")
    problems = accuracy.held_out(accuracy.ARITHMETIC, 400, options.seed)
    rendered = [chat_prompt(tokenizer, problem.messages, None).ids for problem in problems]
    text = [token for ids in draws.sample(rendered, len(rendered)) for token in ids]

    def prompt() -> list[int]:
        start = draws.randrange(len(text) - options.input_len)
        return text[start : start + options.input_len]

    kind = name.removesuffix(" http").rpartition(" ")[2]
    return Task(
        folder=str(folder),
        engine=engine,
        gguf=str(scratch / f"{kind}.gguf"),
        threads=options.threads or len(os.sched_getaffinity(0)),
        output_len=options.output_len,
        prompts={size: [[prompt() for _ in range(size)] for _ in range(options.num_repeats + 1)] for size in options.batch_size},
        warm=[prompt()],
        questions=rendered[:NUM_QUESTIONS],
        answer_len=ANSWER_LEN,
    )


@contextlib.contextmanager
def _worker(name: str, task: Task, scratch: str) -> Iterator[tuple[subprocess.Popen[str], float]]:
    """The process of a contender, and when it was started."""
    path = Path(scratch) / "task.json"
    path.write_bytes(msgspec.json.encode(task))
    command = [sys.executable, "-m", "pointsman.bench.cpu.workers", name, str(path)]
    start = time.time()
    with (
        (Path(scratch) / "errors").open("w") as errors,  # a pipe that nobody reads would stop it
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True) as process,
    ):
        try:
            yield process, start
        finally:
            if process.poll() is None:
                process.kill()


def _measure(name: str, task: Task, scratch: str) -> dict[str, Any]:
    """What a worker found. Raises ValueError with its last line where it failed."""
    with _worker(name, task, scratch) as (process, start):
        out, _ = process.communicate()
        found = [line.removeprefix(MARK) for line in out.splitlines() if line.startswith(MARK)]
        if process.returncode or not found:
            lines = (Path(scratch) / "errors").read_text(errors="replace").strip().splitlines()
            raise ValueError(f"{name} ended with code {process.returncode}: {lines[-1] if lines else 'it printed nothing'}")
    result: dict[str, Any] = json.loads(found[0])
    return result | {"start_up_s": result["first_token_at"] - start}


def _measure_http(name: str, task: Task, scratch: str) -> dict[str, Any]:
    """The same batches through a server and the load client, which has its share of the same cores."""
    if name.startswith("pointsman"):
        port = free_port()
        flags = serve_flags({"model": task.folder, "num_threads": task.threads} | task.engine)
        command = [sys.executable, "-m", "pointsman", "serve", "--port", str(port), "--log-level", "warning", *flags]
        start = time.time()
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
            try:
                return asyncio.run(_over_http(Origin("127.0.0.1", port), task, server.pid, {"return_token_ids": True}, start))
            finally:
                server.terminate()
    with _worker(name, task, scratch) as (process, start):
        assert process.stdout is not None
        line = next((line for line in process.stdout if line.startswith(MARK)), None)
        if line is None:
            raise ValueError(f"{name} did not start")
        origin = Origin.parse(json.loads(line.removeprefix(MARK))["address"])
        return asyncio.run(_over_http(origin, task, process.pid, {"cache_prompt": False}, start))


async def _over_http(origin: Origin, task: Task, pid: int, extra: dict[str, Any], start: float) -> dict[str, Any]:
    client = HttpClient(origin)
    load = Load(client=client, backend=BACKENDS["openai"], wish=Wish(model=None, ignore_eos=True, extra=extra))
    sizes: dict[str, Any] = {}
    try:
        await _ready(load, task.warm[0])
        start_up = time.time() - start
        for size, batches in task.prompts.items():
            runs = [await _batch(load, batch, task.output_len) for batch in batches][1:]
            sizes[str(size)] = {
                "decode_tokens_per_s": statistics.median(size * rate for rate, _ in runs),
                "prefill_s": statistics.median(first for _, first in runs),
                "peak_memory_mb": tree_memory_mb(pid),
            }
    finally:
        client.close()
    return {"start_up_s": start_up, "sizes": sizes}


async def _ready(load: Load, prompt: Sequence[int]) -> None:
    """Ask for a token until there is one. Raises ValueError where there is none for long."""
    deadline = time.monotonic() + READY_SECONDS
    while True:
        outcome = (await load.run([Query(ids=tuple(prompt), input_len=len(prompt), output_len=1)], [0.0])).outcomes[0]
        if outcome.error is None:
            return
        if time.monotonic() > deadline:
            raise ValueError(f"{load.client.origin} does not answer: {outcome.error}")
        await asyncio.sleep(0.01)


async def _batch(load: Load, prompts: Prompts, output_len: int) -> tuple[float, float]:
    """Median tokens a second of a sequence, and seconds to the last first token, as the client sees them."""
    queries = [Query(ids=tuple(prompt), input_len=len(prompt), output_len=output_len) for prompt in prompts]
    outcomes = (await load.run(queries, [0.0] * len(queries))).outcomes
    failed = next((outcome.error for outcome in outcomes if outcome.error is not None), None)
    if failed is not None:
        raise ValueError(f"{load.client.origin}: {failed}")
    return percentile(sorted(map(decode_rate, outcomes)), 50), max(outcome.piece_s[0] for outcome in outcomes)


def decode_rate(outcome: Outcome) -> float:
    """Tokens a second after the first. Where all came at once nothing tells when the first was there, and the whole time counts."""
    first, last = outcome.piece_s[0], outcome.piece_s[-1]
    return (outcome.output_len - 1) / (last - (first if first < last else outcome.sent_s))


def tree_memory_mb(pid: int) -> float:
    """Most memory that each process of a tree has held, added up, in MB."""
    megabytes, left = 0.0, [pid]
    while left:
        here_pid = left.pop()
        with contextlib.suppress(OSError):
            megabytes += peak_memory_mb(here_pid)
            left += map(int, Path(f"/proc/{here_pid}/task/{here_pid}/children").read_text().split())
    return round(megabytes, 1)


def summarize(results: Sequence[dict[str, Any]], input_len: int) -> dict[str, Any]:
    """Medians over rounds; the spread is (highest - lowest) / median of the decode rates. A prompt has `input_len` tokens."""
    sizes: dict[str, Any] = {}
    for size in results[0]["sizes"]:
        runs = [result["sizes"][size] for result in results]
        rates = [each["decode_tokens_per_s"] for each in runs]
        sizes[size] = {name: round(statistics.median(each[name] for each in runs), 5) for name in runs[0]}
        sizes[size]["prefill_tokens_per_s"] = round(int(size) * input_len / sizes[size]["prefill_s"])
        sizes[size]["spread"] = round((max(rates) - min(rates)) / statistics.median(rates), 3)
    return {"start_up_s": round(statistics.median(result["start_up_s"] for result in results), 3), "sizes": sizes}


def agreements(result: dict[str, Any], found: dict[str, list[dict[str, Any]]]) -> float:
    """The share of tokens before the first that differs from Hugging Face's, or from ours where that did not run."""
    oracle = next(iter(found.get("transformers") or found.get("pointsman") or [result]))
    same = total = 0
    for ours, theirs in zip(result["answers"], oracle["answers"], strict=True):
        pairs = enumerate(zip(ours, theirs, strict=False))
        shared = next((place for place, (one, other) in pairs if one != other), min(len(ours), len(theirs)))
        same, total = same + shared, total + len(theirs)
    return round(same / total, 4)


def ratios(rows: dict[str, dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Our decode rates by the best of llama.cpp's of the same kind."""
    found: dict[str, dict[str, float]] = {}
    for ours in TARGETS:
        suffix = " http" if ours.endswith(" http") else ""
        theirs = [row for name, row in rows.items() if name.startswith("llama.cpp") and name.endswith(" http") == bool(suffix)]
        if ours in rows and theirs:
            found[ours] = {
                size: round(entry["decode_tokens_per_s"] / max(row["sizes"][size]["decode_tokens_per_s"] for row in theirs), 3)
                for size, entry in rows[ours]["sizes"].items()
            }
    return found


def _print(summary: dict[str, Any]) -> None:
    sizes = list(next(iter(summary["rows"].values()))["sizes"])
    head = " / ".join(sizes)
    print(f"{'':<22}{'first token s':>14}{f'decode tokens/s, {head}':>34}{f'prefill tokens/s, {head}':>34}{f'peak MB, {head}':>24}")
    for name, row in summary["rows"].items():
        decode, prefill, memory = (
            " / ".join(f"{row['sizes'][size][key]:,.0f}" for size in sizes)
            for key in ("decode_tokens_per_s", "prefill_tokens_per_s", "peak_memory_mb")
        )
        print(f"{name:<22}{row['start_up_s']:>14.2f}{decode:>34}{prefill:>34}{memory:>24}")
    for name, share in summary["same_tokens"].items():
        print(f"{name}: {100 * share:.1f} % of greedy tokens before the first that is another")
    for name, found in summary["ratios"].items():
        aims = TARGETS[name]
        cells = [f"{found[size]:.2f}x at {size} (to reach: {aims.get(int(size), '-')})" for size in sizes]
        print(f"{name} by llama.cpp's best: {', '.join(cells)}")
