"""Forced routing against Hugging Face's model under hooks that force the same experts, and through the engine on both steps.

A hook on a router gives back the ids it is told and weights made anew of the router's own logits; it also sees what the router would
have chosen, which is the oracle of `routing_agreement`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import MiniMaxM2ForCausalLM

from pointsman import LLM, RequestOutput, SamplingParams
from pointsman.models.loader import load_model
from pointsman.routed_experts import RoutedExperts
from tests.models.checkpoints import Harness, Shape, dequantized, write
from tests.models.test_hugging_face import exact_model

SHAPES = {
    "plain": Shape(),
    "three layers, seven experts, top 3": Shape(layers=3, experts=7, top_k=3),
    "fp8 small blocks": Shape(layers=3, hidden=64, heads=8, kv_heads=2, head_dim=16, width=32, experts=6, top_k=4, block=(16, 32)),
    "one expert": Shape(layers=2, experts=3, top_k=1),
}
SEED = 4


@pytest.fixture(scope="module", params=SHAPES)
def shape(request: pytest.FixtureRequest) -> Shape:
    return SHAPES[request.param]


@pytest.fixture(scope="module")
def model(shape: Shape) -> MiniMaxM2ForCausalLM:
    return exact_model(shape, SEED)


@pytest.fixture(scope="module")
def folder(shape: Shape, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shape.write(tmp_path_factory.mktemp("forced") / "model", seed=SEED)


@pytest.fixture(scope="module", params=["torch", "compiled"])
def llm(request: pytest.FixtureRequest, shape: Shape, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    """The compiled step has the same weights in float32: a combination of stored forms that other tests compile too."""
    if request.param == "compiled":
        config = {name: value for name, value in shape.config().items() if name not in ("quantization_config", "torch_dtype")}
        folder = tmp_path_factory.mktemp("forced") / "float32"
        write(folder, config | {"torch_dtype": "float32"}, dequantized(shape.tensors(SEED), shape.block))
    model = LLM(str(folder), progress=False, cpu_step=request.param, dtype="float32", chunked_prefill_size=16, page_size=4)
    yield model
    model.close()


def any_rows(shape: Shape, count: int, seed: int) -> Tensor:
    """Experts at random, in any order, [count, layers, top_k]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, shape.layers, shape.experts, generator=generator).argsort(-1)[..., : shape.top_k]


@contextlib.contextmanager
def forced(model: MiniMaxM2ForCausalLM, ids_TNK: Tensor, known_T: Tensor, free_TNK: Tensor) -> Iterator[None]:
    """The model's routers take these ids where they are known, and write down what they would have chosen."""

    def hook(layer: int) -> Any:
        def replace(gate: torch.nn.Module, inputs: Any, output: Any) -> Any:
            logits, _, chosen = output
            free_TNK[:, layer] = chosen
            ids = torch.where(known_T.unsqueeze(-1), ids_TNK[:, layer], chosen)
            weights = logits.float().sigmoid().gather(-1, ids)
            return logits, (weights / weights.sum(-1, keepdim=True)).to(output[1].dtype), ids

        return replace

    handles = [layer.mlp.gate.register_forward_hook(hook(number)) for number, layer in enumerate(model.model.layers)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def oracle(model: MiniMaxM2ForCausalLM, tokens: list[int], ids_TNK: Tensor, known_T: Tensor) -> tuple[Tensor, Tensor]:
    """Logits [T, V] under these experts, and in how many layers free routing would have chosen the same set, [T]."""
    free_TNK = torch.zeros_like(ids_TNK)
    with forced(model, ids_TNK, known_T, free_TNK):
        logits = model(torch.tensor([tokens])).logits[0]
    return logits, (free_TNK.sort(-1).values == ids_TNK.sort(-1).values).all(-1).sum(-1)


def a_record(shape: Shape, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Rows at random, some of them not known."""
    known_T = torch.rand(count, generator=torch.Generator().manual_seed(seed)) < 0.8
    return any_rows(shape, count, seed), known_T


@pytest.mark.parametrize("cut", [1, 17, 40])
def test_the_decoder_routes_as_it_is_told(shape: Shape, model: MiniMaxM2ForCausalLM, folder: Path, cut: int) -> None:
    tokens = np.random.default_rng(1).integers(0, shape.vocab, 40).tolist()
    ids_TNK, known_T = a_record(shape, 40, cut)
    want, alike_T = oracle(model, tokens, ids_TNK, known_T)
    harness, replay_TNK = Harness(load_model(folder)), torch.where(known_T.view(-1, 1, 1), ids_TNK, -1)
    parts = [
        harness.step({1: part}, replay)[1] for part, replay in ((tokens[:cut], replay_TNK[:cut]), (tokens[cut:], replay_TNK[cut:])) if part
    ]
    # the tolerance of test_hugging_face: the order of float32 sums
    torch.testing.assert_close(torch.cat(parts), want, atol=2e-5, rtol=0)
    slots = harness.slots(1, 0, 40)
    assert torch.equal(harness.routes.gather(slots).long()[known_T], ids_TNK[known_T])
    assert torch.equal(harness.routes.alike_S[slots][known_T].long(), alike_T[known_T])


def test_the_engine_scores_under_the_routing_it_is_told(shape: Shape, model: MiniMaxM2ForCausalLM, llm: LLM) -> None:
    """Prompts of several lengths at once, in chunks of 16, with rows from somewhere on, some of them missing."""
    rng = np.random.default_rng(2)
    prompts = [rng.integers(0, shape.vocab, length).tolist() for length in (50, 9, 33)]
    records, wants = [], []
    for number, prompt in enumerate(prompts):
        ids_TNK, known_T = a_record(shape, len(prompt), number)
        start = 3 * number
        known_T[:start] = False
        logits, alike_T = oracle(model, prompt, ids_TNK, known_T)
        gaps = [row - start for row in range(start, len(prompt)) if not known_T[row]]
        records.append(
            RoutedExperts(
                rows_RLK=ids_TNK[start:].to(torch.uint8).numpy(),
                num_experts=shape.experts,
                start=start,
                layers=tuple(range(shape.layers)),
                missing=tuple((row, row + 1) for row in gaps),
            )
        )
        wants.append((logits.log_softmax(-1), alike_T[known_T].sum() / (known_T.sum() * shape.layers)))
    results = llm.generate(prompts, SamplingParams(max_tokens=0, prompt_logprobs=0), replay_routed_experts=records)
    for prompt, result, (logprobs, agreement) in zip(prompts, results, wants, strict=True):
        got = scores(result)
        want = [float(logprobs[position, token]) for position, token in enumerate(prompt[1:])]
        np.testing.assert_allclose(got, want, atol=5e-5, rtol=0)
        assert result.outputs[0].routing_agreement == pytest.approx(float(agreement), abs=1e-6)


def scores(result: RequestOutput) -> list[float]:
    assert result.prompt_logprobs is not None
    entries = zip(result.prompt_token_ids[1:], result.prompt_logprobs[1:], strict=True)
    return [entry[token].logprob for token, entry in entries if entry is not None]


def test_decoding_is_forced_as_prefill_is(shape: Shape, model: MiniMaxM2ForCausalLM, llm: LLM) -> None:
    """Greedy tokens under a replay are those of the model under the same hooks, one by one."""
    tokens = np.random.default_rng(3).integers(0, shape.vocab, 7).tolist()
    ids_TNK = any_rows(shape, 7 + 23, 5)
    params = SamplingParams(max_tokens=24, temperature=0.0, ignore_eos=True, logprobs=0)
    output = llm.generate(tokens, params, replay_routed_experts=ids_TNK)[0].outputs[0]
    assert output.logprobs is not None
    whole = [*tokens, *output.token_ids]
    logits, alike_T = oracle(model, whole[:-1], ids_TNK, torch.ones(30, dtype=torch.bool))
    assert logits[6:].argmax(-1).tolist() == output.token_ids
    want = logits[6:].log_softmax(-1).gather(-1, torch.tensor(output.token_ids).unsqueeze(-1)).flatten()
    got = [entry[token].logprob for token, entry in zip(output.token_ids, output.logprobs, strict=True)]
    np.testing.assert_allclose(got, want.numpy(), atol=5e-5, rtol=0)
    assert output.routing_agreement == pytest.approx(float(alike_T.sum()) / (30 * shape.layers), abs=1e-6)


def test_runners_differ_by_their_numerics_alone(tmp_path: Path) -> None:
    """The same answers scored by the W8A8 reference and by `cpu`, under their record and freely.

    Products of e4m3 activations carry 2.5 % of rounding each (test_hugging_face); here that comes to 0.053 of a log-probability, root mean
    square, and to 0.070 where the router decides anew.
    """
    folder = SHAPES["fp8 small blocks"].write(tmp_path / "model", seed=3)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(5, 97, 30).tolist() for _ in range(8)]
    llm = LLM(str(folder), progress=False)
    params = SamplingParams(max_tokens=100, seed=1, logprobs=0, ignore_eos=True, return_routed_experts=True)
    rollouts = llm.generate(prompts, params)
    llm.close()
    records = [rollout.outputs[0].routed_experts for rollout in rollouts]
    wholes = [[*rollout.prompt_token_ids, *rollout.outputs[0].token_ids] for rollout in rollouts]
    llm = LLM(str(folder), progress=False, moe_runner_backend="reference", fp8_gemm_backend="reference")
    scoring = SamplingParams(max_tokens=0, prompt_logprobs=0)
    distances = []
    for replay in (records, None):
        results = llm.generate(wholes, scoring, replay_routed_experts=replay)
        assert replay is None or all(0.9 < (result.outputs[0].routing_agreement or 0) < 1 for result in results)
        apart = [np.array(scores(result)[29:]) - drawn(rollout) for result, rollout in zip(results, rollouts, strict=True)]
        distances.append(float(np.sqrt(np.square(np.concatenate(apart)).mean())))
    llm.close()
    assert distances[0] < 0.065
    assert distances[0] < 0.9 * distances[1]


def drawn(rollout: RequestOutput) -> np.ndarray:
    output = rollout.outputs[0]
    assert output.logprobs is not None
    return np.array([entry[token].logprob for token, entry in zip(output.token_ids, output.logprobs, strict=True)])
