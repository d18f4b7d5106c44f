"""How far a trainer's log-probabilities are from the rollout's, with the rollout's routing and without.

    python -m benchmarks.replay
    python -m benchmarks.replay --save      keep the result, and write its table into docs/routing.md

The checkpoint that `examples/rl/grpo.py` begins with (the bundled one, shaken: it is too sure of its answers to show anything)
answers at temperature 1 and returns log-probabilities and routing. Hugging Face's model of the same checkpoint then reads the answers,
once choosing experts by itself and once under the record. What is left with the record is what numerics leave; what is gone with it
were flipped experts. Engines and trainers of several precisions are crossed, because it is their difference that flips experts.

`kl` is the mean of exp(d) - 1 - d over the answers' tokens, d being the trainer's log-probability minus the engine's: an estimate
of KL(engine || trainer) that is never negative.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor

from examples.rl import trainer
from examples.rl.grpo import options as defaults
from examples.rl.grpo import problems, shaken
from pointsman import LLM, RequestOutput, SamplingParams
from pointsman.bench.machine import here
from pointsman.bench.subject import settle
from pointsman.rl import replay

RESULT = Path(__file__).parent / "results" / "replay.json"
DOCUMENT = Path(__file__).parents[1] / "docs" / "routing.md"
PLACE = re.compile(r"(<!-- replay -->\n).*?(<!-- end of replay -->\n)", re.DOTALL)
ENGINES: dict[str, dict[str, Any]] = {
    "float32 (the default on a CPU)": {},
    "bfloat16": {"dtype": "bfloat16"},
    "FP8 activations (W8A8)": {"dtype": "float32", "moe_runner_backend": "reference", "fp8_gemm_backend": "reference"},
}
TRAINERS = {"float32": torch.float32, "bfloat16": torch.bfloat16}
BATCH = 16


def rollout(folder: Path, options: dict[str, Any], num_prompts: int) -> list[RequestOutput]:
    """Answers of one engine."""
    with contextlib.closing(LLM(str(folder), **options)) as llm:
        settle(llm.engine)
        prompts = [llm.render(problem.messages) for problem in itertools.islice(problems(seed=0), num_prompts)]
        how = SamplingParams(temperature=1.0, max_tokens=128, logprobs=0, return_routed_experts=True, seed=0)
        return llm.generate(prompts, how)


@torch.no_grad()
def read(model: torch.nn.Module, results: list[RequestOutput], *, forced: bool) -> tuple[Tensor, Tensor]:
    """The trainer's log-probabilities of the answers' tokens, and of each answer the share of choices alike and its forced tokens."""
    found, alike = [], []
    for start in range(0, len(results), BATCH):
        part = results[start : start + BATCH]
        sequences = [[*result.prompt_token_ids, *result.outputs[0].token_ids] for result in part]
        width = max(map(len, sequences))
        ids = torch.tensor([sequence + [0] * (width - len(sequence)) for sequence in sequences])
        mask = torch.tensor([[1] * len(sequence) + [0] * (width - len(sequence)) for sequence in sequences])
        records = [result.outputs[0].routed_experts if forced else None for result in part]
        with replay(model, records, attention_mask=mask) as session:
            logits = model(ids, attention_mask=mask, use_cache=False).logits
        if forced:
            alike.append([session.agreement, session.num_forced])
        for row, (result, sequence) in enumerate(zip(part, sequences, strict=True)):
            first = len(result.prompt_token_ids)
            spoken = logits[row, first - 1 : len(sequence) - 1].float().log_softmax(-1)
            found.append(spoken.gather(-1, torch.tensor(sequence[first:])[:, None])[:, 0])
    return torch.cat(found), torch.tensor(alike)


def distance(theirs: Tensor, ours: Tensor) -> dict[str, float]:
    difference = (theirs - ours).double()
    ordered = difference.abs().sort().values
    return {
        "mean": float(ordered.mean()),
        "p99": float(ordered[int(0.99 * (len(ordered) - 1))]),
        "max": float(ordered[-1]),
        "kl": float((difference.exp() - 1 - difference).mean()),
    }


def compare(folder: Path, num_prompts: int) -> list[dict[str, Any]]:
    rows = []
    for engine, options in ENGINES.items():
        results = rollout(folder, options, num_prompts)
        entries = [zip(result.outputs[0].token_ids, result.outputs[0].logprobs or [], strict=True) for result in results]
        spoken = torch.tensor([step[token].logprob for answer in entries for token, step in answer])
        for name, dtype in TRAINERS.items():
            model = trainer.load(folder, dtype)
            with_replay, alike = read(model, results, forced=True)
            without, _ = read(model, results, forced=False)
            rows.append(
                {
                    "engine": engine,
                    "trainer": name,
                    "tokens": len(spoken),
                    "agreement": float((alike[:, 0] * alike[:, 1]).sum() / alike[:, 1].sum()),
                    "with_replay": distance(with_replay, spoken),
                    "without_replay": distance(without, spoken),
                }
            )
            print(f"{engine} / {name}", file=sys.stderr)
    return rows


def document(result: dict[str, Any]) -> str:
    """The table of docs/routing.md."""
    head = ("engine", "trainer", "routers agree", "mean, replay", "mean, free", "KL, replay", "KL, free")
    lines = [f"| {' | '.join(head)} |", "|---|---|" + "---:|" * (len(head) - 2)]
    for row in result["rows"]:
        figures = [f"{row[side][name]:.1e}" for name in ("mean", "kl") for side in ("with_replay", "without_replay")]
        lines.append(f"| {' | '.join([row['engine'], row['trainer'], format(row['agreement'], '.4f'), *figures])} |")
    tokens = result["rows"][0]["tokens"]
    where = f"{result['cpu']}, torch {result['torch']}, commit {result['commit']}"
    table = "\n".join(lines) + f"\n\nAbout {round(tokens, -2):,} tokens of {result['num_prompts']} answers; {where}."
    return f"{table}\n\n{told(result['rows'])}\n"


def told(rows: list[dict[str, Any]]) -> str:
    """What the table shows, in words that come from it."""

    def times(row: dict[str, Any], name: str) -> float:
        return float(row["without_replay"][name] / row["with_replay"][name])

    def pair(row: dict[str, Any]) -> str:
        return f"engine {row['engine'].partition(' (')[0]}, trainer {row['trainer']}"

    ordered = sorted(rows, key=lambda row: times(row, "mean"))
    kls = sorted(times(row, "kl") for row in rows)
    nearer = sum(times(row, "mean") > 1 for row in rows)
    return (
        f"Replay is nearer than free routing in the mean in {nearer} of {len(rows)} rows. Free routing's mean difference is"
        f" {times(ordered[0], 'mean'):.2f} ({pair(ordered[0])}) to {times(ordered[-1], 'mean'):.2f} times"
        f" ({pair(ordered[-1])}) that under replay, its KL {kls[0]:.2f} to {kls[-1]:.2f} times."
    )


def show(rows: list[dict[str, Any]]) -> None:
    table = Table(title="trainer minus engine, log-probability of the answers' tokens", title_justify="left", box=box.SIMPLE_HEAD)
    for head in ("engine", "trainer", "routers agree", "mean, replay", "mean, free", "p99, replay", "p99, free", "KL, replay", "KL, free"):
        table.add_column(head, justify="left" if head in ("engine", "trainer") else "right")
    for row in rows:
        forced, free = row["with_replay"], row["without_replay"]
        figures = [f"{side[name]:.2e}" for name in ("mean", "p99", "kl") for side in (forced, free)]
        table.add_row(row["engine"], row["trainer"], f"{row['agreement']:.5f}", *figures)
    Console(width=160).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--num-prompts", type=int, default=64)
    parser.add_argument("--save", action="store_true", help="keep the result, and write its table into docs/routing.md")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder, begun = Path(scratch) / "shaken", defaults([])
        shaken(folder, begun.noise, begun.seed)
        rows = compare(folder, arguments.num_prompts)
    show(rows)
    line = {"bench": "replay", "num_prompts": arguments.num_prompts, "rows": rows, **here()}
    if arguments.save:
        RESULT.write_text(json.dumps(line, indent=1) + "\n")
        DOCUMENT.write_text(PLACE.sub(lambda found: found[1] + document(line) + found[2], DOCUMENT.read_text()))
    print(json.dumps(line, allow_nan=False))


if __name__ == "__main__":
    main()
