"""Expert load: every row that a step stores is counted once."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pointsman.moe import load
from pointsman.moe.capture import RouteStore
from pointsman.moe.load import DeviceExpertLoad, ExpertLoad

LAYERS, EXPERTS, TOP_K, SLOTS = 3, 9, 2, 40


def step(routes, expert_load, expected, slots, random):
    """What a step does: it stores rows in slots and notes these."""
    expert_load.before_step()
    for layer in range(LAYERS):
        ids = random.random((len(slots), num_experts_of(routes))).argsort(axis=1)[:, :TOP_K]
        np.add.at(expected[layer], ids.ravel(), 1)
        routes.record(layer, torch.tensor(slots, dtype=torch.int64), torch.from_numpy(ids))
    expert_load.after_step(np.array(slots, np.int64))


def num_experts_of(routes):
    return EXPERTS if routes.rows_SLK.dtype == torch.uint8 else 700


@pytest.mark.parametrize("num_experts", [EXPERTS, 700])
@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_every_row_counts_once_though_slots_are_used_again(num_experts, data):
    routes = RouteStore(SLOTS, LAYERS, TOP_K, num_experts)
    expert_load = ExpertLoad(routes, num_experts)
    expected = np.zeros((LAYERS, num_experts), np.int64)
    random = np.random.default_rng(data.draw(st.integers(0, 1000)))
    taken: set[int] = set()
    for slots in data.draw(st.lists(st.sets(st.integers(0, SLOTS - 1), min_size=1, max_size=8), max_size=30)):
        if taken & slots:
            expert_load.settle()
            taken.clear()
        taken |= slots
        step(routes, expert_load, expected, sorted(slots), random)
        if data.draw(st.booleans()):
            assert np.array_equal(expert_load.counts_LE(), expected)
    assert np.array_equal(expert_load.counts_LE(), expected)


def test_notes_do_not_pile_up_and_are_counted_in_pieces(monkeypatch):
    routes = RouteStore(SLOTS, LAYERS, TOP_K, EXPERTS)
    routes.rows_SLK.zero_()
    monkeypatch.setattr(load, "MAX_NOTES", 7)
    monkeypatch.setattr(load, "PIECE", 5)
    expert_load = ExpertLoad(routes, EXPERTS)
    for _ in range(100):
        expert_load.before_step()
        expert_load.after_step(np.array([1, 2], np.int64))
        assert len(expert_load._notes) <= 7
    assert expert_load.counts_LE()[:, 0].tolist() == [200 * TOP_K] * LAYERS


@pytest.mark.parametrize("num_experts", [EXPERTS, 700])
@settings(deadline=None, max_examples=30)
@given(steps=st.lists(st.tuples(st.sets(st.integers(0, SLOTS - 2), max_size=8), st.integers(0, 5)), max_size=8))
def test_on_a_device_a_step_counts_its_own_rows_and_no_padding(num_experts, steps):
    """A CPU in the device's place. The last slot, which is that of padding, holds what is no expert."""
    routes = RouteStore(SLOTS, LAYERS, TOP_K, num_experts)
    routes.rows_SLK.view(torch.uint8).fill_(255)
    expert_load = DeviceExpertLoad(routes, num_experts)
    expected = np.zeros((LAYERS, num_experts), np.int64)
    random = np.random.default_rng(0)
    for slots, room in steps:
        step(routes, expert_load, expected, sorted(slots), random)
        expert_load.count(torch.tensor([*sorted(slots), *[-1] * room], dtype=torch.int64))
        expert_load.settle()
    assert np.array_equal(expert_load.counts_LE(), expected)
