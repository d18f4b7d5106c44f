"""What the scheduler promises of prefixes that are shared, one promise at a time."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from pointsman.request import FinishReason, Replay, Request
from tests.scheduler.asking import add, ask, fed, step
from tests.scheduler.simulation import Setup, Simulation


def test_a_full_prefix_hit_still_computes_the_last_token() -> None:
    simulation = Simulation(Setup(page_size=4))
    add(simulation, ask("a", [1] * 8, max_tokens=1), 1)
    step(simulation)
    again = add(simulation, ask("b", [1] * 8, max_tokens=1), 2)
    assert fed(step(simulation)) == {1: (4, 4)} and again.num_cached == 4
    longer = add(simulation, ask("c", [1] * 9, max_tokens=1), 2)
    assert fed(step(simulation)) == {2: (8, 1)} and longer.num_cached == 8


def test_salts_and_prompt_logprobs_take_no_hit() -> None:
    simulation = Simulation(Setup(page_size=4))
    add(simulation, ask("a", [1] * 9), 1)
    step(simulation)
    add(simulation, ask("b", [1] * 9, salt="theirs"), 2)
    assert fed(step(simulation))[1] == (0, 9)
    add(simulation, ask("c", [1] * 9, prompt_logprobs=0), 2)
    assert fed(step(simulation))[2] == (0, 9)
    simulation.run()


def test_pages_are_shared_under_the_same_rows_alone() -> None:
    """Also those of the output; a row that is missing is another than one that is there, whatever stands in it."""

    def forced(rid: str, tokens: list[int], experts: bytes, **fields: Any) -> Request:
        return dataclasses.replace(ask(rid, tokens), replay=Replay(shape=(len(experts), 1, 1), data=experts, **fields))

    simulation = Simulation(Setup(page_size=4))
    first = add(simulation, forced("a", [1] * 9, bytes(20)), 1)
    while simulation.scheduler.has_work:
        step(simulation)
    for index, (request, num_cached) in enumerate(
        (
            (ask("b", [1] * 9), 0),
            (forced("c", [1] * 9, bytes(9)), 8),
            (forced("d", [1] * 9, bytes(7) + b"\1\1"), 4),
            (forced("e", [1] * 9, bytes(9), missing=((6, 7),)), 4),
            (forced("f", [1] * 9, bytes(5), start=4), 4),
            (forced("g", first.tokens, bytes(20)), 28),
            (forced("h", first.tokens, bytes(19)), 16),
        )
    ):
        sequence = add(simulation, request, index + 2)
        while simulation.scheduler.has_work:
            step(simulation)
        assert sequence.num_cached == num_cached, request.rid


def test_the_output_of_one_is_the_prefix_of_the_next() -> None:
    simulation = Simulation(Setup(page_size=4))
    first = add(simulation, ask("a", [1] * 5), 1)
    while first.finish_reason is None:
        step(simulation)
    second = add(simulation, ask("b", [*first.tokens, 2]), 2)
    step(simulation)
    assert second.num_cached == 24 == (len(first.tokens) - 1) // 4 * 4
    simulation.run()


def test_other_choices_wait_for_the_prompt_of_the_first() -> None:
    simulation = Simulation(Setup(token_budget=6))
    choices = simulation.add(ask("a", [1] * 9, n=3))
    add(simulation, ask("b", [2]), 9)
    assert simulation.scheduler.num_waiting == 4
    assert fed(step(simulation)) == {0: (0, 6)}
    assert fed(step(simulation)) == {0: (6, 3), 3: (0, 1)}
    assert fed(step(simulation)) == {0: (9, 1), 3: (1, 1), 1: (8, 1), 2: (8, 1)}
    assert [choice.num_cached for choice in choices] == [0, 8, 8]
    simulation.run()


@pytest.mark.parametrize("end", ["abort", "fault"])
def test_other_choices_do_not_wait_for_one_that_ended(end: str) -> None:
    simulation = Simulation(Setup(token_budget=4))
    choices = simulation.add(ask("a", [1] * 9, n=3))
    step(simulation)
    simulation.scheduler.finish(choices[0], FinishReason.ABORT if end == "abort" else FinishReason.ERROR)
    assert [row.seq for row in step(simulation) if row.began] == [1]
    while simulation.scheduler.has_work:
        step(simulation)


def test_without_a_prefix_cache_choices_start_together() -> None:
    simulation = Simulation(Setup(radix=False, token_budget=32))
    simulation.add(ask("a", [1] * 9, n=3))
    assert fed(step(simulation)) == {0: (0, 9), 1: (0, 9), 2: (0, 9)}
    simulation.run()


def test_with_all_prompt_logprobs_handed_out_a_prefix_hit_is_welcome() -> None:
    simulation = Simulation(Setup(page_size=1, num_pages=24, max_context=28, token_budget=32))
    add(simulation, ask("a", [1] * 4, max_tokens=11), 1)
    second = add(simulation, ask("b", [2] * 8, prompt_logprobs=0, max_tokens=14), 2)
    while not second.num_preemptions or second.lane is None:
        rows = step(simulation)
    assert fed(rows)[1][0] > 0
    simulation.run()


def test_pages_from_before_a_reset_are_not_cached_after_it() -> None:
    simulation = Simulation(Setup(page_size=4))
    add(simulation, ask("a", [1] * 9), 1)
    step(simulation)
    simulation.scheduler.reset_cache()
    assert simulation.radix is not None and simulation.radix.num_cached_pages == 0
    while simulation.scheduler.has_work:
        step(simulation)
    assert simulation.radix.num_cached_pages == 0
    simulation.run()


def test_pages_computed_after_a_reset_are_cached_again() -> None:
    simulation = Simulation(Setup(page_size=1, num_pages=24, max_context=25))
    add(simulation, ask("a", [1] * 4, max_tokens=11), 1)
    last = add(simulation, ask("b", [2] * 4, max_tokens=20), 2)
    step(simulation)
    simulation.scheduler.reset_cache()
    while simulation.scheduler.has_work:
        step(simulation)
    assert last.num_preemptions and simulation.radix is not None
    assert simulation.radix.match(last.tokens, "") and not simulation.radix.match([1], "")
    simulation.run()
