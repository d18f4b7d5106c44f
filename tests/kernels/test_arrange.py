"""Sorting pairs by expert against a stable sort, and quantization against the reference."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pointsman.kernels import reference
from pointsman.kernels.arrange import Arrangement, arrange, most_blocks, spread
from tests.kernels.interpreter import correct

correct()
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def routings() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    spread = torch.stack([torch.randperm(12, generator=generator)[:4] for _ in range(50)])
    padded = spread.clone()
    padded[[3, 20, 49]] = -1
    return {
        "one token": spread[:1],
        "spread": spread,
        "skewed": torch.cat([torch.tensor([[0, 1, 2, 3]]).expand(40, 4), spread[:3]]),
        "one expert": torch.full((70, 1), 11),
        "the first alone": torch.zeros(2, 1, dtype=torch.int64),
        "padding": padded,
        "nothing but padding": torch.full((5, 4), -1),
        "many": torch.randint(12, (400, 3), generator=generator),
    }


@pytest.mark.parametrize("name", routings())
@pytest.mark.parametrize("block", [16, 64])
def test_pairs_are_sorted_stably_and_padded(name: str, block: int) -> None:
    ids_TK = routings()[name].int().to(DEVICE)
    arranged, q_TD, scale_TG = arrange(ids_TK, 12, block)
    assert q_TD is None and scale_TG is None
    check(arranged, ids_TK, block)


@pytest.mark.parametrize("name", routings())
@pytest.mark.parametrize("block", [16, 64])
def test_rows_are_spread_in_the_same_order(name: str, block: int) -> None:
    ids_TK = routings()[name].int().to(DEVICE)
    x_TD = torch.randn(len(ids_TK), 384, generator=torch.Generator().manual_seed(2)).bfloat16().to(DEVICE)
    arranged, q_PD, scale_GP = spread(ids_TK, 12, block, x_TD)
    check(Arrangement(*arranged[:3]), ids_TK, block)
    experts = arranged.expert_B[: int(arranged.num_blocks)].tolist()
    assert arranged.first_E.tolist() == [sum(expert < own for expert in experts) for own in range(13)]
    assert not arranged.counters.any()
    want_TD, want_TG = reference.quantize_activation(x_TD)
    pairs_P = arranged.pairs_P[: int(arranged.num_blocks) * block].long()
    place_R = (pairs_P < ids_TK.numel()).nonzero().flatten()
    token_R = pairs_P[place_R] // ids_TK.shape[1]
    assert torch.equal(q_PD.view(torch.uint8)[place_R], want_TD.contiguous().view(torch.uint8)[token_R])
    assert torch.equal(scale_GP[:, place_R], want_TG[token_R].T)


def check(arranged: Arrangement, ids_TK: Tensor, block: int) -> None:
    """Against a stable sort."""
    pairs_P, expert_B, num_blocks = arranged
    flat, num_pairs = ids_TK.flatten().tolist(), ids_TK.numel()
    expected_pairs: list[int] = []
    expected_experts: list[int] = []
    for expert in range(12):
        mine = [pair for pair in range(num_pairs) if flat[pair] == expert]
        blocks = -(-len(mine) // block)
        expected_pairs += mine + [num_pairs] * (blocks * block - len(mine))
        expected_experts += [expert] * blocks
    count = len(expected_experts)
    assert num_blocks.tolist() == [count] and count <= most_blocks(num_pairs, 12, block)
    assert pairs_P.tolist()[: count * block] == expected_pairs and expert_B.tolist()[:count] == expected_experts


@pytest.mark.parametrize("seed", range(4))
def test_no_routing_needs_more_than_the_most_blocks(seed: int) -> None:
    """Counts that waste most: as many experts as possible with one pair more than whole blocks."""
    generator = torch.Generator().manual_seed(seed)
    for num_pairs in (1, 7, 16, 100, 1000):
        for num_experts in (1, 8, 256):
            for block in (16, 128):
                used = min(num_pairs, num_experts)
                counts = torch.full((used,), 1)
                while int(counts.sum()) + block <= num_pairs:
                    counts[int(torch.randint(used, (1,), generator=generator))] += block
                counts[0] += num_pairs - int(counts.sum())
                assert int(torch.ceil(counts / block).sum()) <= most_blocks(num_pairs, num_experts, block)


def test_quantization_has_the_references_bits() -> None:
    x_TD = (torch.randn(7, 384, generator=torch.Generator().manual_seed(1)) * torch.logspace(-20, 20, 7)[:, None]).bfloat16().to(DEVICE)
    x_TD[3, :200] = 0
    ids_TK = torch.zeros(7, 2, dtype=torch.int64, device=DEVICE)
    _, q_TD, scale_TG = arrange(ids_TK, 3, 16, x_TD)
    want_TD, want_TG = reference.quantize_activation(x_TD)
    assert q_TD is not None and scale_TG is not None
    assert torch.equal(q_TD.view(torch.uint8), want_TD.contiguous().view(torch.uint8)) and torch.equal(scale_TG, want_TG)
