"""Speed and memory of the engine alone: full batches of random prompts, no HTTP.

A speed is reported only behind a check: the largest batch twice, greedily, must give the same tokens, each with a finite
log-probability. Prompts are new in every run, so that no run finds the prefixes of another in the cache.

Decoding is measured while all sequences of the batch run, from the moment the last of them has its first token to the moment the
first of them ends: what a sequence decodes while others still prefill is neither here nor there.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from pointsman.bench.machine import peak_memory_mb
from pointsman.bench.options import LatencyOptions
from pointsman.bench.start_up import measure_start_up
from pointsman.bench.subject import machine, settle
from pointsman.engine.engine import Engine
from pointsman.engine.llm import LLM
from pointsman.request import ChoiceDelta, Request, RequestFailed, SamplingParams

CHECKED_TOKENS = 32
QUIET_SPREAD = 0.25
Prompts = list[tuple[int, ...]]


@dataclass(frozen=True)
class Timing:
    """One batch, once. Seconds from the moment its first request was handed over.

    Attributes:
        first_token_s: of each sequence.
        first_end_s: when the first sequence ended.
        end_s: when the last one did.
        window_tokens: tokens of all sequences between the last first token and the first end.
    """

    first_token_s: list[float]
    first_end_s: float
    end_s: float
    window_tokens: int

    @property
    def prefill_s(self) -> float:
        """Until every sequence had its first token."""
        return max(self.first_token_s)

    @property
    def decode_rate(self) -> float:
        """Tokens a second, all sequences together."""
        return self.window_tokens / (self.first_end_s - self.prefill_s)


def run(engine: dict[str, Any], options: LatencyOptions) -> int:
    """`pointsman bench latency`; 1 where the check fails."""
    logging.basicConfig(level=options.log_level.upper())
    if options.start_up:
        with contextlib.closing(LLM(**engine)) as llm:
            settle(llm.engine)
            compiles = llm.engine.step_name == "compiled"
        return measure_start_up(engine, options.num_warmups, options.num_iters, compiles=compiles)
    largest = max(options.batch_size)
    engine = {"max_running_requests": max(largest, 64)} | engine
    with contextlib.closing(LLM(**engine)) as llm:
        _refuse(llm.engine, largest, options)
        settle(llm.engine)
        prompts = _prompt_source(llm.engine, options)
        fault = check(llm.engine, prompts(largest), min(options.output_len, CHECKED_TOKENS))
        if fault is not None:
            print(f"pointsman bench latency: {fault}; no speed is reported", file=sys.stderr)
            return 1
        rows = [_measure_size(llm.engine, size, prompts, options) for size in options.batch_size]
        summary = {
            "bench": "latency",
            "input_len": options.input_len,
            "output_len": options.output_len,
            "num_iters": options.num_iters,
            "batches": rows,
        } | machine(llm.engine)
    _print_table(rows)
    if (widest := max(row["decode_spread"] for row in rows)) > QUIET_SPREAD:
        print(f"the runs differ by {100 * widest:.0f} %: something else runs on this machine", file=sys.stderr)
    print(json.dumps(summary, allow_nan=False))
    return 0


def _refuse(engine: Engine, largest: int, options: LatencyOptions) -> None:
    """Raise ValueError for lengths and sizes that cannot run here."""
    tokens = options.input_len + options.output_len
    if tokens > engine.context_length:
        raise ValueError(
            f"--input-len {options.input_len} and --output-len {options.output_len} make {tokens} tokens; "
            f"the context has {engine.context_length}"
        )
    most = engine.config.scheduler.max_running_requests
    if largest > most:
        raise ValueError(f"--batch-size {largest} is more than --max-running-requests {most}")


def _prompt_source(engine: Engine, options: LatencyOptions) -> Callable[[int], Prompts]:
    """A function that draws so many new prompts of the length asked for."""
    draws = random.Random(options.seed)
    vocabulary = range(engine.architecture.vocab_size)
    return lambda count: [tuple(draws.choices(vocabulary, k=options.input_len)) for _ in range(count)]


def check(engine: Engine, prompts: Prompts, output_len: int) -> str | None:
    """What is wrong with the answers to a batch, or None."""
    first, second = (_answers(engine, prompts, output_len) for _ in range(2))
    for index, (one, other) in enumerate(zip(first, second, strict=True)):
        if [token for token, _ in one] != [token for token, _ in other]:
            return f"sequence {index} of {len(prompts)} got other tokens the second time"
        if not all(math.isfinite(logprob) for _, logprob in one + other):
            return f"sequence {index} of {len(prompts)} has a log-probability that is not finite"
    return None


def _answers(engine: Engine, prompts: Prompts, output_len: int) -> list[list[tuple[int, float]]]:
    """Tokens and their log-probabilities of each prompt."""
    found: dict[str, list[tuple[int, float]]] = {}
    for delta, _ in deltas(engine, prompts, _params(output_len, logprobs=0)):
        entries = zip(delta.token_ids, delta.logprobs or [], strict=True)
        found.setdefault(delta.rid, []).extend((token, entry[token].logprob) for token, entry in entries)
    return [found[rid] for rid in sorted(found)]


def _params(output_len: int, logprobs: int | None = None) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=output_len, ignore_eos=True, logprobs=logprobs)


def deltas(engine: Engine, prompts: Prompts, params: SamplingParams) -> Iterator[tuple[ChoiceDelta, float]]:
    """Run a batch to its end; each delta with the seconds since its first request was handed over."""
    start = time.perf_counter()
    for index, prompt in enumerate(prompts):
        engine.add(Request(rid=f"bench-{index:05}", prompt_token_ids=prompt, sampling=params))
    left = len(prompts)
    while left:
        deltas = engine.step()
        now = time.perf_counter() - start
        for delta in deltas:
            if delta.error is not None:
                raise RequestFailed(f"the engine gave up on a sequence: {delta.error}")
            left -= delta.finish_reason is not None
            yield delta, now


def time_batch(engine: Engine, prompts: Prompts, output_len: int) -> Timing:
    """Run a batch once. Raises ValueError where its sequences never all run at the same time."""
    first: dict[str, float] = {}
    ends: list[float] = []
    counts: list[tuple[float, int]] = []
    for delta, now in deltas(engine, prompts, _params(output_len)):
        first.setdefault(delta.rid, now)
        counts.append((now, len(delta.token_ids)))
        if delta.finish_reason is not None:
            ends.append(now)
    last_first, first_end = max(first.values()), min(ends)
    if first_end <= last_first:
        raise ValueError(
            f"output_len is {output_len}: of {len(prompts)} sequences the first ended before the last had begun; "
            "raise --output-len or --chunked-prefill-size"
        )
    window = sum(count for now, count in counts if last_first < now <= first_end)
    return Timing(list(first.values()), first_end, max(ends), window)


def _measure_size(engine: Engine, size: int, prompts: Callable[[int], Prompts], options: LatencyOptions) -> dict[str, Any]:
    for _ in range(options.num_warmups):
        time_batch(engine, prompts(size), options.output_len)
    timings = [time_batch(engine, prompts(size), options.output_len) for _ in range(options.num_iters)]
    return {"batch_size": size} | summarize(timings) | {"peak_memory_mb": peak_memory_mb()}


def summarize(timings: Sequence[Timing]) -> dict[str, float]:
    """Medians over the runs of one batch size; the spread is (highest - lowest) / median."""
    rates = [timing.decode_rate for timing in timings]
    return {
        "prefill_s": round(statistics.median(timing.prefill_s for timing in timings), 5),
        "first_token_s": round(statistics.median(second for timing in timings for second in timing.first_token_s), 5),
        "end_s": round(statistics.median(timing.end_s for timing in timings), 5),
        "decode_tokens_per_s": round(statistics.median(rates), 1),
        "decode_spread": round((max(rates) - min(rates)) / statistics.median(rates), 3),
    }


def _print_table(rows: Sequence[dict[str, Any]]) -> None:
    table = Table("batch", "prefill ms", "first token ms", "decode tokens/s", "spread", "peak MB", box=None, pad_edge=False)
    for column in table.columns:
        column.justify = "right"
    for row in rows:
        table.add_row(
            f"{row['batch_size']}",
            f"{1000 * row['prefill_s']:.1f}",
            f"{1000 * row['first_token_s']:.1f}",
            f"{row['decode_tokens_per_s']:,.0f}",
            f"{100 * row['decode_spread']:.0f} %",
            f"{row['peak_memory_mb']:,.0f}",
        )
    Console(file=sys.stdout).print(table)
