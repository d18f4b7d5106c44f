"""How near the engine is to Hugging Face's model of the same checkpoint, in probabilities and in routing.

The engine answers held-out problems greedily, and tells for every token the log-probabilities of the likeliest and the experts of its row.
Hugging Face's model, in float32, reads prompt and answer in one pass. Compared are, at every token of prompts and answers:

* KL(theirs || ours), over the TOP tokens that are likeliest to us, and all others together. That is a lower bound of the whole
  divergence, and all of it but what is left in the tail.
* whether the token that is likeliest to us is so to them;
* whether a token's experts of a layer are the same set.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from pointsman.bench import accuracy
from pointsman.bench.options import AgreementOptions
from pointsman.bench.oracle import load_oracle
from pointsman.bench.subject import machine, settle
from pointsman.engine.llm import LLM, Prompt
from pointsman.request import Logprob, RequestOutput, SamplingParams
from pointsman.rl import record

TOP = 64
LEAST = 1e-12


@dataclass(frozen=True)
class Nearness:
    """Of one answer.

    Attributes:
        kl: in nats, of each token.
        same_top: whether both have the same likeliest token, of each token.
        gap: between the log-probabilities of the token that came, of each token.
        same_experts: [rows, layers], whether the experts are the same set.
    """

    kl: list[float]
    same_top: list[bool]
    gap: list[float]
    same_experts: npt.NDArray[np.bool_]


def eval_agreement(engine: dict[str, Any], options: AgreementOptions) -> int:
    """`pointsman eval agreement`."""
    logging.basicConfig(level=options.log_level.upper())
    with contextlib.closing(LLM(**engine)) as llm:
        oracle = load_oracle(llm.engine.folder)  # before the answers, so that its absence is told at once
        settle(llm.engine)
        tasks = (accuracy.ARITHMETIC, accuracy.TOOLS)
        problems = [problem for task in tasks for problem in accuracy.held_out(task, options.num_questions, options.seed)]
        prompts = [_prompt(llm, problem) for problem in problems]
        params = SamplingParams(
            temperature=0.0, max_tokens=options.max_tokens, logprobs=TOP, prompt_logprobs=TOP, return_routed_experts=True
        )
        results = llm.generate(prompts, params)
        about = machine(llm.engine)
    found = [compare(oracle, result) for result in results]
    summary = summarize(found) | {"num_questions": options.num_questions, "max_tokens": options.max_tokens, "seed": options.seed} | about
    print(
        f"KL to Hugging Face in float32: mean {summary['kl_mean']:.2e}, P99 {summary['kl_p99']:.2e}, highest {summary['kl_max']:.2e} nats"
    )
    print(f"Same likeliest token: {summary['top1_match']:.4f} of {summary['tokens']} tokens")
    print(f"Same experts: {summary['routing_match']:.4f} of {summary['choices']} choices of a token in a layer")
    print(json.dumps(summary, allow_nan=False))
    return 0


def _prompt(llm: LLM, problem: Any) -> Prompt:
    """The conversation by the checkpoint's template; what is said in it, where there is none. Raises ValueError without a tokenizer."""
    if llm.engine.tokenizer is None:
        raise ValueError(f"{llm.engine.folder} has no tokenizer; the problems that are answered are texts")
    if llm.engine.chat_template is None:
        return "\n\n".join(message["content"] for message in problem.messages)
    return llm.render(problem.messages, tools=getattr(problem, "tools", None))


@torch.no_grad()
def compare(oracle: Any, result: RequestOutput) -> Nearness:
    """Read prompt and answer with the other model, and set both side by side."""
    output = result.outputs[0]
    fed = [*result.prompt_token_ids, *output.token_ids][:-1]  # the last token was never fed
    with record(oracle, lengths=[len(fed)]) as recording:
        logits_TV = oracle(torch.tensor([fed])).logits[0]
    theirs_TV = logits_TV.double().log_softmax(-1).numpy()
    assert output.logprobs is not None and result.prompt_logprobs is not None
    entries = [*result.prompt_logprobs[1:], *output.logprobs]
    nexts = [*result.prompt_token_ids[1:], *output.token_ids]
    kl, same_top, gap = [], [], []
    for theirs_V, entry, token in zip(theirs_TV, entries, nexts, strict=True):
        assert entry is not None
        kl.append(divergence(theirs_V, entry))
        same_top.append(min(entry, key=lambda token: entry[token].rank) == int(theirs_V.argmax()))
        gap.append(abs(entry[token].logprob - float(theirs_V[token])))
    rows = recording.records[0].rows_RLK
    same = (np.sort(rows, -1) == np.sort(output.routed_experts, -1)).all(-1)
    return Nearness(kl, same_top, gap, same)


def divergence(theirs_V: npt.NDArray[np.float64], ours: dict[int, Logprob]) -> float:
    """KL(theirs || ours) in nats over the tokens we have log-probabilities of, and all others as one."""
    tokens = list(ours)
    p = np.exp(theirs_V[tokens])
    q = np.exp([ours[token].logprob for token in tokens])
    p, q = (np.maximum(np.append(share, 1 - share.sum()), LEAST) for share in (p, q))
    return max(float((p * np.log(p / q)).sum()), 0.0)


def summarize(found: Sequence[Nearness]) -> dict[str, Any]:
    """Over all tokens of all answers."""
    kl = np.asarray([value for each in found for value in each.kl])
    gaps = [value for each in found for value in each.gap]
    same = np.concatenate([each.same_experts for each in found])
    same_top = [value for each in found for value in each.same_top]
    assert math.isfinite(kl.sum())
    return {
        "eval": "agreement",
        "tokens": len(kl),
        "kl_mean": float(kl.mean()),
        "kl_p99": float(np.percentile(kl, 99)),
        "kl_max": float(kl.max()),
        "logprob_gap_mean": float(np.mean(gaps)),
        "logprob_gap_max": float(np.max(gaps)),
        "top1_match": round(float(np.mean(same_top)), 6),
        "choices": int(same.size),
        "routing_match": round(float(same.mean()), 6),
        "routing_match_by_layer": [round(float(value), 6) for value in same.mean(0)],
    }
