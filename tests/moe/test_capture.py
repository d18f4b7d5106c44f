"""Routing rows come back by slot as they were written, narrow or wide."""

from __future__ import annotations

import pytest
import torch

from pointsman.moe.capture import RouteStore


@pytest.mark.parametrize(("num_experts", "dtype"), [(1, torch.uint8), (256, torch.uint8), (257, torch.uint16), (65_536, torch.uint16)])
def test_rows_come_back_by_slot(num_experts: int, dtype: torch.dtype) -> None:
    store = RouteStore(20, 3, 4, num_experts)
    assert store.rows_SLK.dtype == dtype
    generator = torch.Generator().manual_seed(0)
    ids_TLK = torch.randint(num_experts, (6, 3, 4), generator=generator)
    ids_TLK[0, 0] = num_experts - 1
    slots_T = torch.tensor([19, 0, 7, 8, 3, 12])
    for layer in range(3):
        store.record(layer, slots_T, ids_TLK[:, layer])
    rows = store.gather(slots_T)
    assert rows.dtype == dtype and rows.shape == (6, 3, 4)
    assert rows.numpy().astype("int64").tolist() == ids_TLK.tolist()
    assert store.gather([7, 19]).numpy().astype("int64").tolist() == ids_TLK[[2, 0]].tolist()


def test_a_slot_used_again_has_the_newer_row_and_its_neighbours_theirs() -> None:
    store = RouteStore(4, 1, 2, 8)
    store.record(0, torch.tensor([0, 1, 2]), torch.tensor([[1, 2], [3, 4], [5, 6]]))
    store.record(0, torch.tensor([1]), torch.tensor([[7, 0]]))
    assert store.gather([0, 1, 2])[:, 0].tolist() == [[1, 2], [7, 0], [5, 6]]


def test_a_token_of_minimax_m25_takes_496_bytes() -> None:
    store = RouteStore(2, 62, 8, 256)
    assert store.rows_SLK[0].numel() * store.rows_SLK.element_size() == 496
