"""GRPO on the bundled checkpoint: Pointsman rolls out, torch trains, weights go back every step.

    python examples/rl/grpo.py            some minutes on two cores; ends with a picture and one line of JSON
    python examples/rl/grpo.py --quick    a few small steps, as CI runs them

The checkpoint solves its problems too well to learn from them, so a run begins by shaking it: noise of half a standard deviation on
every matrix, after which it solves about half of the short ones and is unsure of them. The reward of an answer is 1 if it is right.
Engine and trainer are two processes and two programs: `pointsman serve` in FP8, transformers' MiniMax-M2 in float32. Their routers do
not always agree; `pointsman.rl.replay` makes the trainer's route as the rollout did. Every step measures both: the KL between the two
policies with replay, and without on the same answers.

See README.md in this folder for what the picture shows.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from safetensors.torch import save_file
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [path for path in (str(ROOT),) if path not in sys.path]  # so that this runs as a script from anywhere

from examples.rl import trainer  # noqa: E402
from examples.rl.rollout import Rollout, Sample  # noqa: E402
from pointsman import tiny  # noqa: E402
from pointsman.bench import arithmetic  # noqa: E402
from pointsman.bench.arithmetic import ArithmeticProblem, check  # noqa: E402
from pointsman.plots.curves import Panel, curves  # noqa: E402
from pointsman.rl import replay  # noqa: E402

CLIP = 0.2
MAX_NORM = 1.0
MICRO_BATCH = 16
MOST_STEPS = 2


@dataclass(frozen=True)
class Step:
    """What one step measured. `kl` is that of the routing that was trained under, and of the other on the same answers."""

    reward: float
    kl_with_replay: float
    kl_without_replay: float
    routing_agreement: float
    solved_groups: float
    loss: float


def problems(seed: int) -> Iterator[ArithmeticProblem]:
    """Problems of the checkpoint's own training that take one step or two."""
    stream = arithmetic.problems("train", seed, follow_ups=0)
    return (problem for problem in stream if problem.steps <= MOST_STEPS and len(problem.messages) == 1)


@torch.no_grad()
def shake(model: torch.nn.Module, noise: float, seed: int) -> None:
    """Add noise to every matrix of attention and experts, of `noise` standard deviations of its own; routers and embeddings stay."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "_proj" in name:
            parameter.add_(torch.randn(parameter.shape, generator=generator) * parameter.std() * noise)


def shaken(folder: Path, noise: float, seed: int) -> None:
    """Write the checkpoint that a run begins with."""
    model = trainer.load(tiny.path())
    shake(model, noise, seed)
    write(model, folder)


def reward(sample: Sample) -> float:
    return float(check(sample.problem, sample.text) == "right")


def advantages(groups: Sequence[Sequence[Sample]]) -> list[float]:
    """GRPO: how much better than its group an answer is, in standard deviations; 0 throughout where all are alike."""
    found = []
    for group in groups:
        rewards = [reward(sample) for sample in group]
        mean, spread = statistics.fmean(rewards), statistics.pstdev(rewards)
        found += [(value - mean) / spread if spread else 0.0 for value in rewards]
    return found


def logprobs(model: torch.nn.Module, samples: Sequence[Sample], *, forced: bool) -> tuple[list[Tensor], float, int]:
    """The trainer's log-probabilities of each answer's tokens, the agreement of free routing, and how many tokens were forced."""
    sequences = [[*sample.prompt, *sample.answer] for sample in samples]
    width = max(map(len, sequences))
    ids = torch.tensor([sequence + [0] * (width - len(sequence)) for sequence in sequences])
    mask = torch.tensor([[1] * len(sequence) + [0] * (width - len(sequence)) for sequence in sequences])
    with replay(model, [sample.routing if forced else None for sample in samples], attention_mask=mask) as session:
        logits = model(ids, attention_mask=mask, use_cache=False).logits
    found = []
    for row, sample in enumerate(samples):
        first = len(sample.prompt)
        spoken = logits[row, first - 1 : first - 1 + len(sample.answer)].log_softmax(-1)
        found.append(spoken.gather(-1, torch.tensor(sample.answer)[:, None])[:, 0])
    return found, session.agreement if forced else 0.0, session.num_forced


def kl(theirs: Tensor, ours: Tensor) -> float:
    """KL(rollout || trainer) by the answers' tokens: the mean of exp(d) - 1 - d, which is never negative."""
    difference = (theirs - ours).double()
    return float((difference.exp() - 1 - difference).mean())


def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer, groups: Sequence[Sequence[Sample]], *, forced: bool) -> Step:
    """One update on one batch of answers, under the routing of the rollout or under the trainer's own."""
    samples = [sample for group in groups for sample in group]
    weights, old = advantages(groups), [torch.tensor(sample.logprobs) for sample in samples]
    num_tokens = sum(map(len, old))
    spoken: dict[bool, list[Tensor]] = {True: [], False: []}
    agreed = num_forced = 0.0
    total = 0.0
    optimizer.zero_grad()
    for start in range(0, len(samples), MICRO_BATCH):
        part = slice(start, start + MICRO_BATCH)
        new, agreement, count = logprobs(model, samples[part], forced=forced)
        loss = torch.stack([_surrogate(*each) for each in zip(new, old[part], weights[part], strict=True)]).sum() / num_tokens
        loss.backward()  # type: ignore[no-untyped-call]
        total += loss.item()
        spoken[forced] += [each.detach() for each in new]
        with torch.no_grad():
            other, other_agreement, other_count = logprobs(model, samples[part], forced=not forced)
        spoken[not forced] += other
        agreed += (agreement + other_agreement) * (count + other_count)
        num_forced += count + other_count
    torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
    optimizer.step()
    ours = torch.cat(old)
    return Step(
        reward=statistics.fmean(map(reward, samples)),
        kl_with_replay=kl(torch.cat(spoken[True]), ours),
        kl_without_replay=kl(torch.cat(spoken[False]), ours),
        routing_agreement=agreed / num_forced,
        solved_groups=statistics.fmean(all(map(reward, group)) for group in groups),
        loss=total,
    )


def _surrogate(new: Tensor, old: Tensor, advantage: float) -> Tensor:
    """The clipped objective of one answer, summed over its tokens; the ratio is to the rollout's policy, whose answers these are."""
    ratio = (new - old).exp()
    return -torch.minimum(ratio * advantage, ratio.clamp(1 - CLIP, 1 + CLIP) * advantage).sum()


def write(model: torch.nn.Module, folder: Path) -> None:
    """The trainer's weights as a checkpoint that serves: FP8 blocks, as the one that it began with."""
    folder.mkdir()
    for path in tiny.path().iterdir():
        if path.suffix in (".json", ".jinja"):
            shutil.copy(path, folder)
    save_file({name: tensor.contiguous() for name, tensor in trainer.published(model)}, folder / "model.safetensors")


def run(arguments: argparse.Namespace, *, forced: bool, bar: Progress) -> list[Step]:
    """All steps of one arm: with replay or without."""
    task = bar.add_task("with replay" if forced else "without replay", total=arguments.steps, said="")
    stream = problems(arguments.seed)
    steps: list[Step] = []
    with tempfile.TemporaryDirectory() as scratch:
        first = Path(scratch) / "first"
        shaken(first, arguments.noise, arguments.seed)
        model = trainer.load(first)
        optimizer = torch.optim.AdamW(model.parameters(), lr=arguments.lr, betas=(0.9, 0.95), weight_decay=0.0)
        with Rollout(first) as engine:
            for number in range(arguments.steps):
                batch = [next(stream) for _ in range(arguments.problems)]
                seed = 1000 * number + arguments.seed
                groups = engine.sample(batch, group=arguments.group, max_tokens=arguments.max_tokens, seed=seed)
                steps.append(train(model, optimizer, groups, forced=forced))
                engine.weights.push(trainer.published(model), version=f"{number + 1}")
                bar.update(task, advance=1, said=f"reward {steps[-1].reward:.2f}")
                if not bar.console.is_terminal:
                    print(f"{number}: {json.dumps(vars(steps[-1]))}", file=sys.stderr, flush=True)
    return steps


def picture(arms: dict[str, list[Step]]) -> bytes:
    first = next(iter(arms.values()))
    panels = [
        Panel(title="reward", lines={name: [step.reward for step in steps] for name, steps in arms.items()}, low=0, high=1),
        Panel(
            title="KL(rollout || trainer)",
            lines={
                "with replay": [step.kl_with_replay for step in first],
                "without, same answers": [step.kl_without_replay for step in first],
            },
            logarithmic=True,
        ),
        Panel(
            title="choices that free routing makes alike", lines={"at the rollout's weights": [step.routing_agreement for step in first]}
        ),
    ]
    return curves("GRPO on the bundled checkpoint", panels)


def options(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="three small steps with replay")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--problems", type=int, default=8, help="problems a step")
    parser.add_argument("--group", type=int, default=8, help="answers to each")
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--noise", type=float, default=0.55, help="how much the checkpoint is shaken, in standard deviations")
    parser.add_argument("--threads", type=int, default=max(len(os.sched_getaffinity(0)) // 2, 1), help="of the trainer; half of the cores")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--arms", choices=("replay", "free", "both"), default="replay", help="train under the rollout's routing or not")
    parser.add_argument("--out", type=Path, default=Path("grpo.png"), help="where the picture goes; figures go beside it as .json")
    arguments = parser.parse_args(words)
    if arguments.quick:
        arguments.steps, arguments.problems, arguments.group = 3, 2, 4
    if min(arguments.steps, arguments.problems, arguments.max_tokens, arguments.threads) < 1 or arguments.group < 2:
        parser.error("steps, problems, max-tokens and threads must be at least 1, group at least 2")
    return arguments


def main(words: Sequence[str] | None = None) -> None:
    arguments = options(words)
    torch.set_num_threads(arguments.threads)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[said]}"))
    arms = {"replay": [True], "free": [False], "both": [True, False]}[arguments.arms]
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=Console(stderr=True)) as bar:
        found = {"with replay" if forced else "without replay": run(arguments, forced=forced, bar=bar) for forced in arms}
    arguments.out.write_bytes(picture(found))
    figures = {name: [vars(step) for step in steps] for name, steps in found.items()}
    arguments.out.with_suffix(".json").write_text(json.dumps(figures, indent=1) + "\n")
    steps = next(iter(found.values()))
    last = steps[-max(len(steps) // 5, 1) :]
    line = {
        "reward": statistics.fmean(step.reward for step in last),
        "reward_at_first": statistics.fmean(step.reward for step in steps[: len(last)]),
        "kl_with_replay": statistics.fmean(step.kl_with_replay for step in steps),
        "kl_without_replay": statistics.fmean(step.kl_without_replay for step in steps),
        "routing_agreement": statistics.fmean(step.routing_agreement for step in steps),
        "steps": len(steps),
        "picture": str(arguments.out),
    }
    print(json.dumps(line))


if __name__ == "__main__":
    main()
