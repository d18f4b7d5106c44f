"""`pointsman eval table`: the accuracy of every way in which this machine can run a model, in one table.

Every runner of the experts, every type of the cache and every layout over devices is tried; what cannot run is in the table too, with
its reason. The problems are the same in each row, so rows differ by their numerics alone.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import os
from collections.abc import Iterator
from typing import Any

import torch

from pointsman.bench import accuracy
from pointsman.bench.machine import here
from pointsman.bench.options import TableOptions
from pointsman.bench.subject import settle
from pointsman.config import KV_DTYPES, MOE_RUNNERS
from pointsman.engine.llm import LLM

AXES = {
    "moe_runner_backend": tuple(name for name in MOE_RUNNERS if name != "auto"),
    "kv_cache_dtype": tuple(name for name in KV_DTYPES if name != "auto"),
}
LAYOUTS = ((1, 1), (2, 1), (2, 2), (4, 1), (4, 4), (8, 1), (8, 8))
TASKS = {"arithmetic": accuracy.ARITHMETIC, "tools": accuracy.TOOLS}


def eval_table(engine: dict[str, Any], options: TableOptions) -> int:
    """`pointsman eval table`; 1 where nothing could run."""
    logging.basicConfig(level=options.log_level.upper())
    problems = {name: accuracy.held_out(task, options.num_questions, options.seed) for name, task in TASKS.items()}
    rows: list[dict[str, Any]] = []
    refused: dict[str, list[dict[str, Any]]] = {}
    print(f"{'runner':<26}{'cache':<10}{'tp':>3}{'ep':>3}  {'step':<10}{'arithmetic':<24}{'tools':<24}{'tokens/s':>10}")
    for chosen in ways(engine):
        try:
            row = _run(engine | chosen, problems, options)
        except ValueError as error:
            refused.setdefault(str(error), []).append(chosen)
            continue
        rows.append(chosen | row)
        print(_line(rows[-1]), flush=True)
    for reason, entries in refused.items():
        print(f"{len(entries)} ways are refused, such as {' '.join(_name(entries[0]).split())}: {reason}")
    summary = {"eval": "table", "num_questions": options.num_questions, "seed": options.seed, "rows": rows, "refused": refused}
    gpu = {"gpu": torch.cuda.get_device_name()} if any(row["device"] == "cuda" for row in rows) else {}
    print(json.dumps(summary | gpu | here(), allow_nan=False))
    return 0 if rows else 1


def ways(engine: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Every combination of runner, cache type and layout; what the command line says is kept as it is."""
    axes = [[{name: value} for value in ([engine[name]] if name in engine else values)] for name, values in AXES.items()]
    sizes = {"tensor_parallel_size", "expert_parallel_size"}
    if sizes & engine.keys():
        layouts = [(engine.get("tensor_parallel_size", 1), engine.get("expert_parallel_size", 1))]
    else:
        devices = torch.cuda.device_count() or len(os.sched_getaffinity(0))
        layouts = [(tp, ep) for tp, ep in LAYOUTS if tp <= devices]
    for runner, kv, (tp, ep) in itertools.product(axes[0], axes[1], layouts):
        yield {**runner, **kv} | {"tensor_parallel_size": tp, "expert_parallel_size": ep}


def _run(engine: dict[str, Any], problems: dict[str, list[Any]], options: TableOptions) -> dict[str, Any]:
    """The accuracy of one way. Raises ValueError where the engine refuses it."""
    with contextlib.closing(LLM(**engine)) as llm:
        settle(llm.engine)
        row: dict[str, Any] = {"device": llm.engine.choices["device"], "step": llm.engine.step_name, "model": llm.engine.model_name}
        tokens = seconds = 0.0
        for name, task in TASKS.items():
            graded, spent = accuracy.answer(task, llm, problems[name], options.max_tokens)
            summary = accuracy.summarize(task, graded, spent)
            row[name] = {key: summary[key] for key in ("accuracy", "accuracy_95", "invalid", "truncated")}
            tokens, seconds = tokens + summary["output_tokens"], seconds + spent
        return row | {"output_throughput": round(tokens / seconds, 1)}


def _name(row: dict[str, Any]) -> str:
    return f"{row['moe_runner_backend']:<26}{row['kv_cache_dtype']:<10}{row['tensor_parallel_size']:>3}{row['expert_parallel_size']:>3}"


def _line(row: dict[str, Any]) -> str:
    shares = [f"{row[name]['accuracy']:.3f} ({row[name]['accuracy_95'][0]:.3f}-{row[name]['accuracy_95'][1]:.3f})" for name in TASKS]
    return f"{_name(row)}  {row['step']:<10}{shares[0]:<24}{shares[1]:<24}{row['output_throughput']:>10,.0f}"
