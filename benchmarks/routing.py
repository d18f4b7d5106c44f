"""What routing as data costs.

    python -m benchmarks.routing                      all of it, on a machine that does nothing else
    python -m benchmarks.routing scored               one part of it: beside or scored

`beside`: what happens beside a step, in microseconds, best of many runs, for the shapes of the bundled checkpoint and of MiniMax-M2.5:
writing its rows into the store (by numpy, which is an upper bound of what the steps do themselves), counting the load of experts, and
gathering the rows of an answer at its end. Rows are always recorded; there is no run without to compare with. What all of it costs a
batch of answers is measured by `benchmarks.capture`.

`scored`: answers recorded on one step and runner, scored by others under their record and freely: how far the log-probabilities of their
tokens are from those that were returned, most and root mean square, and the share of choices that agree.

It ends with a line of JSON, which is also kept in benchmarks/results.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pointsman import LLM, RequestOutput, SamplingParams
from pointsman.bench import arithmetic
from pointsman.bench.machine import here
from pointsman.moe.capture import RouteStore
from pointsman.moe.load import ExpertLoad

RESULT = Path(__file__).parent / "results" / "routing.json"
SHAPES = {"bundled": (6, 16, 4), "MiniMax-M2.5": (62, 256, 8)}
SLOTS = 16384
STEPS = 256
ROWS = (1, 8, 64, 512)
ANSWER = 512
RUNS = 30
BATCH = 32
SCORERS: dict[str, dict[str, Any]] = {
    "torch step": {"cpu_step": "torch"},
    "compiled step": {"cpu_step": "compiled"},
    "bfloat16": {"cpu_step": "torch", "dtype": "bfloat16"},
    "reference (W8A8)": {"cpu_step": "torch", "moe_runner_backend": "reference", "fp8_gemm_backend": "reference"},
}


def microseconds(run: Callable[[], object]) -> float:
    times = []
    for _ in range(RUNS):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return round(1e6 * min(times), 2)


def beside() -> dict[str, float]:
    """Microseconds by what is done."""
    figures = {}
    for name, (num_layers, num_experts, top_k) in SHAPES.items():
        routes = RouteStore(SLOTS, num_layers, top_k, num_experts)
        routes.rows_SLK.random_(0, num_experts)
        stored, load = routes.rows_SLK.numpy(), ExpertLoad(routes, num_experts)
        for num_rows in ROWS:
            steps = [np.random.randint(0, SLOTS, num_rows) for _ in range(STEPS)]
            rows = stored[:num_rows].copy()

            def record(slots: Any = steps[0], rows: Any = rows, stored: Any = stored) -> None:
                stored[slots] = rows

            def count(steps: Any = steps, load: ExpertLoad = load) -> None:
                for slots in steps:
                    load.before_step()
                    load.after_step(slots)
                load.counts_LE()

            figures[f"{name}: record a step of {num_rows} rows"] = microseconds(record)
            figures[f"{name}: count a step of {num_rows} rows"] = round(microseconds(count) / STEPS, 2)
        figures[f"{name}: gather {ANSWER} rows"] = microseconds(lambda: routes.gather(torch.arange(ANSWER)))  # noqa: B023
    for what, cost in figures.items():
        print(f"{what:<45}{cost:9.2f} us")
    return figures


def problems(llm: LLM, count: int) -> list[list[int]]:
    found = itertools.islice(arithmetic.problems("heldout", seed=0, follow_ups=0), count)
    return [llm.render(problem.messages) for problem in found]


def scored() -> dict[str, Any]:
    """Distances of scores from what was returned, by who scored."""
    figures: dict[str, Any] = {}
    params = SamplingParams(max_tokens=100, temperature=1.0, seed=1, logprobs=0, return_routed_experts=True)
    with contextlib.closing(LLM(progress=False, cpu_step="torch")) as llm:
        rollouts = llm.generate(problems(llm, BATCH), params)
    wholes = [[*rollout.prompt_token_ids, *rollout.outputs[0].token_ids] for rollout in rollouts]
    records = [rollout.outputs[0].routed_experts for rollout in rollouts]
    returned = np.concatenate([_drawn(rollout) for rollout in rollouts])
    figures["tokens"] = len(returned)
    for name, options in SCORERS.items():
        with contextlib.closing(LLM(progress=False, **options)) as llm:
            for how, replay in (("replayed", records), ("free", None)):
                results = llm.generate(wholes, SamplingParams(max_tokens=0, prompt_logprobs=0), replay_routed_experts=replay)
                pairs = zip(results, rollouts, strict=True)
                apart = np.concatenate([_scores(result)[len(rollout.prompt_token_ids) - 1 :] for result, rollout in pairs]) - returned
                shares = {
                    "median": np.median(abs(apart)),
                    "mean": abs(apart).mean(),
                    "p99": np.quantile(abs(apart), 0.99),
                    "most": abs(apart).max(),
                }
                figure = {share: float(f"{value:.2g}") for share, value in shares.items()}
                if replay is not None:
                    figure["agreement"] = round(statistics.fmean(result.outputs[0].routing_agreement or 0.0 for result in results), 4)
                figures[f"{name}, {how}"] = figure
                print(f"{name}, {how}: {figure}")
    return figures


def _drawn(rollout: RequestOutput) -> Any:
    output = rollout.outputs[0]
    return np.array([entry[token].logprob for token, entry in zip(output.token_ids, output.logprobs or [], strict=True)])


def _scores(result: RequestOutput) -> Any:
    entries = zip(result.prompt_token_ids[1:], (result.prompt_logprobs or [])[1:], strict=True)
    return np.array([entry[token].logprob for token, entry in entries if entry is not None])


PARTS: dict[str, Callable[[], dict[str, Any]]] = {"beside": beside, "scored": scored}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("parts", nargs="*", choices=[[], *PARTS], help="which; all where none is named")
    names = parser.parse_args().parts or list(PARTS)
    kept = json.loads(RESULT.read_text()) if RESULT.is_file() else {}
    kept |= {name: PARTS[name]() for name in names} | here()
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(kept, indent=1) + "\n")
    print(json.dumps(kept))


if __name__ == "__main__":
    main()
