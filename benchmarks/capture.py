"""What it costs to have routing returned, in so small a share that a machine's own noise would hide it.

    python -m benchmarks.capture                      on a CPU: the bundled checkpoint, 32 answers at once
    python -m benchmarks.capture --device cuda        a model of MiniMax-M2.5's shape, cut to some layers, 128 answers at once
    python -m benchmarks.capture --save               keep the result, and write it into docs/routing.md

One process answers a steady flow of requests: as many begin in every step as end, all equally long, so that every step is like the one
before. The flow is cut into windows of some steps, in which the answers that end are asked for their rows or not, and four windows are a
block: without, with, with, without, or the other way round in every other block. A block takes about a second and its times are taken as
multiples of its typical step, so that a machine which is slower in some seconds than in others does not matter, and many blocks fit into
a minute. The first steps of a window do not count, as they may pay for the end of the one before. A replay costs in every step of an
answer: there windows go on, uncounted, until all that runs is of the next kind.

Steps are compared with those at the same place of other windows: the time of a kind is the sum, over the places, of the median over its
windows, which no hiccup of the machine moves. The cost is the quotient of two such sums, with the interval that holds 95 of 100 of what
blocks drawn anew from these give. Blocks of `nothing` stand between, in which nobody asks for anything: their interval must hold 0, and
its width is what could be seen at all. Beside it stands the share of the time that was spent in reading rows of answers, be it hidden
behind a step that runs or not.

Cut to few layers a model's step takes less while what the host does beside it stays, so that the cost is no less than in the whole model.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import math
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from benchmarks.gpu_engine import cut_model, prompts_of
from pointsman import LLM, SamplingParams
from pointsman.bench.subject import machine, settle
from pointsman.replay import replay_of
from pointsman.request import ChoiceDelta, Replay, Request

RESULTS = Path(__file__).parent / "results"
DOCUMENT = Path(__file__).parents[1] / "docs" / "routing.md"
PLACE = re.compile(r"(<!-- capture -->\n).*?(<!-- end of capture -->\n)", re.DOTALL)
KINDS = {"nothing": "nothing, against itself", "return": "rows returned", "replay": "its own record replayed"}
PROMPT = 48
STEPS, UNCOUNTED = 16, 2  # of a window
FILLING = 8  # steps: the first one waits for nothing, so what begins in it takes another number of them
DRAWS = 2000
Times = npt.NDArray[np.float64]


class Window(NamedTuple):
    """Steps in which answers of one kind end: `begin` that do not count, `steps` that do, `rest` that do not."""

    block: str
    with_it: bool
    begin: int
    steps: int
    rest: int

    @property
    def kind(self) -> str:
        return self.block if self.with_it else "nothing"

    @property
    def length(self) -> int:
        return self.begin + self.steps + self.rest


class Blocks:
    """The step times of the windows without and with, by block, as multiples of the block's typical step."""

    def __init__(self) -> None:
        self._without: list[Times] = []  # [2, steps] a block
        self._with: list[Times] = []

    def __len__(self) -> int:
        return len(self._with)

    def add(self, without: Sequence[Times], with_it: Sequence[Times]) -> None:
        level = np.median([*without, *with_it])
        self._without.append(np.stack(without) / level)
        self._with.append(np.stack(with_it) / level)

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
    """With lanes to spare, as an answer that has ended keeps its own for a step or two."""
    lanes = args.batch + 8 * math.ceil(args.batch / args.output_len)
    if args.device == "cpu":
        with contextlib.closing(LLM(device="cpu", progress=False, max_running_requests=lanes)) as llm:
            settle(llm.engine)
            yield llm
        return
    rows = args.batch + math.ceil(args.batch / args.output_len) * PROMPT
    with (
        tempfile.TemporaryDirectory() as folder,
        contextlib.closing(cut_model(folder, args.layers, max_running_requests=lanes, cuda_graph_max_bs=2 * rows)) as llm,
    ):
        yield llm


class Flow:
    """Answers of the same length, of which as many begin in each step as end; each is of the kind of the window in which it ends."""

    def __init__(self, llm: LLM, batch: int, output_len: int, *, replays: bool) -> None:
        self._engine = llm.engine
        self.pace = Fraction(batch, output_len)
        self.tokens_a_step = batch
        self._length = output_len
        self._prompts = prompts_of(llm.engine, 2 * batch, PROMPT, 0)
        self._plain = SamplingParams(max_tokens=output_len, temperature=1.0, seed=0, ignore_eos=True)
        self._asking = self._plain.replace(return_routed_experts=True)
        self._replays = self._recorded(llm) if replays else []
        self._kinds: dict[str, str] = {}  # of the answers under way
        self._number = self._step = 0
        self.reading = 0.0
        rows = llm.engine._rows
        for name in ("give", "settle"):
            setattr(rows, name, self._timed(getattr(rows, name)))
        self.life = 0
        while not self.life:
            self.step("nothing")

    def _recorded(self, llm: LLM) -> list[Replay]:
        outputs = [result.outputs[0] for result in llm.generate([list(prompt) for prompt in self._prompts], self._asking)]
        return [replay_of(output.routed_experts, **llm.engine.routing_sizes) for output in outputs]

    def _timed(self, read: Callable[..., None]) -> Callable[..., None]:
        def timed(*args: Any) -> None:
            begin = time.perf_counter()
            read(*args)
            self.reading += time.perf_counter() - begin

        return timed

    def step(self, coming: str, ending: str = "nothing") -> float:
        """Seconds of one step, in which answers of the kind `coming` begin, and those that end shall be of the kind `ending`."""
        for _ in range(int((self._step + 1) * self.pace) - int(self._step * self.pace)):
            self._begin(coming)
        self._step += 1
        begin = time.perf_counter()
        deltas = self._engine.step()
        seconds = time.perf_counter() - begin
        for delta in deltas:
            if delta.finish_reason is not None:
                self._end(delta, ending)
        return seconds

    def through(self, window: Window, coming: Iterator[str]) -> tuple[Times, float]:
        """Seconds of each of its steps that count, and those of them that went into reading rows."""
        for _ in range(window.begin):
            self.step(next(coming), window.kind)
        self.reading = 0.0
        times = np.array([self.step(next(coming), window.kind) for _ in range(window.steps)])
        reading = self.reading
        for _ in range(window.rest):
            self.step(next(coming), window.kind)
        return times, reading

    def _begin(self, kind: str) -> None:
        place = self._number % len(self._prompts)
        rid = f"{self._number} {self._step}"
        params = self._asking if kind == "return" else self._plain
        replay = self._replays[place] if kind == "replay" else None
        self._engine.add(Request(rid=rid, prompt_token_ids=self._prompts[place], sampling=params, replay=replay, cache_salt=rid))
        self._kinds[rid] = kind
        self._number += 1

    def _end(self, delta: ChoiceDelta, ending: str) -> None:
        kind = self._kinds.pop(delta.rid)
        first = int(delta.rid.split()[1])
        life = self._step - first
        if not self.life and first < FILLING:
            return
        self.life = self.life or life
        assert life == self.life, f"an answer took {life} steps and the first one {self.life}: they do not flow steadily"
        assert kind == ending, f"an answer of the kind {kind} ended among those of {ending}"
        if kind == "return":
            rows = delta.routed_experts
            assert rows is not None and len(rows) == PROMPT + self._length - 1 and not delta.routed_experts_missing
        assert (delta.routing_agreement is not None) == (kind == "replay")


def windows_of(kinds: Sequence[str], pace: Fraction, life: int) -> Iterator[Window]:
    """Blocks of four windows without end, of each kind in turn, where `pace` answers begin in a step and each takes `life` steps.

    Windows are of such lengths that answers end at the same places of each.
    """

    def full(steps: int) -> int:
        return pace.denominator * math.ceil(steps / pace.denominator)

    orders = itertools.cycle(((False, True, True, False), (True, False, False, True)))
    steps = {kind: full(STEPS if kind != "replay" else life) for kind in kinds}
    plain = (Window(kind, with_it, full(UNCOUNTED), steps[kind], 0) for order in orders for kind in kinds for with_it in order)
    for window, following in itertools.pairwise(plain):
        yield window._replace(rest=full(life) if "replay" in (window.kind, following.kind) else 0)


def measure(flow: Flow, kinds: Sequence[str], until: Callable[[int], bool]) -> Iterator[dict[str, Any]]:
    """Costs by kind, as shares of the time without, after each round of blocks."""
    windows, ahead = itertools.tee(windows_of(kinds, flow.pace, flow.life))
    coming = (window.kind for window in ahead for _ in range(window.length))
    for _ in range(flow.life - 1):
        flow.step(next(coming))
    found = {kind: Blocks() for kind in kinds}
    plain: list[float] = []
    readings: list[float] = []
    while until(len(plain)):
        for blocks in found.values():
            times: dict[bool, list[Times]] = {False: [], True: []}
            for window in itertools.islice(windows, 4):
                seconds, reading = flow.through(window, coming)
                times[window.with_it].append(seconds)
                if window.kind == "nothing":
                    plain += seconds.tolist()
                if window.kind == "return":
                    readings.append(reading / float(seconds.sum()))
            blocks.add(times[False], times[True])
        figures: dict[str, Any] = {"tokens_per_s": round(len(plain) * flow.tokens_a_step / sum(plain))}
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
    parser.add_argument("--output-len", type=int, default=64, help="tokens of an answer (default: 64)")
    parser.add_argument("--seconds", type=float, default=240.0, help="begin blocks for so long")
    parser.add_argument("--save", action="store_true", help="keep the result, and write the table into docs/routing.md")
    args = parser.parse_args(words)
    on_cpu = args.device == "cpu"
    args.batch = args.batch or (32 if on_cpu else 128)
    kinds = args.kinds or (list(KINDS) if on_cpu else ["nothing", "return"])
    name = "the bundled checkpoint" if on_cpu else f"MiniMax-M2.5's shape, {args.layers} layers"
    with model(args) as llm:
        flow = Flow(llm, args.batch, args.output_len, replays="replay" in kinds)
        end = time.monotonic() + args.seconds
        costs: dict[str, Any] = {}
        for costs in measure(flow, kinds, lambda count: count == 0 or time.monotonic() < end):
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
