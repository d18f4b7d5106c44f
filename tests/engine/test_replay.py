"""Replay through the engine: forced rows are used, in prefill and decode, and each answer is what the request gives alone.

The oracle of the workloads is each request alone, in the plain order, without a prefix cache and in one chunk, on the compiled step,
whose every number must be the same bit for bit. Hugging Face's model under hooks is the oracle of forced routing itself, in
`tests/models/test_forced_routing.py`.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pointsman import LLM, FinishReason, SamplingParams
from pointsman.engine.engine import Engine
from pointsman.models.decoder import Decoder
from pointsman.models.loader import load_model
from pointsman.replay import keep, replay_of
from pointsman.request import ChoiceDelta, Replay, Request
from pointsman.routed_experts import RoutedExperts, encode
from pointsman.scheduler import Sequence
from tests.models.checkpoints import Harness, Shape, dequantized, write

LAYERS, EXPERTS, TOP_K = 3, 10, 3
SHAPE = Shape(layers=LAYERS, hidden=64, experts=EXPERTS, top_k=TOP_K, width=32, vocab=288, block=(32, 16))
SIZES: dict[str, Any] = {"layers": range(LAYERS), "num_experts": EXPERTS, "top_k": TOP_K}
PROMPT = tuple(range(40, 70))
PARAMS = SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True, return_routed_experts=True, logprobs=1)
ALONE: dict[str, Any] = {"disable_radix_cache": True, "disable_overlap_schedule": True, "chunked_prefill_size": 256}


def start(model: Path, step: str = "compiled", **config: Any) -> LLM:
    return LLM(str(model), progress=False, cpu_step=step, context_length=256, **config)


@pytest.fixture(scope="module")
def model(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights so large that other experts give other keys, values and tokens, which dummy ones do not; and the tokenizer of bytes."""
    path = SHAPE.write(tmp_path_factory.mktemp("replay") / "model", seed=1)
    shutil.copy(folder / "tokenizer.json", path)
    shutil.copy(folder / "generation_config.json", path)
    return path


def rows(count: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    drawn = [[rng.permutation(EXPERTS)[:TOP_K] for _ in range(LAYERS)] for _ in range(count)]
    return np.array(drawn, np.uint8).reshape(count, LAYERS, TOP_K)


@pytest.fixture(scope="module", params=["torch", "compiled"])
def llm(request: pytest.FixtureRequest, model: Path) -> Iterator[LLM]:
    llm = start(model, request.param, **ALONE)
    yield llm
    llm.close()


@pytest.mark.parametrize("ways", [{"temperature": 0.0}, {"temperature": 1.0, "seed": 5, "top_p": 0.9}])
def test_its_own_record_gives_an_answer_again_bit_for_bit(llm: LLM, ways: dict[str, Any]) -> None:
    params = PARAMS.replace(**ways)
    first = llm.generate(list(PROMPT), params)[0].outputs[0]
    assert first.routing_agreement is None
    record = encode(RoutedExperts(rows_RLK=first.routed_experts, num_experts=EXPERTS, layers=(0, 1, 2)))
    for form in (first.routed_experts, record):
        again = llm.generate(list(PROMPT), params, replay_routed_experts=form)[0].outputs[0]
        assert (again.token_ids, again.logprobs) == (first.token_ids, first.logprobs)
        assert np.array_equal(again.routed_experts, first.routed_experts)
        assert again.routing_agreement == 1.0


def test_scoring_an_answer_under_its_record_gives_its_logprobs(llm: LLM) -> None:
    """Bit for bit on the compiled step; torch sums a prompt in another order than single tokens, as in `test_invariance`."""
    first = llm.generate(list(PROMPT), PARAMS)[0].outputs[0]
    scoring = SamplingParams(max_tokens=0, prompt_logprobs=1)
    tokens = [*PROMPT, *first.token_ids]
    scored = llm.generate(tokens, scoring, replay_routed_experts=first.routed_experts)[0]
    assert scored.prompt_logprobs is not None and first.logprobs is not None
    if llm.engine.step_name == "compiled":
        assert scored.prompt_logprobs[len(PROMPT) :] == first.logprobs
        assert scored.outputs[0].routing_agreement == 1.0
    for token, one, other in zip(first.token_ids, scored.prompt_logprobs[len(PROMPT) :], first.logprobs, strict=True):
        assert one is not None and one[token].logprob == pytest.approx(other[token].logprob, abs=2e-3)


def test_forced_positions_use_the_rows_and_others_route_freely(llm: LLM) -> None:
    """In prompt and output: rows 5 to 39 of 49 are given, 10 to 12 among them missing. What comes before is what it is anyway."""
    free = llm.generate(list(PROMPT), PARAMS)[0].outputs[0].routed_experts
    given_rows = rows(34, 1)
    record = RoutedExperts(rows_RLK=given_rows, num_experts=EXPERTS, start=5, layers=(0, 1, 2), missing=((5, 8),))
    output = llm.generate(list(PROMPT), PARAMS, replay_routed_experts=record)[0].outputs[0]
    got, known = output.routed_experts, record.known_R
    assert np.array_equal(got[5:39][known], given_rows[known])
    assert np.array_equal(got[:5], free[:5])
    assert not np.array_equal(got[10:13], free[10:13]), "they route freely, behind other keys and values"
    assert output.routing_agreement is not None and output.routing_agreement < 0.2


def test_the_order_of_experts_is_no_disagreement(llm: LLM) -> None:
    first = llm.generate(list(PROMPT), PARAMS)[0].outputs[0].routed_experts
    turned = llm.generate(list(PROMPT), PARAMS.replace(max_tokens=1), replay_routed_experts=first[:30, :, ::-1])[0].outputs[0]
    assert np.array_equal(turned.routed_experts, first[:30, :, ::-1])
    assert turned.routing_agreement == pytest.approx(1.0, abs=0.02), "sums in another order may tip a near tie"


def test_a_replay_without_rows_routes_freely(llm: LLM) -> None:
    first = llm.generate(list(PROMPT), PARAMS)[0].outputs[0]
    again = llm.generate(list(PROMPT), PARAMS, replay_routed_experts=rows(0))[0].outputs[0]
    assert (again.logprobs, again.routing_agreement) == (first.logprobs, None)


def test_each_prompt_has_its_own(llm: LLM) -> None:
    one, two = rows(10, 1), rows(20, 2)
    many = llm.generate([list(PROMPT)] * 3, PARAMS, replay_routed_experts=[one, None, two])
    free = llm.generate(list(PROMPT), PARAMS)[0]
    assert np.array_equal(many[0].outputs[0].routed_experts[:10], one)
    assert np.array_equal(many[2].outputs[0].routed_experts[:20], two)
    assert many[1].outputs[0].routing_agreement is None
    assert np.array_equal(many[1].outputs[0].routed_experts, free.outputs[0].routed_experts)


@pytest.mark.parametrize(
    ("value", "max_tokens", "words"),
    [
        (rows(50), 20, "has rows up to position 49; with a prompt of 30 tokens and at most 20 of output the last one that is fed is 48"),
        (rows(31), 1, "up to position 30; .* the last one that is fed is 29"),
        (rows(31), 0, "up to position 30; .* the last one that is fed is 29"),
        (rows(300), None, "up to position 299; .* the last one that is fed is 254"),
        (rows(5)[:, :2], 20, "of the layers 0 to 1; this model's are 0 to 2"),
        ([rows(5), None], 20, "has 2 entries for 1 prompts"),
        ({"version": 1}, 20, "dtype is missing from the record"),
    ],
)
def test_what_cannot_be_replayed_is_refused(llm: LLM, value: Any, max_tokens: int | None, words: str) -> None:
    with pytest.raises(ValueError, match=f"replay_routed_experts.*{words}"):
        llm.generate([list(PROMPT)], PARAMS.replace(max_tokens=max_tokens), replay_routed_experts=value)
    assert not llm.engine.has_work


def test_a_replay_as_long_as_what_is_fed_is_taken(llm: LLM) -> None:
    for max_tokens, count in ((20, 49), (1, 30), (0, 30)):
        output = llm.generate(list(PROMPT), PARAMS.replace(max_tokens=max_tokens), replay_routed_experts=rows(count))[0].outputs[0]
        assert output.routing_agreement is not None


def test_the_engine_refuses_ids_that_would_break_a_step(llm: LLM) -> None:
    """Whoever makes a `Replay` by hand."""
    wrong = Replay(shape=(1, LAYERS, TOP_K), data=bytes([EXPERTS] * LAYERS * TOP_K))
    with pytest.raises(ValueError, match="has the expert 10; ids of this model go from 0 to 9"):
        llm.engine.add(Request(rid="wrong", prompt_token_ids=PROMPT, sampling=PARAMS, replay=wrong))


def test_prefixes_are_shared_under_the_same_rows_alone(model: Path) -> None:
    """Free after forced, forced after free, and forced otherwise, each as if alone; what has the same rows shares pages."""
    llm, prompt, params = start(model, page_size=4), list(PROMPT), PARAMS.replace(max_tokens=6)
    alone = start(model, **ALONE)
    one = RoutedExperts(rows_RLK=rows(31, 1), num_experts=EXPERTS, start=2, layers=(0, 1, 2))
    other = RoutedExperts(rows_RLK=rows(31, 1), num_experts=EXPERTS, start=2, layers=(0, 1, 2), missing=((7, 8),))
    late = RoutedExperts(rows_RLK=rows(10, 1), num_experts=EXPERTS, start=18, layers=(0, 1, 2))
    longer = RoutedExperts(rows_RLK=np.concatenate([rows(31, 1), rows(2, 7)]), num_experts=EXPERTS, start=2, layers=(0, 1, 2))
    cached = []
    for replay in (one, None, other, late, None, one, longer, other, late):
        got = llm.generate(prompt, params, replay_routed_experts=replay)[0]
        want = alone.generate(prompt, params, replay_routed_experts=replay)[0].outputs[0]
        assert (got.outputs[0].logprobs, got.outputs[0].routing_agreement) == (want.logprobs, want.routing_agreement)
        assert np.array_equal(got.outputs[0].routed_experts, want.routed_experts)
        cached.append(got.num_cached_tokens)
    # `other` parts from `one` at position 9; `late` is free up to 18; all 28 tokens of the prompt's full pages are found at most
    assert cached == [0, 0, 8, 16, 28, 28, 28, 28, 28]
    llm.close()
    alone.close()


@pytest.mark.parametrize("step", ["torch", "compiled"])
def test_each_choice_has_the_same_replay(model: Path, step: str) -> None:
    llm, given_rows = start(model, step, page_size=4), rows(40, 3)
    params = PARAMS.replace(n=3, temperature=1.0, seed=2)
    outputs = llm.generate(list(PROMPT), params, replay_routed_experts=given_rows)[0].outputs
    assert len({tuple(output.token_ids) for output in outputs}) == 3
    for output in outputs:
        assert np.array_equal(output.routed_experts[:40], given_rows)
        assert output.routing_agreement is not None
    llm.close()


@dataclass
class Heard:
    """What came of one choice."""

    tokens: list[int] = field(default_factory=list)
    text: str = ""
    logprobs: list[Any] = field(default_factory=list)
    prompt_logprobs: Any = None
    last: ChoiceDelta | None = None

    def take(self, delta: ChoiceDelta) -> None:
        self.tokens += delta.token_ids
        self.text += delta.text
        self.logprobs += delta.logprobs or []
        self.prompt_logprobs = delta.prompt_logprobs or self.prompt_logprobs
        if delta.finish_reason is not None:
            assert self.last is None
            self.last = delta


def drive(engine: Engine, requests: list[Request], aborts: dict[str, int], arrivals: list[int]) -> dict[tuple[str, int], Heard]:
    """Add each request at its step, abort some at theirs, and run to the end."""
    heard = {(request.rid, index): Heard() for request in requests for index in range(request.sampling.n)}
    step = 0
    while step <= max([*arrivals, *aborts.values()]) or engine.has_work:
        for request, arrival in zip(requests, arrivals, strict=True):
            if arrival == step:
                engine.add(request)
        deltas = [delta for rid, at in aborts.items() if at == step for delta in engine.abort(rid)]
        for delta in deltas + (engine.step() if engine.has_work else []):
            heard[delta.rid, delta.index].take(delta)
        step += 1
    return heard


def a_request(rng: np.random.Generator, rid: str, alone: Engine) -> Request:
    """Of every kind: short, long, with a common prefix, several choices, stop strings, scored, free, or replayed in one way or another."""
    shared = np.random.default_rng(0).integers(0, 256, 40).tolist()
    prompt = shared[: int(rng.integers(0, 40))] + rng.integers(0, 256, int(rng.integers(1, 40))).tolist()
    params = SamplingParams(
        n=int(rng.choice([1, 1, 1, 2, 3])),
        max_tokens=int(rng.integers(0, 61)),
        temperature=float(rng.choice([0.0, 1.0])),
        seed=int(rng.integers(0, 1000)),
        stop=(chr(int(rng.integers(97, 123))),) if rng.random() < 0.3 else (),
        logprobs=1,
        prompt_logprobs=0 if rng.random() < 0.2 else None,
        return_routed_experts=True,
        routed_experts_start=int(rng.integers(0, len(prompt) + 1)) if rng.random() < 0.3 else 0,
    )
    request = Request(rid=rid, prompt_token_ids=tuple(prompt), sampling=params)
    most, kind = max(len(prompt), len(prompt) + (params.max_tokens or 0) - 1), rng.random()
    if kind < 0.35:
        return request
    if kind < 0.5:
        free = drive(alone, [request], {}, [0])[rid, 0]
        assert free.last is not None
        record = RoutedExperts(rows_RLK=free.last.routed_experts, num_experts=EXPERTS, start=params.routed_experts_start, layers=(0, 1, 2))
    else:
        first = int(rng.integers(0, most + 1))
        count = int(rng.integers(0, most - first + 1))
        cuts = np.sort(rng.integers(0, count + 1, 2)).tolist()
        missing = (tuple(cuts),) if cuts[0] < cuts[1] and rng.random() < 0.5 else ()
        # few seeds, so that records have beginnings in common
        record = RoutedExperts(
            rows_RLK=rows(most, int(rng.integers(0, 2)))[first : first + count],
            num_experts=EXPERTS,
            start=first,
            layers=(0, 1, 2),
            missing=missing,
        )
    return Request(rid=rid, prompt_token_ids=tuple(prompt), sampling=params, replay=replay_of(record, **SIZES))


SETUPS: dict[str, dict[str, Any]] = {
    "overlapped": {"page_size": 4, "chunked_prefill_size": 24},
    "plain order, pages of one": {"page_size": 1, "chunked_prefill_size": 7, "disable_overlap_schedule": True},
    "tiny cache": {"page_size": 4, "max_total_tokens": 140, "chunked_prefill_size": 16},
    "tiny cache, plain order": {"page_size": 8, "max_total_tokens": 140, "disable_overlap_schedule": True},
    "tiny cache, no prefixes": {"page_size": 4, "max_total_tokens": 140, "disable_radix_cache": True},
}


@pytest.fixture(scope="module")
def alone(model: Path) -> Iterator[Engine]:
    llm = start(model, **ALONE)
    yield llm.engine
    llm.close()


@pytest.fixture(scope="module", params=SETUPS.values(), ids=SETUPS.keys())
def engine(model: Path, request: pytest.FixtureRequest) -> Iterator[Engine]:
    llm = start(model, **request.param)
    yield llm.engine
    assert bool(llm.engine.num_preemptions) == ("max_total_tokens" in request.param)
    llm.close()


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True)
@given(seed=st.integers(0, 1 << 30))
def test_company_changes_nothing(engine: Engine, alone: Engine, seed: int) -> None:
    """Rows, agreement, tokens, text and log-probabilities of every choice are those of the request alone; aborted, up to what was computed.

    The engine goes on from one example to the next, with what is in its cache.
    """
    rng = np.random.default_rng(seed)
    requests = [a_request(rng, f"{seed}-{index}", alone) for index in range(int(rng.integers(2, 9)))]
    arrivals = [int(rng.integers(0, 12)) for _ in requests]
    aborts = {
        request.rid: arrival + int(rng.integers(1, 40)) for request, arrival in zip(requests, arrivals, strict=True) if rng.random() < 0.25
    }
    heard = drive(engine, requests, aborts, arrivals)
    for request in requests:
        whole = drive(alone, [request], {}, [0])
        for index in range(request.sampling.n):
            same(heard[request.rid, index], whole[request.rid, index], request)


def same(got: Heard, want: Heard, request: Request) -> None:
    assert got.last is not None and want.last is not None
    count, start = len(got.tokens), request.sampling.routed_experts_start
    assert (got.tokens, got.logprobs) == (want.tokens[:count], want.logprobs[:count])
    length = max(len(request.prompt_token_ids) + count - 1 - start, 0)
    assert got.last.routed_experts.shape == (length, LAYERS, TOP_K)
    if got.last.finish_reason is not FinishReason.ABORT:
        assert (count, got.text, got.last.finish_reason) == (len(want.tokens), want.text, want.last.finish_reason)
        assert got.prompt_logprobs == want.prompt_logprobs
        assert got.last.routing_agreement == want.last.routing_agreement
        assert not got.last.routed_experts_missing
    known = length
    if got.last.routed_experts_missing:
        [(known, end)] = got.last.routed_experts_missing
        assert end == length
    assert np.array_equal(got.last.routed_experts[:known], want.last.routed_experts[:known])


@pytest.mark.parametrize("setup", ["tiny cache", "plain order, pages of one"])
def test_rows_are_what_the_reference_router_gives(model: Path, alone: Engine, tmp_path: Path, setup: str) -> None:
    """Each choice of such workloads once more by the torch decoder, in one piece and in other slots, under the rows that were given alone.

    Everything is float32 here, so that rounding moves scores by some 1e-6: of so many choices of experts none is that close, or one.
    """
    config = {name: value for name, value in SHAPE.config().items() if name not in ("quantization_config", "torch_dtype")}
    write(tmp_path / "float32", config | {"torch_dtype": "float32"}, dequantized(SHAPE.tensors(1), SHAPE.block))
    for name in ("tokenizer.json", "generation_config.json"):
        shutil.copy(model / name, tmp_path / "float32")
    llm = start(tmp_path / "float32", dtype="float32", **SETUPS[setup])
    choices: list[tuple[list[int], Request, ChoiceDelta]] = []
    for seed in range(3):
        rng = np.random.default_rng(seed)
        requests = {f"{seed}-{index}": a_request(rng, f"{seed}-{index}", alone) for index in range(10)}
        aborts = {rid: int(rng.integers(2, 30)) for rid in list(requests)[::3]}
        for (rid, _), heard in drive(llm.engine, list(requests.values()), aborts, [0] * 10).items():
            assert heard.last is not None
            choices.append(([*requests[rid].prompt_token_ids, *heard.tokens], requests[rid], heard.last))
    assert bool(llm.engine.num_preemptions) == ("tiny" in setup)
    llm.close()
    expected = routed(load_model(tmp_path / "float32"), [(tokens, request.replay) for tokens, request, _ in choices])
    num_rows = num_equal = num_aborted = 0
    for (_, request, last), rows_RLK in zip(choices, expected, strict=True):
        first, got = request.sampling.routed_experts_start, last.routed_experts
        [(known, _)] = last.routed_experts_missing or [(len(got), 0)]
        num_rows += known
        num_equal += int((rows_RLK[first : first + known] == got[:known]).all((1, 2)).sum())
        num_aborted += known > 0 and last.finish_reason is FinishReason.ABORT
    assert num_aborted > 1 and num_rows > 1500 and num_equal >= num_rows - 1


def routed(decoder: Decoder, many: list[tuple[list[int], Replay | None]]) -> list[np.ndarray]:
    """The experts that the tokens of each use, a lane each."""
    replay_TNK = torch.full((sum(len(tokens) for tokens, _ in many), LAYERS, TOP_K), -1)
    at = 0
    for tokens, replay in many:
        for position in range(len(tokens)):
            if replay is not None and (row := replay.row(position)) is not None:
                replay_TNK[at + position] = torch.tensor(list(row)).view(LAYERS, TOP_K)
        at += len(tokens)
    harness = Harness(decoder, lanes=len(many), max_tokens=144)
    harness.step({lane: tokens for lane, (tokens, _) in enumerate(many)}, replay_TNK)
    return [harness.routes.gather(harness.slots(lane, 0, len(tokens))).numpy() for lane, (tokens, _) in enumerate(many)]


def preempt(engine: Engine, replay: Replay | None = None) -> Sequence:
    """Fill a cache of 140 slots until someone has to make room; who did, waiting."""
    for index in range(3):
        prompt = tuple(range(50 * index, 50 * index + 10))
        engine.add(Request(rid=str(index), prompt_token_ids=prompt, sampling=PARAMS.replace(max_tokens=90), replay=replay))
    for _ in range(80):
        if not engine.num_preemptions:
            engine.step()
    assert engine.num_preemptions == 1 and engine.scheduler.num_waiting == 1
    [waiting] = engine.scheduler._requests["2"]
    assert waiting.lane is None and waiting.kept is not None
    assert waiting.kept.shape[0] == waiting.num_computed == len(waiting.tokens) - 1 > 20
    return waiting


def finish(engine: Engine) -> ChoiceDelta:
    while True:
        for delta in engine.step():
            if delta.rid == "2" and delta.finish_reason is not None:
                return delta


TINY: dict[str, Any] = {"page_size": 4, "max_total_tokens": 140, "disable_radix_cache": True}


@pytest.mark.parametrize("step", ["torch", "compiled"])
def test_who_was_preempted_recomputes_under_the_rows_that_it_had(model: Path, step: str) -> None:
    """While it waits, what is kept of it is set to other rows: what it computes anew, it computes under these."""
    llm = start(model, step, **TINY)
    waiting = preempt(llm.engine)
    other = rows(waiting.num_computed, 8)
    waiting.kept = keep(other)
    delta = finish(llm.engine)
    assert np.array_equal(delta.routed_experts[: len(other)], other)
    assert not delta.routed_experts_missing and delta.routing_agreement is None
    llm.close()


def test_a_router_that_changes_meanwhile_changes_no_row_that_was_used(model: Path) -> None:
    """Computed anew freely, its first rows would be others than those that its tokens came from."""
    untouched = start(model, "torch", dtype="float32", **ALONE)
    before = untouched.generate(list(range(100, 110)), PARAMS.replace(max_tokens=60))[0].outputs[0].routed_experts
    untouched.close()
    llm = start(model, "torch", dtype="float32", **TINY)
    num_kept = preempt(llm.engine).num_computed
    for layer in llm.engine._runner._step._decoder.parameters.layers:  # type: ignore[attr-defined]
        layer.gate_ED.copy_(torch.randn(layer.gate_ED.shape, generator=torch.Generator().manual_seed(1)))
    after = finish(llm.engine).routed_experts
    assert np.array_equal(after[:num_kept], before[:num_kept])
    assert not np.array_equal(after[num_kept : len(before)], before[num_kept:])
    llm.close()


@pytest.mark.parametrize("disable_radix_cache", [False, True])
@pytest.mark.parametrize("disable_overlap_schedule", [False, True])
def test_preempted_again_and_again(
    model: Path, alone: Engine, disable_overlap_schedule: bool, disable_radix_cache: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also on its way back: the scheduler keeps nothing free for growth here, and computing again takes many steps of few tokens."""
    config = {"page_size": 4, "max_total_tokens": 140, "chunked_prefill_size": 8, "disable_radix_cache": disable_radix_cache}
    llm = start(model, **config, disable_overlap_schedule=disable_overlap_schedule)
    scheduler, seen = llm.engine.scheduler, []
    monkeypatch.setattr(scheduler, "_growth_pages", 0)
    keep_rows = llm.engine._rows.keep

    def note(sequence: Sequence) -> None:
        seen.append((sequence.num_preemptions, sequence.kept is not None and sequence.num_computed < sequence.kept.end))
        keep_rows(sequence)

    monkeypatch.setattr(llm.engine._rows, "keep", note)
    requests = [
        Request(
            rid=str(index),
            prompt_token_ids=tuple(range(20 * index, 20 * index + 12)),
            sampling=PARAMS.replace(max_tokens=70 + 9 * index, temperature=1.0, seed=index),
            replay=replay_of(rows(40 + index, index), **SIZES) if index % 2 else None,
        )
        for index in range(6)
    ]
    heard = drive(llm.engine, requests, {}, [0] * 6)
    for request in requests:
        same(heard[request.rid, 0], drive(alone, [request], {}, [0])[request.rid, 0], request)
    assert max(times for times, _ in seen) > 1 and any(under_way for _, under_way in seen)
    llm.close()


@pytest.mark.parametrize("replayed", [False, True])
@pytest.mark.parametrize("disable_overlap_schedule", [False, True])
def test_an_aborted_choice_that_had_to_make_room_has_its_rows(model: Path, disable_overlap_schedule: bool, replayed: bool) -> None:
    """While it waits, and at every step of its way back, of which it takes some, nine tokens a step."""
    alone = start(model, **ALONE)
    replay = replay_of(rows(60, 4), **SIZES) if replayed else None
    params = PARAMS.replace(max_tokens=90)
    whole = alone.generate(list(range(100, 110)), params, replay_routed_experts=replay)[0].outputs[0].routed_experts
    alone.close()
    llm = start(model, **TINY, disable_overlap_schedule=disable_overlap_schedule, chunked_prefill_size=9)
    engine, under_way = llm.engine, set()
    for steps in range(8):
        waiting = preempt(engine, replay)
        for rid in ("0", "1") if steps else ():
            engine.abort(rid)
        for _ in range(steps):
            engine.step()
        under_way.add(waiting.num_computed if waiting.lane is not None else -1)
        [delta] = engine.abort("2")
        assert len(delta.routed_experts) == len(waiting.tokens) - 1
        assert np.array_equal(delta.routed_experts, whole[: len(delta.routed_experts)])
        assert not delta.routed_experts_missing
        for rid in ("0", "1"):
            engine.abort(rid)
        while engine.has_work:
            engine.step()
        engine.num_preemptions = 0
    assert -1 in under_way and len(under_way) > 4, "it was never on its way back"
    llm.close()
