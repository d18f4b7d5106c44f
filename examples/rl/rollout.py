"""The rollout engine: `pointsman serve` in a process of its own, asked over HTTP; its weights come over a process group."""

from __future__ import annotations

import concurrent.futures
import json
import re
import subprocess
import sys
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pointsman.bench.arithmetic import ArithmeticProblem
from pointsman.rl.weight_sync import WeightSync
from pointsman.routed_experts import RoutedExperts, decode_record

READY = re.compile(r"ready at (http://\S+)")
TIMEOUT = 600.0


@dataclass(frozen=True)
class Sample:
    """One answer: its tokens, the engine's log-probability of each, what it says, and the routing of prompt and answer."""

    problem: ArithmeticProblem
    prompt: list[int]
    answer: list[int]
    logprobs: list[float]
    text: str
    routing: RoutedExperts
    weight_version: str


class Rollout:
    """A server on this machine, ended with the `with` block.

    Attributes:
        weights: the way by which new ones get there, a process group with gloo.
    """

    def __init__(self, folder: Path) -> None:
        command = [sys.executable, "-m", "pointsman", "serve", "--model-path", str(folder), "--port", "0", "--log-level", "warning"]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        self._url = self._address()
        self.weights = WeightSync(self._url)

    def _address(self) -> str:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if found := READY.search(line):
                return found[1]
        raise RuntimeError(f"the server ended with {self._process.wait()} before it was ready")

    def __enter__(self) -> Rollout:
        try:
            self.weights.connect()
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.weights.disconnect()
        finally:
            self._end()

    def _end(self) -> None:
        self._process.terminate()
        self._process.wait()

    def post(self, path: str, body: dict[str, Any]) -> Any:
        data = json.dumps(body).encode()
        request = urllib.request.Request(self._url + path, data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=TIMEOUT) as answer:
            return json.loads(answer.read())

    def sample(self, problems: Sequence[ArithmeticProblem], *, group: int, max_tokens: int, seed: int) -> list[list[Sample]]:
        """`group` answers to each problem at temperature 1."""
        with concurrent.futures.ThreadPoolExecutor(len(problems)) as pool:
            return list(pool.map(lambda entry: self._answers(entry[1], group, max_tokens, seed + entry[0]), enumerate(problems)))

    def _answers(self, problem: ArithmeticProblem, group: int, max_tokens: int, seed: int) -> list[Sample]:
        sampling = {"n": group, "max_tokens": max_tokens, "temperature": 1, "top_p": 1, "top_k": 0, "seed": seed}
        wanted = {"logprobs": True, "return_token_ids": True, "return_routed_experts": True}
        answer = self.post("/v1/chat/completions", {"messages": problem.messages, **sampling, **wanted})
        version = answer["metadata"]["weight_version"]
        return [_sample(problem, answer["prompt_token_ids"], choice, version) for choice in answer["choices"]]


def _sample(problem: ArithmeticProblem, prompt: list[int], choice: dict[str, Any], version: str) -> Sample:
    return Sample(
        problem=problem,
        prompt=prompt,
        answer=choice["token_ids"],
        logprobs=[entry["logprob"] for entry in choice["logprobs"]["content"]],
        text=choice["message"]["content"] or "",
        routing=decode_record(choice["routed_experts"]),
        weight_version=version,
    )
