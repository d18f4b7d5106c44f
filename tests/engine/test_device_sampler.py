"""Tokens drawn by the kernels, as the engine calls them, against the host's sampler: the same tokens, log-probabilities and ranks.

In Triton's interpreter, or on the GPU where there is one. Log-probabilities are float64 sums in another order: 1e-9.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pointsman.distributed import Mesh
from pointsman.engine.batch import Draw
from pointsman.engine.device_lanes import DeviceLanes
from pointsman.engine.device_sampler import DeviceSampler, Kernels
from pointsman.request import SamplingParams
from pointsman.sampling.lane import LaneSampling
from pointsman.sampling.sampler import NO_TOKEN, NOT_FINITE, sample
from pointsman.step import LaneStart
from tests.kernels.interpreter import correct

correct()
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
V = 300
HERE: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 0.0, "logprobs": 0},
    {"temperature": 1.0},
    {"temperature": 0.7, "top_k": 20, "top_p": 0.9, "logprobs": 0},
    {"temperature": 1.3, "top_p": 0.8, "min_p": 0.02},
    {"temperature": 2.0, "min_p": 0.1},
    {"temperature": 1.0, "top_k": 64},
    {"temperature": 1.0, "logprobs": 1},
    {"temperature": 0.0, "logprobs": 20},
    {"temperature": 0.8, "top_p": 0.9, "logprobs": 64},
]
HOST: list[dict[str, Any]] = [
    {"temperature": 1.0, "top_k": 65},
    {"temperature": 0.0, "repetition_penalty": 1.1},
    {"temperature": 0.0, "min_tokens": 40},
    {"temperature": 0.0, "logit_bias": {3: 1.0}},
]


def lanes_of(ways: list[dict[str, Any]], output: int = 3) -> list[LaneSampling]:
    """Lanes with seeds of up to 64 bits that have drawn some tokens already."""
    seeds = [2**64 - 1 - 977 * lane if lane % 2 else lane for lane in range(len(ways))]
    return [
        LaneSampling(LaneStart(lane, lane, (1,), (2,) * (output + lane), SamplingParams(**way), seed), V, (2,))
        for lane, (way, seed) in enumerate(zip(ways, seeds, strict=True))
    ]


def test_what_kernels_cannot_draw_is_left_to_the_host() -> None:
    way = Kernels()
    way.make_ready(DEVICE, V, torch.float32)
    assert all(way.takes(lane) for lane in lanes_of(HERE))
    assert not any(way.takes(lane) for lane in lanes_of(HOST))


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # inf - inf, of which a GPU says nothing
@pytest.mark.parametrize("seed", range(3))
def test_tokens_are_the_hosts(seed: int) -> None:
    ways = [*HERE, HOST[0], *HERE]
    logits_RV = torch.randn(len(ways), V, generator=torch.Generator().manual_seed(seed)) * 3
    logits_RV[1] = logits_RV[1].round()  # ties
    logits_RV[13, 17] = float("inf")
    want = sample(logits_RV, lanes_of(ways))
    mine, tables = lanes_of(ways), DeviceLanes(len(ways), 1, DEVICE)
    drawing = DeviceSampler(tables, DEVICE, Kernels(), Mesh.single()).draw(
        logits_RV.to(DEVICE), [Draw(lane, lane, sampling) for lane, sampling in enumerate(mine)]
    )
    drawn = drawing.drawn()
    assert drawing.indices == [*range(10), *range(11, 21)]
    last = tables.last_token_L.tolist()
    for at, index in enumerate(drawing.indices):
        assert drawn.tokens[at] == want.tokens[index], ways[index]
        assert drawn.errors.get(at) == want.errors.get(index)
        assert last[index] == max(want.tokens[index], 0) and mine[index].num_output == 4 + index
        theirs, ours = want.logprobs.get(index), drawn.logprobs.get(at)
        assert (ours is None) == (theirs is None)
        if ours is not None and theirs is not None:
            assert [(token, found.rank) for token, found in ours.items()] == [(token, found.rank) for token, found in theirs.items()]
            for token, found in theirs.items():
                assert ours[token].logprob == pytest.approx(found.logprob, abs=1e-9)
    assert drawn.tokens[12] == NO_TOKEN and drawn.errors == {12: NOT_FINITE}
