"""Requests, and steps of the simulation one by one."""

from __future__ import annotations

from typing import Any

from pointsman.request import Request, SamplingParams
from pointsman.scheduler import Sequence
from tests.scheduler.rank import Fed
from tests.scheduler.simulation import Simulation

LONG = {"ignore_eos": True, "max_tokens": 20}


def ask(rid: str, prompt: list[int], *, priority: int = 0, salt: str = "", **sampling: Any) -> Request:
    return Request(
        rid=rid, prompt_token_ids=tuple(prompt), priority=priority, cache_salt=salt, sampling=SamplingParams(**(LONG | sampling))
    )


def step(simulation: Simulation) -> list[Fed]:
    assert simulation.plan()
    simulation.commit()
    return simulation.rank.steps[-1]


def fed(rows: list[Fed]) -> dict[int, tuple[int, int]]:
    """Number of each sequence to its first position and how many tokens."""
    return {row.seq: (row.start, row.count) for row in rows}


def add(simulation: Simulation, request: Request, *seeds: int) -> Sequence:
    return simulation.add(request, seeds)[0]
