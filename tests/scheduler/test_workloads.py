"""Random workloads: whatever runs together, and in whatever order, each answer is that of the sequence run alone."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from pointsman.request import Replay, Request, SamplingParams
from tests.scheduler.rank import VOCAB
from tests.scheduler.simulation import Setup, Simulation

PRIORITIES = (0, 0, 0, 1, 5, -1)


@st.composite
def setups(draw: st.DrawFn) -> Setup:
    page_size = draw(st.integers(1, 16))
    max_context = draw(st.integers(4, 48))
    least = -(-max_context // page_size)
    return Setup(
        max_running=draw(st.integers(1, 6)),
        token_budget=draw(st.integers(1, 64)),
        max_context=max_context,
        page_size=page_size,
        num_pages=draw(st.integers(least, 3 * least + 4)),
        radix=draw(st.booleans()),
        growth_tokens=draw(st.sampled_from([0, 0, 4, 32])),
    )


@st.composite
def replays(draw: st.DrawFn, end: int) -> Replay:
    """Rows of positions before the end, some of them missing."""
    start = draw(st.integers(0, end))
    experts = draw(st.lists(st.integers(0, 1), max_size=end - start))
    cuts = sorted(draw(st.sets(st.integers(0, len(experts)), max_size=4)))
    missing = tuple(zip(cuts[::2], cuts[1::2], strict=False))
    return Replay(start=start, shape=(len(experts), 1, 1), data=bytes(experts), missing=missing)


@st.composite
def requests(draw: st.DrawFn, rid: str, max_context: int) -> Request:
    """Prompts of two tokens only, and replays of two experts, so that many begin alike."""
    prompt = draw(st.lists(st.integers(1, 2), min_size=1, max_size=max_context - 1))
    max_tokens = draw(st.one_of(st.none(), st.integers(0, 24)))
    limit = max_context if max_tokens is None else min(max_context, len(prompt) + max_tokens)
    return Request(
        rid=rid,
        prompt_token_ids=tuple(prompt),
        priority=draw(st.sampled_from(PRIORITIES)),
        replay=draw(st.none() | replays(max(len(prompt), limit - 1))),
        cache_salt=draw(st.sampled_from(["", "", "a"])),
        sampling=SamplingParams(
            n=draw(st.sampled_from([1, 1, 2, 3])),
            max_tokens=max_tokens,
            min_tokens=draw(st.integers(0, 6 if max_tokens is None else min(6, max_tokens))),
            ignore_eos=draw(st.booleans()),
            stop=draw(st.sampled_from([(), ("x",)])),
            stop_token_ids=tuple(draw(st.lists(st.integers(0, VOCAB), max_size=1))),
            prompt_logprobs=draw(st.sampled_from([None, None, None, 1])),
        ),
    )


@settings(deadline=None, max_examples=150)
@given(st.data())
def test_any_workload_gives_what_each_gives_alone(data: st.DataObject) -> None:
    setup = data.draw(setups())
    simulation = Simulation(setup)
    overlap = data.draw(st.booleans())
    for index in range(data.draw(st.integers(1, 8))):
        request = data.draw(requests(f"r{index}", setup.max_context))
        sign = data.draw(st.sampled_from([1, 1, 1, -1]))
        simulation.add(request, tuple(sign * (10 * index + choice + 1) for choice in range(request.sampling.n)))
        for _ in range(data.draw(st.integers(0, 6))):
            simulation.step(overlap=overlap)
            match data.draw(st.integers(0, 19)):
                case 0:
                    simulation.abort(f"r{data.draw(st.integers(0, index))}")
                case 1:
                    simulation.scheduler.reset_cache()
                case 2:
                    overlap = not overlap
    simulation.run(overlap=overlap)


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 4), st.integers(1, 24), st.booleans(), st.booleans(), st.lists(st.integers(1, 20), min_size=2, max_size=8))
def test_a_crowded_cache_gives_what_each_gives_alone(
    page_size: int, token_budget: int, radix: bool, overlap: bool, lengths: list[int]
) -> None:
    """The cache holds one and a half requests of full length, all of which run to the end."""
    num_pages = -(-45 // page_size)
    setup = Setup(max_running=8, token_budget=token_budget, max_context=30, page_size=page_size, num_pages=num_pages, radix=radix)
    simulation = Simulation(setup)
    for index, length in enumerate(lengths):
        sampling = SamplingParams(max_tokens=None, ignore_eos=True)
        simulation.add(Request(rid=str(index), prompt_token_ids=tuple([1 + index % 3] * length), sampling=sampling), (index,))
    simulation.run(overlap=overlap)
    assert all(len(sequence.tokens) == 30 for sequence in simulation.sequences.values())
