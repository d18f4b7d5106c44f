"""What it costs to have routing returned, in so small a share that a machine's own noise would hide it.

    python -m benchmarks.capture                      on a CPU: the bundled checkpoint, 32 answers at once
    python -m benchmarks.capture --device cuda        a model of MiniMax-M2.5's shape, cut to some layers, 128 answers at once
    python -m benchmarks.capture --save               keep the result, and write it into docs/routing.md

One process answers the same requests over and over, in blocks of four runs: without, with, with, without, or the other way round in every
other block, so that a drift and the place in a block fall out. Runs have the same steps, which differ in nothing but what is asked for, so
they are compared step by step: the time of a kind is the sum, over the steps, of the median over its runs, which no hiccup of the machine
moves. The cost is the quotient of two such sums, with the interval that holds 95 of 100 of what blocks drawn anew from these give. Blocks
of `nothing` stand between, in which no run asks for anything: their interval must hold 0, and its width is what could be seen at all.
Answers end at different steps, as they do where nobody waits for the last. Beside it stands the share of the time that was spent in reading
rows of answers, be it hidden behind a step that runs or not.

Cut to few layers a model's step takes less while what the host does beside it stays, so that the cost is no less than in the whole model.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import random
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from benchmarks.gpu_engine import cut_model, prompts_of
from pointsman import LLM, SamplingParams
from pointsman.bench.subject import machine, settle
from pointsman.replay import replay_of
from pointsman.request import Request

RESULTS = Path(__file__).parent / "results"
DOCUMENT = Path(__file__).parents[1] / "docs" / "routing.md"
PLACE = re.compile(r"(<!-- capture -->\n).*?(<!-- end of capture -->\n)", re.DOTALL)
KINDS = {"nothing": "nothing, against itself", "return": "rows returned", "replay": "its own record replayed"}
PROMPT = 48
DRAWS = 2000
Times = npt.NDArray[np.float64]


class Blocks:
    """The step times of the runs without and with, by block."""

    def __init__(self) -> None:
        self._without: list[Times] = []  # [2, steps] a block
        self._with: list[Times] = []

    def __len__(self) -> int:
        return len(self._with)

    def add(self, without: Sequence[Times], with_it: Sequence[Times]) -> None:
        self._without.append(np.stack(without))
        self._with.append(np.stack(with_it))

    def cost(self) -> tuple[float, float, float]:
        """What it costs, as a share of the time without, and the interval of that."""
        without_BRS, with_BRS = np.stack(self._without), np.stack(self._with)
        draws, count = np.random.default_rng(0), len(self)
        costs = []
        for drawn in (np.arange(count), *draws.integers(0, count, (DRAWS, count))):
            costs.append(_typical(with_BRS[drawn]) / _typical(without_BRS[drawn]) - 1)
        low, high = np.quantile(costs[1:], (0.025, 0.975))
        return costs[0], float(low), float(high)


def _typical(times_BRS: Times) -> float:
    return float(np.median(times_BRS.reshape(-1, times_BRS.shape[-1]), axis=0).sum())


@contextlib.contextmanager
def model(args: argparse.Namespace) -> Iterator[LLM]:
    if args.device == "cpu":
        with contextlib.closing(LLM(device="cpu", progress=False)) as llm:
            settle(llm.engine)
            yield llm
        return
    with (
        tempfile.TemporaryDirectory() as folder,
        contextlib.closing(cut_model(folder, args.layers, max_running_requests=args.batch, cuda_graph_max_bs=args.batch)) as llm,
    ):
        yield llm


class Runs:
    """The same requests, with routing asked for or not."""

    def __init__(self, llm: LLM, batch: int, output_len: int, *, replays: bool) -> None:
        self._llm = llm
        self._prompts = [list(prompt) for prompt in prompts_of(llm.engine, batch, PROMPT, 0)]
        lengths = [output_len // 2 + index * output_len // batch for index in range(batch)]
        random.Random(0).shuffle(lengths)
        self.num_tokens = sum(lengths)
        self._plain = [SamplingParams(max_tokens=length, temperature=1.0, seed=0, ignore_eos=True) for length in lengths]
        self._asking = [params.replace(return_routed_experts=True) for params in self._plain]
        results = llm.generate(self._prompts, self._asking)
        for result, length in zip(results, lengths, strict=True):
            output = result.outputs[0]
            assert len(output.routed_experts) == PROMPT + length - 1 and not output.routed_experts_missing
        self._replays = [replay_of(result.outputs[0].routed_experts, **llm.engine.routing_sizes) for result in results] if replays else None
        self.reading = 0.0
        rows = llm.engine._rows
        for name in ("give", "settle"):
            setattr(rows, name, self._timed(getattr(rows, name)))

    def _timed(self, read: Callable[..., None]) -> Callable[..., None]:
        def timed(*args: Any) -> None:
            begin = time.perf_counter()
            read(*args)
            self.reading += time.perf_counter() - begin

        return timed

    def times(self, kind: str) -> Times:
        """Seconds of each step."""
        engine = self._llm.engine
        engine.flush_cache()
        for index, prompt in enumerate(self._prompts):
            params = (self._asking if kind == "return" else self._plain)[index]
            replay = self._replays[index] if kind == "replay" and self._replays is not None else None
            engine.add(Request(rid=f"{index}", prompt_token_ids=tuple(prompt), sampling=params, replay=replay))
        gc.collect()
        times, num_tokens = [], 0
        while engine.has_work:
            begin = time.perf_counter()
            deltas = engine.step()
            times.append(time.perf_counter() - begin)
            num_tokens += sum(len(delta.token_ids) for delta in deltas)
        assert num_tokens == self.num_tokens
        return np.array(times)


def measure(runs: Runs, kinds: Sequence[str], until: Callable[[int], bool]) -> Iterator[dict[str, Any]]:
    """Costs by kind, as shares of the time without, after each round of blocks."""
    found = {kind: Blocks() for kind in kinds}
    plain: list[float] = []
    readings: list[float] = []
    for kind in ("nothing", *kinds):
        runs.times(kind)
    while until(len(plain)):
        for kind, blocks in found.items():
            runs.reading = 0.0
            outer, inner = ("nothing", kind) if len(blocks) % 2 else (kind, "nothing")
            times = [runs.times(each) for each in (outer, inner, inner, outer)]
            without, with_it = (times[::3], times[1:3]) if len(blocks) % 2 else (times[1:3], times[::3])
            blocks.add(without, with_it)
            plain += [float(each.sum()) for each in without]
            if kind == "return":
                readings.append(runs.reading / sum(float(each.sum()) for each in with_it))
        figures: dict[str, Any] = {"tokens": runs.num_tokens, "tokens_per_s": round(runs.num_tokens / statistics.median(plain))}
        figures["reading"] = round(statistics.median(readings), 5)
        for kind, blocks in found.items():
            cost, low, high = (round(value, 5) for value in blocks.cost())
            figures[kind] = {"cost": cost, "interval": [low, high], "blocks": len(blocks)}
        yield figures


def document(results: Sequence[dict[str, Any]]) -> str:
    """The table of docs/routing.md."""
    head = ["tokens/s without", *KINDS.values(), "reading rows"]
    lines = ["| | " + " | ".join(head) + " |", "|---|" + "---:|" * len(head)]
    notes = []
    for result in results:
        cells = [_cell(result["costs"].get(kind)) for kind in KINDS]
        lines.append(
            f"| {result['what']} | {result['costs']['tokens_per_s']:,} | {' | '.join(cells)} | {100 * result['costs']['reading']:.2f} % |"
        )
        where = f"{result.get('gpu', result['cpu'])}, torch {result['torch']}, commit {result['commit']}"
        notes.append(f"{result['what']}: {where}, {result['costs']['return']['blocks']} blocks of each kind")
    return "\n".join(lines) + f"\n\n{'; '.join(notes)}.\n"


def _cell(figure: dict[str, Any] | None) -> str:
    if figure is None:
        return ""
    low, high = figure["interval"]
    return f"{100 * figure['cost']:.2f} % ({100 * low:.2f} to {100 * high:.2f})"


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, help="default: all on a CPU, nothing and return on a GPU")
    parser.add_argument("--layers", type=int, default=8, help="of the cut model")
    parser.add_argument("--batch", type=int, help="answers at once (default: 32 on a CPU, 128 on a GPU)")
    parser.add_argument("--output-len", type=int, default=64, help="of an answer, in the mean (default: 64)")
    parser.add_argument("--seconds", type=float, default=240.0, help="begin blocks for so long")
    parser.add_argument("--save", action="store_true", help="keep the result, and write the table into docs/routing.md")
    args = parser.parse_args(words)
    on_cpu = args.device == "cpu"
    args.batch = args.batch or (32 if on_cpu else 128)
    kinds = args.kinds or (list(KINDS) if on_cpu else ["nothing", "return"])
    name = "the bundled checkpoint" if on_cpu else f"MiniMax-M2.5's shape, {args.layers} layers"
    with model(args) as llm:
        runs = Runs(llm, args.batch, args.output_len, replays="replay" in kinds)
        end = time.monotonic() + args.seconds
        costs: dict[str, Any] = {}
        for costs in measure(runs, kinds, lambda count: count == 0 or time.monotonic() < end):
            print(json.dumps(costs), file=sys.stderr, flush=True)
        line = {"bench": "capture", "what": f"{name}, {args.batch} answers at once", "costs": costs} | machine(llm.engine)
    if args.save:
        card = "cpu" if on_cpu else torch.cuda.get_device_name().split()[1].lower()
        (RESULTS / f"capture_{card}.json").write_text(json.dumps(line, indent=1) + "\n")
        kept = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("capture_*.json"))]
        DOCUMENT.write_text(PLACE.sub(lambda found: found[1] + document(kept) + found[2], DOCUMENT.read_text()))
    print(json.dumps(line, allow_nan=False))


if __name__ == "__main__":
    main()
