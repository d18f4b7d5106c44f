"""The bundled checkpoint over two devices beside one: answers, experts, log-probabilities, and what it takes to be ready.

    python -m benchmarks.layouts --device cuda                 two GPUs; writes benchmarks/results/layouts_CARD.json
    python -m benchmarks.layouts --device cpu --bfloat16       what rounding alone does: the reference operations in bfloat16
    python -m benchmarks.layouts --device cpu                  the CPU's own operations, in float32

Layouts are compared with the first one over the tokens before the first that differs; of a token in a layer all experts must be the same.
The model is much too small to be faster on two devices: times are told, and say nothing of a model that is split for its size.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pointsman import LLM, SamplingParams
from pointsman.bench.accuracy import ARITHMETIC, held_out
from pointsman.bench.machine import here
from pointsman.request import CompletionOutput

RESULTS = Path(__file__).parent / "results"
LAYOUTS: dict[str, dict[str, Any]] = {"tp1": {}, "tp2": {"tp": 2}, "tp2+ep2": {"tp": 2, "ep": 2}}
WITHOUT_GRAPHS = {"tp2, no graphs": {"tp": 2, "disable_cuda_graph": True}}
REFERENCE = {"dtype": "bfloat16", "moe_runner_backend": "reference", "fp8_gemm_backend": "reference"}
SIZES: dict[str, Any] = {"chunked_prefill_size": 256, "max_running_requests": 16, "max_total_tokens": 16384}
DRAWN = SamplingParams(temperature=1.0, top_p=0.9, seed=5, presence_penalty=0.3, max_tokens=24)


@dataclass
class Answers:
    """What a layout said: greedy answers, some drawn ones, and what is told of it."""

    greedy: list[CompletionOutput]
    drawn: list[list[int]]
    report: dict[str, Any]


class Heard(logging.Handler):
    """Keeps what the engine says of its exchange."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if (line := record.getMessage()).startswith("sums over ranks"):
            self.lines.append(line)


def run(options: dict[str, Any], questions: int, max_tokens: int) -> Answers:
    problems = held_out(ARITHMETIC, questions, 0)
    params = SamplingParams(temperature=0.0, max_tokens=max_tokens, logprobs=0, return_routed_experts=True)
    heard, log = Heard(), logging.getLogger("pointsman")
    log.addHandler(heard)
    begin = time.perf_counter()
    with contextlib.closing(LLM(progress=False, **SIZES, **options)) as llm:
        ready = time.perf_counter()
        prompts = [llm.render(problem.messages) for problem in problems]
        results = llm.generate(prompts, params)
        end = time.perf_counter()
        drawn = [result.outputs[0].token_ids for result in llm.generate(prompts[:8], DRAWN)]
    log.removeHandler(heard)
    answers = [result.outputs[0] for result in results]
    right = sum(ARITHMETIC.check(problem, answer.text) == "right" for problem, answer in zip(problems, answers, strict=True))
    report = {"ready_s": round(ready - begin, 1), "answers_s": round(end - ready, 2), "right": right, "of": questions}
    return Answers(answers, drawn, report | ({"exchange": heard.lines[0]} if heard.lines else {}))


def compare(mine: Answers, theirs: Answers) -> dict[str, Any]:
    """How near one layout is to another."""
    num_alike = num_tokens = num_choices = num_equal = 0
    worst = 0.0
    for one, other in zip(mine.greedy, theirs.greedy, strict=True):
        pairs = list(zip(one.token_ids, other.token_ids, strict=False))
        alike = next((at for at, (a, b) in enumerate(pairs) if a != b), len(pairs))
        num_alike, num_tokens = num_alike + alike, num_tokens + len(other.token_ids)
        told = [[row[token].logprob for token, row in zip(answer.token_ids, answer.logprobs or (), strict=True)] for answer in (one, other)]
        worst = max([worst, *(abs(a - b) for a, b in zip(told[0][:alike], told[1][:alike], strict=True))])
        assert one.routed_experts is not None and other.routed_experts is not None
        fed = len(other.routed_experts) - len(other.token_ids) + alike  # the prompt's rows, and all but the last of the output's
        rows = [np.sort(answer.routed_experts[:fed], -1) for answer in (one, other)]
        num_equal, num_choices = num_equal + int((rows[0] == rows[1]).all(-1).sum()), num_choices + rows[0][..., 0].size
    return {
        "answers_equal": sum(one.token_ids == other.token_ids for one, other in zip(mine.greedy, theirs.greedy, strict=True)),
        "tokens_before_a_difference": num_alike,
        "tokens": num_tokens,
        "worst_logprob": worst,
        "expert_sets_equal": num_equal / num_choices,
        "drawn_equal": sum(one == other for one, other in zip(mine.drawn, theirs.drawn, strict=True)),
        "drawn": len(theirs.drawn),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), required=True)
    parser.add_argument("--bfloat16", action="store_true")
    parser.add_argument("--questions", type=int, default=40)
    parser.add_argument("--max-tokens", type=int, default=256)
    parser.add_argument("--out")
    args = parser.parse_args()
    on_gpu = args.device == "cuda"
    # graphs of all sizes would be most of the time that this takes; the compiled CPU step runs one rank, so both run op by op
    common: dict[str, Any] = (
        {"device": args.device} | (REFERENCE if args.bfloat16 else {}) | ({} if on_gpu else {"cpu_step": "torch", "num_threads": 2})
    )
    device = torch.cuda.get_device_name() if on_gpu else "cpu"
    result: dict[str, Any] = {"device": device, **here(), "common": common, "layouts": {}}
    answers: dict[str, Answers] = {}
    for name, options in (LAYOUTS | (WITHOUT_GRAPHS if on_gpu else {})).items():
        graphs = {"cuda_graph_max_bs": 16} if on_gpu and name not in WITHOUT_GRAPHS else {}
        answers[name] = run(common | options | graphs, args.questions, args.max_tokens)
        base = "tp2" if name in WITHOUT_GRAPHS else "tp1"
        near = {} if name == "tp1" else {f"beside {base}": compare(answers[name], answers[base])}
        result["layouts"][name] = answers[name].report | near
        print(name, json.dumps(result["layouts"][name]), flush=True)
        if args.out or on_gpu:
            path = Path(args.out) if args.out else RESULTS / f"layouts_2x{device.split()[1].lower()}.json"
            path.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
