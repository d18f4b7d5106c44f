"""Weights under which a layout adds nothing otherwise than one rank does: tokens and experts are then equal, and no rounding excuses them.

Of what the ranks add, one rank's part alone is not zero. Each channel of the hidden state belongs to a rank: only that rank's heads write
to it, and of the experts only those that are that rank's in all layouts, by its columns. Heads of all but the first rank have keys and
queries of zero, so that the sum of their squares is the first rank's. Whatever differs then is a fault. Log-probabilities are those of
logits that are multiplied for a part of the vocabulary at a time, which a library may do in another order.
"""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pointsman import LLM, SamplingParams
from pointsman.request import CompletionOutput
from tests.models.checkpoints import Shape, write

SHAPE = Shape(layers=3, hidden=256, heads=4, kv_heads=2, head_dim=64, rotary_dim=32, experts=8, width=256, vocab=256, block=(128, 128))
PROMPTS = [[(11 * index + 5 * number) % SHAPE.vocab for index in range(9 + 31 * number)] for number in range(5)]
GREEDY = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True, logprobs=1, return_routed_experts=True)
CPU = {"device": "cpu", "dtype": "bfloat16", "moe_runner_backend": "reference", "fp8_gemm_backend": "reference", "cpu_step": "torch"}
# logits of size 4: their float32 sums on a CPU, and on a GPU their rounding to bfloat16
ON_CPU, ON_GPU = 1e-6, 2**-6
LAYOUTS = [{"tp": 2}, {"tp": 2, "ep": 2}]
# each of four ranks has a block of heads, and one of every expert's columns
WIDE = dataclasses.replace(SHAPE, hidden=512, heads=8, kv_heads=4, width=512)
LAYOUTS_OF_FOUR = [{"tp": 4}, {"tp": 4, "ep": 2}, {"tp": 4, "ep": 4}]


def separated(tensors: dict[str, Tensor], shape: Shape, ranks: int) -> dict[str, Tensor]:
    """The same with a zero wherever two of so many ranks would add to one channel."""
    owner_D = torch.arange(shape.hidden) % ranks
    kept = {name: tensor.clone() for name, tensor in tensors.items()}
    for name, tensor in kept.items():
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            tensor[len(tensor) // ranks :] = 0
        elif name.endswith(("o_proj.weight", "w2.weight")):
            part_F = torch.arange(tensor.shape[1]) * ranks // tensor.shape[1]
            mine_DF = owner_D[:, None] == part_F
            if "experts" in name:
                expert = int(name.split(".experts.")[1].split(".")[0])
                mine_DF &= owner_D[:, None] == expert * ranks // shape.experts
            tensor.view(torch.uint8)[~mine_DF] = 0  # zero in e4m3
    return kept


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("separated")
    write(folder, SHAPE.config(), separated(SHAPE.tensors(0), SHAPE, 2))
    return folder


@pytest.fixture(scope="module")
def folder_of_four(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("separated")
    write(folder, WIDE.config(), separated(WIDE.tensors(0), WIDE, 4))
    return folder


def ask(folder: Path, **options: Any) -> list[CompletionOutput]:
    with contextlib.closing(LLM(str(folder), progress=False, max_running_requests=8, max_total_tokens=4096, **options)) as llm:
        return [result.outputs[0] for result in llm.generate(PROMPTS, GREEDY)]


def check(got: list[CompletionOutput], want: list[CompletionOutput], tolerance: float) -> None:
    for mine, theirs in zip(got, want, strict=True):
        assert mine.token_ids == theirs.token_ids
        assert np.array_equal(mine.routed_experts, theirs.routed_experts)
        for token, one, other in zip(mine.token_ids, mine.logprobs or (), theirs.logprobs or (), strict=True):
            assert one[token].logprob == pytest.approx(other[token].logprob, abs=tolerance)


def compare(folder: Path, layouts: list[dict[str, int]]) -> None:
    want = ask(folder, **CPU)
    assert len({token for answer in want for token in answer.token_ids}) > 20  # the model is lively
    for layout in layouts:
        check(ask(folder, **CPU, **layout), want, ON_CPU)


def test_ranks_on_a_cpu(folder: Path) -> None:
    compare(folder, LAYOUTS)


def test_four_ranks_on_a_cpu(folder_of_four: Path) -> None:
    compare(folder_of_four, LAYOUTS_OF_FOUR)


@pytest.mark.multi_gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_ranks_on_gpus(folder: Path) -> None:
    options = {"device": "cuda", "cuda_graph_max_bs": 8}
    want = ask(folder, **options)
    for layout in LAYOUTS:
        check(ask(folder, **options, **layout), want, ON_GPU)
