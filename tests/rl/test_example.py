"""The example of the loop: its trainer is the checkpoint, its arithmetic is GRPO's, and its quick run ends as it says."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from benchmarks import replay as benchmark
from examples.rl import grpo, trainer
from examples.rl.rollout import Sample
from pointsman import LLM, SamplingParams, tiny
from pointsman.bench.arithmetic import is_heldout
from pointsman.rl import record, replay
from pointsman.routed_experts import RoutedExperts

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    return trainer.load(tiny.path())


def test_what_is_loaded_is_written_back_bit_for_bit(model):
    """Dequantizing and quantizing again gives every byte of the checkpoint, so a sync changes what training changed and no more."""
    theirs = {name: tensor for file in tiny.path().glob("*.safetensors") for name, tensor in load_file(file).items()}
    ours = dict(trainer.published(model))
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype
        assert torch.equal(ours[name].float(), tensor.float()), name


def test_the_table_of_replay_is_what_was_measured():
    found = benchmark.PLACE.search(benchmark.DOCUMENT.read_text())
    assert found is not None
    assert benchmark.document(json.loads(benchmark.RESULT.read_text())) in found[0]


def sample(text: str, answer: int = 6) -> Sample:
    problem = dataclasses.replace(next(grpo.problems(0)), answer=answer)
    routing = RoutedExperts(rows_RLK=np.zeros((0, 6, 4), np.uint8), num_experts=16, layers=tuple(range(6)))
    return Sample(problem=problem, prompt=[1], answer=[2], logprobs=[-1.0], text=text, routing=routing, weight_version="0")


def test_rewards_and_advantages():
    group = [sample("2 * 3 = 6"), sample("2 * 3 = 5"), sample("6"), sample("")]
    assert [grpo.reward(each) for each in group] == [1, 0, 1, 0]
    assert grpo.advantages([group, [group[0]] * 3]) == pytest.approx([1, -1, 1, -1, 0, 0, 0])


def test_kl_is_the_estimate_that_it_says():
    theirs, ours = torch.tensor([-1.0, -2.0]), torch.tensor([-1.5, -2.0])
    assert grpo.kl(theirs, ours) == pytest.approx((math.exp(0.5) - 1.5) / 2)
    assert grpo.kl(ours, ours) == 0


def test_noise_is_as_large_as_told_and_spares_the_routers(model):
    other = trainer.load(tiny.path())
    grpo.shake(other, 0.5, seed=0)
    for (name, before), after in zip(model.named_parameters(), other.parameters(), strict=True):
        relative = float(((after - before).std() / before.std()).detach())
        assert abs(relative - 0.5) < 0.02 if "_proj" in name else relative == 0


def test_problems_are_short_and_of_the_training_split():
    problems = grpo.problems(1)
    for problem in (next(problems) for _ in range(50)):
        assert problem.steps <= 2
        assert not is_heldout(problem.messages[0]["content"])


def test_the_engine_and_the_trainer_agree_where_routing_is_replayed(model):
    """The bundled checkpoint on the engine's default step and in Hugging Face's model: what is left is the order of float32 sums, and keys
    and values rounded to bfloat16 in the engine's cache, which move a log-probability by some hundredths where the model is unsure."""
    llm = LLM()
    problems = [next(grpo.problems(seed)) for seed in range(4)]
    how = SamplingParams(temperature=1.0, max_tokens=64, logprobs=0, return_routed_experts=True, seed=0)
    results = llm.chat([problem.messages for problem in problems], how)
    llm.close()
    for result in results:
        output = result.outputs[0]
        ids = torch.tensor([[*result.prompt_token_ids, *output.token_ids]])
        layout = {"lengths": [ids.shape[1]]}
        with torch.no_grad(), replay(model, [output.routed_experts], **layout) as forced, record(model, **layout) as used:
            logits = model(ids).logits[0]
        rows = used.records[0].rows_RLK[:-1]
        assert np.array_equal(np.sort(rows), np.sort(output.routed_experts))
        assert forced.agreement > 0.95
        spoken = logits[len(result.prompt_token_ids) - 1 : -1].log_softmax(-1).gather(-1, torch.tensor(output.token_ids)[:, None])[:, 0]
        assert output.logprobs is not None
        engine = torch.tensor([step[token].logprob for token, step in zip(output.token_ids, output.logprobs, strict=True)])
        torch.testing.assert_close(spoken, engine, atol=0.2, rtol=0)
        assert float((spoken - engine).abs().mean()) < 0.01


def test_the_quick_run_ends_with_its_line(tmp_path):
    command = [sys.executable, str(ROOT / "examples" / "rl" / "grpo.py"), "--quick", "--steps", "9", "--out", str(tmp_path / "grpo.png")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path, env=os.environ)
    assert done.returncode == 0, done.stderr
    line = json.loads(done.stdout.splitlines()[-1])
    assert line["steps"] == 3
    assert 0 <= line["reward"] <= 1
    assert 0.9 < line["routing_agreement"] <= 1
    for name in ("kl_with_replay", "kl_without_replay"):
        assert 0 <= line[name] < 0.1
    assert (tmp_path / "grpo.png").read_bytes().startswith(b"\x89PNG")
    [arm] = json.loads((tmp_path / "grpo.json").read_text()).values()
    assert len(arm) == 3
