"""What the scheduler promises, one promise at a time; the simulation checks all others along the way."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from pointsman.request import FinishReason, Replay
from tests.scheduler.asking import add, ask, fed, step
from tests.scheduler.rank import EOS, next_token
from tests.scheduler.simulation import Setup, Simulation


def test_decode_first_then_chunks_of_prompts() -> None:
    simulation = Simulation(Setup(token_budget=8))
    add(simulation, ask("a", [1] * 6), 1)
    assert fed(step(simulation)) == {0: (0, 6)}
    add(simulation, ask("b", [2] * 10), 2)
    add(simulation, ask("c", [1, 2]), 3)
    assert fed(step(simulation)) == {0: (6, 1), 1: (0, 7)}
    assert fed(step(simulation)) == {0: (7, 1), 1: (7, 3), 2: (0, 2)}
    assert fed(step(simulation)) == {0: (8, 1), 1: (10, 1), 2: (2, 1)}
    simulation.run()


def test_larger_priority_first_even_before_a_prompt_under_way() -> None:
    simulation = Simulation(Setup(token_budget=4))
    add(simulation, ask("a", [1] * 10), 1)
    assert fed(step(simulation)) == {0: (0, 4)}
    add(simulation, ask("b", [2] * 6, priority=1), 2)
    add(simulation, ask("c", [2] * 2, priority=2), 3)
    assert fed(step(simulation)) == {2: (0, 2), 1: (0, 2)}
    assert fed(step(simulation)) == {2: (2, 1), 1: (2, 3)}
    assert fed(step(simulation)) == {2: (3, 1), 1: (5, 1), 0: (4, 2)}
    simulation.run()


def test_rows_of_what_is_never_fed_are_refused() -> None:
    simulation = Simulation(Setup(max_context=12))
    for max_tokens, most in ((0, 3), (1, 3), (4, 6), (50, 11), (None, 11)):
        for count in (most, most + 1):
            request = dataclasses.replace(
                ask(f"{max_tokens} {count}", [1] * 3, max_tokens=max_tokens), replay=Replay(shape=(count, 1, 1), data=bytes(count))
            )
            if count == most:
                add(simulation, request, 1)
            else:
                with pytest.raises(ValueError, match=f"up to position {most}; .* the last one that is fed is {most - 1}"):
                    add(simulation, request, 1)
    simulation.run()


def test_overlap_feeds_what_is_still_being_chosen() -> None:
    simulation = Simulation(Setup())
    add(simulation, ask("a", [1] * 3, max_tokens=3), 1)
    assert simulation.plan() and simulation.plan()
    assert fed(simulation.rank.steps[0]) == {0: (0, 3)} and fed(simulation.rank.steps[1]) == {0: (3, 1)}
    simulation.commit()
    assert simulation.plan()
    simulation.commit()
    assert not simulation.plan(), "it ends with the token in flight, so there is nothing to plan"
    simulation.commit()
    simulation.check_finished()


def test_a_row_of_a_text_that_has_ended_is_discarded() -> None:
    simulation = Simulation(Setup())
    prompt = next([token] * 3 for token in range(1, 100) if next_token(hash((hash((hash((0, token)), token)), token)), 1) == EOS)
    add(simulation, ask("a", prompt, ignore_eos=False), 1)
    other = add(simulation, ask("b", [2]), 2)
    assert simulation.plan() and simulation.plan()
    first = simulation.commit()
    assert [(advance.sequence.number, advance.finish_reason) for advance in first] == [(0, FinishReason.STOP), (1, None)]
    assert [advance.sequence for advance in simulation.commit()] == [other]
    simulation.run()


def test_no_more_than_two_plans_in_flight_and_in_order() -> None:
    simulation = Simulation(Setup())
    add(simulation, ask("a", [1] * 3), 1)
    simulation.plan()
    simulation.plan()
    with pytest.raises(AssertionError, match="commit the oldest plan first"):
        simulation.scheduler.plan()
    with pytest.raises(AssertionError, match="in the order in which they were made"):
        simulation.scheduler.commit(*simulation.in_flight[1])


def test_preemption_waits_for_the_step_in_flight_and_takes_the_last_in() -> None:
    simulation = Simulation(Setup(page_size=4, num_pages=8, max_context=30))
    low = add(simulation, ask("low", [1] * 4, priority=-1), 1)
    first = add(simulation, ask("first", [2] * 4), 2)
    second = add(simulation, ask("second", [3] * 4), 3)
    ahead = True
    while simulation.in_flight or (simulation.plan() and not low.num_preemptions):
        ahead = simulation.plan()
        simulation.commit()
    assert not ahead, "what was in flight had to come back first"
    assert low.lane is None and first.lane is not None and second.lane is not None
    simulation.run(overlap=True)
    assert simulation.num_preemptions >= 1 and low.num_output == 20


def test_the_preempted_resumes_on_its_own_pages() -> None:
    simulation = Simulation(Setup(page_size=1, num_pages=24, max_context=25))
    add(simulation, ask("a", [1] * 4, max_tokens=11), 1)
    last = add(simulation, ask("b", [2] * 4, max_tokens=20), 2)
    while not last.num_preemptions:
        step(simulation)
    tokens = len(last.tokens)
    while last.lane is None:
        rows = step(simulation)
    start, count = fed(rows)[last.number]
    assert start > 4 and start + count == tokens and last.num_cached == 0
    simulation.run()


@pytest.mark.parametrize("num_fillers", range(3))
def test_the_preempted_takes_no_page_that_was_written_anew(num_fillers: int) -> None:
    """Others evict its pages meanwhile, and the last of them fills some under the same numbers with the same tokens."""
    simulation = Simulation(Setup(page_size=1, num_pages=12, max_context=13))
    late = add(simulation, ask("late", [1] * 4, max_tokens=6, priority=-1), 1)
    while late.num_output < 3:
        step(simulation)
    simulation.scheduler.retract()
    simulation.check_preempted([late])
    tokens, pages = late.tokens[:-1], late.pages
    for index in range(num_fillers):
        add(simulation, ask(f"filler {index}", [2 + index] * 12, max_tokens=0), 2)
        step(simulation)
    add(simulation, ask("same", [*tokens, *[5] * 6], max_tokens=0), 3)
    step(simulation)
    assert late.lane is None and simulation.radix is not None
    assert simulation.radix.match(tokens, "") == pages
    assert fed(step(simulation))[late.number][0] == (0 if num_fillers else len(tokens))
    simulation.run()


def test_the_first_in_line_is_not_overtaken_for_lack_of_pages() -> None:
    simulation = Simulation(Setup(page_size=4, num_pages=10, max_context=40))
    add(simulation, ask("a", [1] * 20), 1)
    step(simulation)
    large, small = add(simulation, ask("large", [2] * 24), 2), add(simulation, ask("small", [3]), 3)
    while large.lane is None:
        assert small.lane is None
        step(simulation)
    simulation.run()


def test_a_margin_is_kept_for_the_running_to_grow() -> None:
    """Of ten pages the first holds one; two more each would be kept for it and the second, whose prompt has six."""
    starts = []
    for num_pages in (10, 11):
        simulation = Simulation(Setup(page_size=4, num_pages=num_pages, max_context=40, growth_tokens=8))
        add(simulation, ask("a", [1] * 3), 1)
        second = add(simulation, ask("b", [2] * 24, max_tokens=2), 2)
        step(simulation)
        step(simulation)
        starts.append(second.lane is not None)
        simulation.run()
    assert starts == [False, True]


def test_endings() -> None:
    simulation = Simulation(Setup())
    prompt = [1, 2, 1]
    probe = add(simulation, ask("probe", prompt), 5)
    simulation.run()
    output = probe.tokens[3:]
    first = output.index(output[6])

    def end(**sampling: Any) -> tuple[int, FinishReason | None, int | str | None]:
        simulation = Simulation(Setup())
        sequence = add(simulation, ask("a", prompt, **sampling), 5)
        simulation.run()
        return sequence.num_output, sequence.finish_reason, sequence.stop_reason

    assert end(max_tokens=None) == (61, FinishReason.LENGTH, None), "to the end of the context"
    assert end(max_tokens=7) == (7, FinishReason.LENGTH, None)
    assert end(max_tokens=0) == (0, FinishReason.LENGTH, None)
    assert end(stop_token_ids=(output[6],)) == (first + 1, FinishReason.STOP, output[6])
    assert end(stop_token_ids=(output[6],), min_tokens=7) == (7, FinishReason.STOP, output[6])
    assert end(stop_token_ids=(EOS,), ignore_eos=True) == (output.index(EOS) + 1, FinishReason.STOP, EOS)
    assert end(stop_token_ids=(EOS,), ignore_eos=False) == (output.index(EOS) + 1, FinishReason.STOP, None)
    assert end(ignore_eos=True) == (20, FinishReason.LENGTH, None)


def test_prompt_logprobs_alone() -> None:
    simulation = Simulation(Setup(token_budget=4))
    sequence = add(simulation, ask("a", [1, 2] * 5, max_tokens=0, prompt_logprobs=1), 1)
    assert [[row.sampled for row in step(simulation)] for _ in range(3)] == [[False]] * 3
    assert len(simulation.prompt_rows[0]) == 9 and sequence.finish_reason is FinishReason.LENGTH
    simulation.run()


def test_prompt_logprobs_are_handed_out_once_though_the_prompt_is_computed_twice() -> None:
    simulation = Simulation(Setup(page_size=1, num_pages=23, max_context=28, token_budget=4))
    add(simulation, ask("a", [1] * 4, max_tokens=14), 1)
    step(simulation)
    second = add(simulation, ask("b", [2] * 16, prompt_logprobs=0, max_tokens=4), 2)
    while not second.num_preemptions:
        step(simulation)
    assert 0 < len(simulation.prompt_rows[1]) < 15, "it was still at its prompt"
    while second.lane is None:
        rows = step(simulation)
    assert fed(rows)[1][0] == 0, "no prefix hit before all rows are handed out"
    simulation.run()
    assert len(simulation.prompt_rows[1]) == 15


def test_a_fault_ends_one_sequence_and_caches_nothing_more_of_it() -> None:
    simulation = Simulation(Setup(page_size=1))
    sequence = add(simulation, ask("a", [1] * 4), -6)
    other = add(simulation, ask("b", [2]), 2)
    while simulation.scheduler.has_work:
        step(simulation)
    assert sequence.finish_reason is FinishReason.ERROR and sequence.num_output > 0
    assert other.finish_reason is FinishReason.LENGTH
    assert simulation.radix is not None and len(simulation.radix.match(sequence.tokens, "")) == 4
    simulation.run()


def test_a_prompt_under_way_goes_on_while_a_more_urgent_one_waits_for_a_lane() -> None:
    simulation = Simulation(Setup(max_running=1, token_budget=2))
    add(simulation, ask("a", [1] * 6), 1)
    step(simulation)
    add(simulation, ask("b", [2], priority=1), 2)
    assert fed(step(simulation)) == {0: (2, 2)}
    simulation.run()


@pytest.mark.parametrize("overlap", [False, True])
def test_abort_wherever_it_is(overlap: bool) -> None:
    simulation = Simulation(Setup(max_running=1, token_budget=4))
    for rid in ("running", "waiting"):
        simulation.add(ask(rid, [1] * 6, n=2))
    for _ in range(3):
        simulation.step(overlap=overlap)
    simulation.abort("waiting")
    simulation.abort("running")
    simulation.abort("unknown")
    add(simulation, ask("running", [1] * 6), 4)
    simulation.run(overlap=overlap)


def test_what_can_never_run_is_refused() -> None:
    simulation = Simulation(Setup(page_size=4, num_pages=4, max_context=40))
    add(simulation, ask("a", [1] * 4, max_tokens=4), 1)
    refusals = {
        "40 tokens; with 1 of output that is more than the context of 40": ask("b", [1] * 40),
        "17 tokens and max_tokens is None: 17 tokens to keep are more than the 16": ask("b", [1] * 17, max_tokens=None),
        "10 tokens and max_tokens is 8: 17 tokens to keep are more than the 16": ask("b", [1] * 10, max_tokens=8),
        "rid 'a' is the name of a request that is not finished": ask("a", [1] * 4),
    }
    for message, request in refusals.items():
        with pytest.raises(ValueError, match=message):
            simulation.add(request)
    assert simulation.add(ask("b", [1] * 10, max_tokens=7)) and simulation.add(ask("c", [1] * 16, max_tokens=None))
    assert simulation.add(ask("d", [1] * 16, max_tokens=0)) and simulation.add(ask("e", [1] * 4, max_tokens=None))
    simulation.run()
