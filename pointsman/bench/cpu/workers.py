"""One contender in a process of its own: `python -m pointsman.bench.cpu.workers NAME FILE`.

FILE is the task as JSON. The first line of the answer on stdout that is JSON is the result. Every contender has the same three calls, and
one formula for all: a sequence decodes (tokens - 1) / (last token - first token), a batch its size times the median of that, as
llama.cpp itself reports it.
"""

from __future__ import annotations

import contextlib
import json
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import msgspec

from pointsman.bench.cpu.llama import LlamaServer
from pointsman.bench.machine import peak_memory_mb
from pointsman.request import SamplingParams

Prompts = Sequence[Sequence[int]]
MARK = "result: "


class Task(msgspec.Struct, frozen=True):
    """What a contender is to do.

    Attributes:
        prompts: for each batch size the batches to time; all prompts differ.
        questions: prompts whose greedy answers are compared.
    """

    folder: str
    engine: dict[str, Any]
    gguf: str
    threads: int
    output_len: int
    prompts: dict[int, list[list[list[int]]]]
    warm: list[list[int]]
    questions: list[list[int]]
    answer_len: int


class Span(msgspec.Struct, frozen=True):
    """One sequence: seconds to its first token, and tokens a second after that."""

    first_s: float
    rate: float


class Contender(Protocol):
    def answers(self, prompts: Prompts, most: int) -> list[list[int]]:
        """Greedy tokens, to the end of the text or to so many."""
        ...

    def spans(self, prompts: Prompts, output_len: int) -> list[Span]:
        """Run a batch greedily, past the end of the text."""
        ...


class Ours:
    """The engine complete: scheduler, sampler, detokenizer."""

    def __init__(self, task: Task) -> None:
        from pointsman.bench.subject import settle  # noqa: PLC0415 - a contender's imports are part of its start
        from pointsman.engine.llm import LLM  # noqa: PLC0415

        self._llm = LLM(task.folder, progress=False, **({"num_threads": task.threads} | task.engine))
        settle(self._llm.engine)

    def answers(self, prompts: Prompts, most: int) -> list[list[int]]:
        results = self._llm.generate([list(prompt) for prompt in prompts], SamplingParams(temperature=0.0, max_tokens=most))
        return [result.outputs[0].token_ids for result in results]

    def spans(self, prompts: Prompts, output_len: int) -> list[Span]:
        from pointsman.bench.latency import deltas  # noqa: PLC0415

        params = SamplingParams(temperature=0.0, max_tokens=output_len, ignore_eos=True)
        first: dict[str, float] = {}
        last: dict[str, float] = {}
        for delta, now in deltas(self._llm.engine, [tuple(prompt) for prompt in prompts], params):
            first.setdefault(delta.rid, now)
            last[delta.rid] = now
        return [Span(first[rid], (output_len - 1) / (last[rid] - first[rid])) for rid in first]


class HuggingFace:
    """transformers in float32, its fastest plain form here: the default attention, experts as grouped matrix products."""

    def __init__(self, task: Task) -> None:
        import torch  # noqa: PLC0415

        from pointsman.bench.oracle import load_oracle  # noqa: PLC0415

        torch.set_num_threads(task.threads)
        self._torch = torch
        self._model = load_oracle(task.folder)

    def _generate(self, prompts: Prompts, most: int, **how: Any) -> Any:
        ids = self._torch.tensor([list(prompt) for prompt in prompts])
        mask = self._torch.ones_like(ids)
        return self._model.generate(ids, attention_mask=mask, max_new_tokens=most, do_sample=False, **how)[:, ids.shape[1] :]

    def answers(self, prompts: Prompts, most: int) -> list[list[int]]:
        return [self._generate([prompt], most)[0].tolist() for prompt in prompts]

    def spans(self, prompts: Prompts, output_len: int) -> list[Span]:
        start = time.perf_counter()
        self._generate(prompts, 1, min_new_tokens=1)
        first = time.perf_counter() - start
        start = time.perf_counter()
        self._generate(prompts, output_len, min_new_tokens=output_len)
        whole = time.perf_counter() - start
        return [Span(first, (output_len - 1) / (whole - first))] * len(prompts)


class Llama:
    """llama.cpp's own server, asked in its process."""

    def __init__(self, task: Task) -> None:
        self._server = LlamaServer(task.gguf, max(task.prompts), _room(task), task.threads)

    def answers(self, prompts: Prompts, most: int) -> list[list[int]]:
        return [self._server.native({"prompt": list(prompt), "n_predict": most, "temperature": 0})["tokens"] for prompt in prompts]

    def spans(self, prompts: Prompts, output_len: int) -> list[Span]:
        found: dict[int, Span] = {}

        def ask(index: int) -> None:
            body = {"prompt": list(prompts[index]), "max_tokens": output_len, "temperature": 0, "ignore_eos": True}
            timings = self._server.complete(body)["timings"]
            assert timings["predicted_n"] == output_len and timings["cache_n"] == 0, timings
            found[index] = Span((time.perf_counter() - start) - timings["predicted_ms"] / 1000, timings["predicted_per_second"])

        threads = [threading.Thread(target=ask, args=(index,)) for index in range(len(prompts))]
        start = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return [found[index] for index in range(len(prompts))]


def _room(task: Task) -> int:
    """Tokens that a sequence may need."""
    longest = max(map(len, task.questions))
    return max(len(task.warm[0]) + task.output_len, longest + task.answer_len) + 8


MAKERS: dict[str, Callable[[Task], Contender]] = {
    "pointsman": Ours,
    "transformers": HuggingFace,
    "llama.cpp f16": Llama,
    "llama.cpp q8_0": Llama,
}


def measure(contender: Contender, task: Task) -> dict[str, Any]:
    """Speeds of every batch size: the median over its batches."""
    sizes = {}
    for size, batches in task.prompts.items():
        runs = [contender.spans(batch, task.output_len) for batch in batches][1:]  # the first warms up
        sizes[str(size)] = {
            "decode_tokens_per_s": statistics.median(size * statistics.median(span.rate for span in run) for run in runs),
            "prefill_s": statistics.median(max(span.first_s for span in run) for run in runs),
            "peak_memory_mb": peak_memory_mb(),
        }
    return sizes


@contextlib.contextmanager
def llama_over_http(task: Task) -> Iterator[str]:
    """Serve a GGUF file; gives the address."""
    server = LlamaServer(task.gguf, max(task.prompts), _room(task), task.threads)  # it ends with its last reference
    yield server.address


def main(name: str, path: str) -> None:
    task = msgspec.json.decode(Path(path).read_bytes(), type=Task)
    if name.endswith(" http"):
        with llama_over_http(task) as address:
            print(MARK + json.dumps({"address": address}), flush=True)
            sys.stdin.read()  # until whoever started this has done
        return
    contender = MAKERS[name](task)
    contender.answers(task.warm[:1], 1)
    first_token = time.time()
    answers = contender.answers(task.questions, task.answer_len)
    sizes = measure(contender, task)
    print(MARK + json.dumps({"first_token_at": first_token, "answers": answers, "sizes": sizes}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
