"""Trains the bundled checkpoint on one GPU for a given time and exports it.

    python -m training.train_tiny --seconds 480 --out OUT

The learning rate is a function of the share of the time that has passed, so that the time decides and not a step count. A long run
can be cut into parts of its schedule (`--part 0 0.5`, then `--resume OUT --part 0.5 1`), each with its results on disk.
"""

import argparse
import json
import time
from pathlib import Path

import torch

from training import export
from training.data import ROW, Feed
from training.evaluate import Heldout
from training.model import Model, Shape, masked_attention, varlen_attention
from training.optimizer import Optimizer
from training.text import MIX


def factor(progress: float, warmup: float = 0.01, hold: float = 0.45) -> float:
    """Learning-rate factor: a short rise, a plateau, a straight line to 0."""
    if progress < warmup:
        return max(progress / warmup, 0.02)
    return 1.0 if progress < hold else max(0.0, 1 - (progress - hold) / (1 - hold))


class Log:
    """One JSON object a line, in a file and on the terminal."""

    def __init__(self, path: Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        self.file = path.open("a")

    def __call__(self, **fields) -> None:
        line = json.dumps(fields)
        print(line, flush=True)
        self.file.write(line + "\n")
        self.file.flush()


def balance(model: Model, loads: torch.Tensor, rate: float) -> None:
    """Raise the choice bias of the experts below the mean load, lower that of the others (Wang et al. 2024)."""
    share = loads.float() / loads.sum(-1, keepdim=True)
    model.bias += rate * torch.sign(share.mean(-1, keepdim=True) - share)


def spread(loads: torch.Tensor) -> dict[str, float]:
    share = loads.float() / loads.sum(-1, keepdim=True) * loads.shape[-1]
    return {"least": round(share.min().item(), 3), "most": round(share.max().item(), 3)}


def mix_of(path: str | None) -> dict[str, float]:
    return MIX if path is None else json.loads(path)


def train(options: argparse.Namespace) -> None:
    device, out = options.device, Path(options.out)
    feed = Feed(options.workers, options.seed + round(97 * options.part[0]), device, mix_of(options.mix))
    log = Log(out / "log.jsonl")
    torch.manual_seed(options.seed)
    attend = varlen_attention() if options.attention == "varlen" else masked_attention
    model = Model(Shape(), attend=attend).to(device)
    if options.resume:
        export.load_master(model, Path(options.resume))
    heldout = Heldout(device, options.heldout)
    optimizer = Optimizer(model)
    step_loss = torch.compile(model.loss, dynamic=False, fullgraph=True) if device == "cuda" else model.loss
    run(options, model, heldout, optimizer, step_loss, feed, log)
    finish(options, model, heldout, log, out, attend)
    feed.close()


def run(options, model: Model, heldout: Heldout, optimizer: Optimizer, step_loss, feed: Feed, log: Log) -> None:
    """Steps until the time is over; the clock starts once the first batch has compiled the step."""
    step_loss(feed.batch(options.rows, options.prompt_weight))[0].backward()
    model.zero_grad(set_to_none=True)
    out, step, start = Path(options.out), 0, time.monotonic()
    loads = torch.zeros(model.shape.layers, model.shape.experts, device=options.device)
    reported = evaluated = start
    loss_sum, losses = torch.zeros((), device=options.device), 0
    while (elapsed := time.monotonic() - start) < options.seconds:
        begin, end = options.part
        progress = begin + (end - begin) * elapsed / options.seconds
        rate = factor(progress) * min(1.0, (step + 1) / 50)  # the optimizers' averages start anew in every part
        loss, load = step_loss(feed.batch(options.rows, options.prompt_weight * (progress < 0.6)))
        loss.backward()
        optimizer.step(rate)
        balance(model, load, 1e-3 * min(1.0, 2.5 * (1 - progress)) if progress < 0.98 else 0.0)
        loads.mul_(0.95).add_(load)
        loss_sum += loss.detach()
        step, losses = step + 1, losses + 1
        if step == 1 or (step % 10 == 0 and time.monotonic() - reported > options.report):
            mean = loss_sum.item() / losses
            reported = time.monotonic()
            log(
                step=step,
                seconds=round(reported - start, 1),
                loss=round(mean, 5),
                tokens=step * options.rows * ROW,
                fresh=feed.read,
                repeated=feed.repeated,
                factor=round(rate, 4),
                **spread(loads),
            )
            loss_sum.zero_()
            losses = 0
            if mean != mean:
                raise FloatingPointError("the loss is NaN")
        if time.monotonic() - evaluated > options.every:
            shares, _ = heldout.exact(model, limit=160)
            evaluated = time.monotonic()
            log(step=step, seconds=round(evaluated - start, 1), heldout=shares)
            export.save_master(model, out)


def finish(options, model: Model, heldout: Heldout, log: Log, out: Path, attend) -> None:
    """Exports, and evaluates what was exported: as served in FP8, and with exact activations."""
    export.save_master(model, out)
    export.save(model, out / "model.safetensors")
    served = export.load(out / "model.safetensors", model.shape, attend=attend).to(options.device)
    for name, exact in (("fp8 weights and activations", False), ("fp8 weights, bf16 activations", True)):
        served.exact = exact
        shares, loads = heldout.exact(served)
        log(
            final=name,
            heldout=shares,
            **spread(loads),
            loads=[[round(x, 4) for x in row] for row in (loads / loads.sum(-1, keepdim=True)).tolist()],
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=1260)
    parser.add_argument("--out", required=True)
    parser.add_argument("--rows", type=int, default=128, help="rows of 1024 tokens a step")
    parser.add_argument("--workers", type=int, default=14)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--attention", choices=("varlen", "masked"), default="varlen", help="varlen needs a GPU")
    parser.add_argument("--resume", help="folder of master weights to go on from")
    parser.add_argument("--part", type=float, nargs=2, default=(0.0, 1.0), metavar=("BEGIN", "END"), help="part of the schedule to run")
    parser.add_argument("--mix", help="shares of the kinds as JSON")
    parser.add_argument("--heldout", type=int, default=2000, help="held-out problems of each kind")
    parser.add_argument("--prompt-weight", type=float, default=0.05)
    parser.add_argument("--every", type=float, default=90, help="seconds between evaluations")
    parser.add_argument("--report", type=float, default=10, help="seconds between log lines")
    train(parser.parse_args())


if __name__ == "__main__":
    main()
