"""The compiled step against the same model in float64, and against itself: cut otherwise, among other rows, on other threads.

Three combinations of stored forms are used, so that a machine without compiled steps compiles three.
"""

from __future__ import annotations

import math
import time
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from pointsman.kernels import cpu_step
from pointsman.kernels.cpu_step import CpuCache, CpuStep, ModelShape
from pointsman.kernels.cpu_table import SLEEPERS
from tests.kernels.cpu_model import Model

Form = tuple[dict[str, Any], str]
FP8: Form = {"attention": "e4m3", "experts": "e4m3", "head": "bfloat16"}, "bfloat16"
FLOAT32: Form = {"attention": "float32", "experts": "float32", "head": "float32"}, "float32"
BFLOAT16: Form = {"attention": "bfloat16", "experts": "bfloat16", "head": "bfloat16"}, "e4m3"

PLAIN = ModelShape(
    vocab=97, hidden=128, layers=2, heads=4, kv_heads=2, head_dim=32, rotary_dim=16, experts=8, top_k=2, width=64, epsilon=1e-6
)
SHAPES = {
    "plain": (PLAIN, (128, 128)),
    "nothing fits": (
        replace(PLAIN, hidden=100, heads=5, kv_heads=1, head_dim=6, rotary_dim=2, experts=7, top_k=3, width=40, vocab=70),
        (32, 48),
    ),
    "one head each": (replace(PLAIN, hidden=36, heads=3, kv_heads=3, head_dim=24, rotary_dim=24, width=33, experts=3, top_k=3), (5, 7)),
    "wide groups": (replace(PLAIN, heads=16, head_dim=80, rotary_dim=40, experts=5, top_k=1), (64, 128)),
    "groups of three": (replace(PLAIN, heads=6, head_dim=64, rotary_dim=0, experts=9, top_k=8, vocab=65), (1, 128)),
    "groups of six": (replace(PLAIN, hidden=200, heads=12, head_dim=128, rotary_dim=64, layers=1), (128, 128)),
    "many experts": (replace(PLAIN, hidden=20, experts=300, top_k=9, width=8, layers=3), (128, 128)),
    "each head normed, softmax": (replace(PLAIN, qk_norm="each", score="softmax", heads=6, head_dim=24, rotary_dim=24), (128, 128)),
    "no norm, chosen not normed": (replace(PLAIN, qk_norm=None, score="softmax", renormalize=False, experts=9, top_k=4), (64, 64)),
    "scaled": (replace(PLAIN, qk_norm="each", routing_scale=2.5, experts=5, top_k=5), (128, 128)),
    "shared, dense, biased": (
        replace(PLAIN, layers=4, qk_norm="each", biased=True, shared=1, dense_layers=(0, 2), dense=3, routing_scale=2.5),
        (32, 64),
    ),
    "dense layers of many pieces": (replace(PLAIN, width=32, layers=3, shared=2, dense_layers=(1, 2), dense=9, top_k=1), (16, 32)),
    "one of all": (
        ModelShape(vocab=1, hidden=2, layers=1, heads=1, kv_heads=1, head_dim=2, rotary_dim=2, experts=1, top_k=1, width=1, epsilon=1e-6),
        (1, 1),
    ),
}

# Logits have a size of about 3. float32 sums differ from float64 ones by rounding only. A key or value whose float64 and float32
# forms lie on both sides of a rounding boundary is stored a step apart: 2**-9 of itself in bfloat16, 2**-4 in e4m3.
TOLERANCE = {"float32": 2e-5, "bfloat16": 2e-3, "e4m3": 3e-2}


GUARD = 1 << 14


def model_of(name: str, **how: Any) -> Model:
    """The last of the pieces of what all tokens take is not full."""
    shape, block = SHAPES[name]
    widths = {"shared_width": max(shape.shared * shape.width - 3, 0), "dense_width": max(shape.dense * shape.width - 5, 0)}
    return Model(shape, block=block, **widths, **how)


def chunks(length: int, generator: np.random.Generator, most: int) -> list[range]:
    cuts, at = [], 0
    while at < length:
        size = int(generator.integers(1, most + 1))
        cuts.append(range(at, min(at + size, length)))
        at += size
    return cuts


def feed(step: CpuStep, prompts: dict[int, Any], *, most: int = 40, seed: int = 5, forced: bool = False) -> dict[int, Any]:
    """Feed each lane its prompt in random chunks, lanes side by side, and return all logits by lane."""
    generator = np.random.default_rng(seed)
    waiting = {lane: chunks(len(tokens), generator, most) for lane, tokens in prompts.items()}
    logits: dict[int, list[Any]] = {lane: [] for lane in prompts}
    while any(waiting.values()):
        rows: list[tuple[int, int, int]] = []
        for lane in generator.permutation(list(waiting)).tolist():
            if waiting[lane] and len(rows) + len(waiting[lane][0]) <= step.max_rows and (not rows or generator.random() < 0.8):
                rows += [(int(prompts[lane][position]), position, lane) for position in waiting[lane].pop(0)]
        tokens, positions, lanes = zip(*rows, strict=True)
        out = step.run(tokens, positions, lanes, range(len(rows)), [int(forced)] * len(rows))
        for row, lane in enumerate(lanes):
            logits[lane].append(out[row].copy())
    return {lane: np.stack(rows) for lane, rows in logits.items()}


def slots(cache: CpuCache, lane: int, length: int) -> Any:
    position, page_size = np.arange(length), cache.k.shape[3]
    return cache.page_table[lane, position // page_size] * page_size + position % page_size


def prompt(model: Model, length: int, seed: int) -> Any:
    return np.random.default_rng(seed).integers(0, model.shape.vocab, length)


@pytest.mark.parametrize("form", [FP8, FLOAT32, BFLOAT16], ids=["fp8", "float32", "bfloat16"])
@pytest.mark.parametrize(
    ("name", "page_size"), [(name, size) for name, size in zip(SHAPES, (16, 5, 1, 16, 3, 7, 16, 4, 16, 5, 3, 16, 2), strict=True)]
)
def test_step_is_the_model(name: str, page_size: int, form: Form) -> None:
    """Logits within the tolerance and the same experts, up to the first row where a near tie fell the other way."""
    (shape, _), (forms, cache_form) = SHAPES[name], form
    model = model_of(name, **forms, seed=3, bias=None if shape.score == "softmax" else 0.02)
    step, cache = model.step(cache_form, lanes=3, pages=-(-70 // page_size), page_size=page_size)
    prompts = {0: prompt(model, 60, 1), 2: prompt(model, 33, 2), 1: prompt(model, 1, 3)}
    got = feed(step, prompts)
    step.close()
    agreed = total = 0
    for lane, tokens in prompts.items():
        logits, routes = model.forward(tokens, cache_form)
        same = (cache.routes[slots(cache, lane, len(tokens))] == routes).all((1, 2))
        rows = len(tokens) if same.all() else int(same.argmin())
        agreed, total = agreed + rows, total + len(tokens)
        np.testing.assert_allclose(got[lane][:rows], logits[:rows], rtol=0, atol=TOLERANCE[cache_form])
    assert agreed == total if cache_form == "float32" else agreed > 0.9 * total


def test_long_context_crosses_blocks_of_attention() -> None:
    """600 positions: attention scores 256 at a time."""
    model = Model(replace(PLAIN, layers=1), **FLOAT32[0], max_positions=700)
    step, _ = model.step("float32", lanes=1, pages=22, page_size=31)
    tokens = prompt(model, 600, 4)
    got = feed(step, {0: tokens}, most=64)[0]
    np.testing.assert_allclose(got, model.forward(tokens, "float32")[0], rtol=0, atol=TOLERANCE["float32"])


@pytest.mark.parametrize("form", [FP8, BFLOAT16], ids=["fp8", "bfloat16"])
@pytest.mark.parametrize("num_threads", [1, 2, 3, 7])
def test_rows_do_not_depend_on_company_chunks_or_threads(num_threads: int, form: Form) -> None:
    """Bit for bit: alone and token by token on one thread, or chunked among others on many (more than there are cores)."""
    model = Model(replace(PLAIN, hidden=192, heads=6, head_dim=48), **form[0], seed=8)
    prompts = {lane: prompt(model, length, lane) for lane, length in ((0, 90), (1, 17), (2, 41), (3, 64))}
    alone, cache = model.step(form[1], num_threads=1)
    right = {lane: feed(alone, {lane: tokens}, most=1)[lane] for lane, tokens in prompts.items()}
    step, other = model.step(form[1], num_threads=num_threads)
    for seed, most in ((1, 3), (2, 64)):
        got = feed(step, prompts, most=most, seed=seed)
        for lane, tokens in prompts.items():
            assert got[lane].tobytes() == right[lane].tobytes()
            place = slots(cache, lane, len(tokens))
            assert (cache.routes[place] == other.routes[place]).all()
            page, offset = place // 16, place % 16
            assert (cache.k[:, page, :, offset] == other.k[:, page, :, offset]).all()
            assert (cache.v[:, page, :, offset] == other.v[:, page, :, offset]).all()


def test_nothing_else_is_written() -> None:
    """Slots that no row owns keep what they had."""
    model = Model(PLAIN, **FP8[0])
    step, cache = model.step()
    before = cache.k.copy(), cache.v.copy(), cache.routes.copy()
    feed(step, {1: prompt(model, 37, 1)})
    free = np.setdiff1d(np.arange(len(cache.routes)), slots(cache, 1, 37))
    page, offset = free // 16, free % 16
    for array, old in zip((cache.k, cache.v), before[:2], strict=True):
        assert (array[:, page, :, offset] == old[:, page, :, offset]).all()
    assert (cache.routes[free] == before[2][free]).all()


@pytest.mark.parametrize("form", [FP8, FLOAT32, BFLOAT16], ids=["fp8", "float32", "bfloat16"])
@pytest.mark.parametrize("name", SHAPES)
def test_buffers_are_not_overrun(name: str, form: Form, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every buffer of a step lies between stretches that stay as they were."""
    forms, cache_form = form
    guards = []

    def guarded(size: tuple[int, ...], dtype: Any) -> Any:
        memory = np.full(math.prod(size) * dtype.itemsize + 2 * GUARD, 0xA5, np.uint8)
        first = GUARD - memory.ctypes.data % 64
        inside = memory[first : first + math.prod(size) * dtype.itemsize]
        inside[:] = 0
        guards.extend((memory[:first], memory[first + len(inside) :]))
        return inside.view(dtype).reshape(size)

    model = model_of(name, **forms)
    monkeypatch.setattr(cpu_step, "aligned", guarded)
    step, _ = model.step(cache_form, lanes=2, page_size=5, pages=20, max_rows=20, num_threads=2)
    feed(step, {0: prompt(model, 90, 1), 1: prompt(model, 33, 2)}, most=20)
    step.close()
    assert len(guards) > 40 and all((guard == 0xA5).all() for guard in guards)


def test_equal_scores_go_to_the_lower_expert() -> None:
    model = Model(replace(PLAIN, experts=20, top_k=5), **FLOAT32[0])
    for layer in model.layers:
        layer.packed.gate[:] = 0
        layer.packed.bias[:] = 0
        layer.packed.bias[[4, 17]] = 0.25
    step, cache = model.step("float32")
    feed(step, {0: prompt(model, 9, 1)})
    assert (cache.routes[slots(cache, 0, 9)] == [4, 17, 0, 1, 2]).all()


def test_bias_chooses_and_does_not_weigh() -> None:
    """A bias that outweighs every score, against the oracle, which adds it to the choice only."""
    model = Model(PLAIN, **FLOAT32[0], bias=30.0)
    step, _ = model.step("float32")
    tokens = prompt(model, 20, 1)
    np.testing.assert_allclose(feed(step, {0: tokens})[0], model.forward(tokens, "float32")[0], rtol=0, atol=TOLERANCE["float32"])


@pytest.mark.parametrize("experts", [8, 300])
def test_forced_experts(experts: int) -> None:
    """Rows forced take the experts at their slots, weighed by their own scores; their own choice again changes no bit."""
    model = Model(replace(PLAIN, experts=experts, top_k=3), **FLOAT32[0])
    step, cache = model.step("float32")
    tokens = prompt(model, 30, 1)
    free, place = feed(step, {0: tokens})[0], slots(cache, 0, 30)
    assert (cache.alike == -7).all(), "what is not forced counts nothing"
    assert feed(step, {0: tokens}, forced=True)[0].tobytes() == free.tobytes()
    assert (cache.alike[place] == 2).all()
    cache.routes[place] = cache.routes[place][:, :, [2, 0, 1]]
    feed(step, {0: tokens}, forced=True)
    assert (cache.alike[place] == 2).all(), "the order of experts does not count"
    generator = np.random.default_rng(2)
    given = np.stack([[generator.permutation(experts)[:3] for _ in range(2)] for _ in range(30)]).astype(cache.routes.dtype)
    given[::3] = cache.routes[place][::3]
    cache.routes[place] = given
    got = feed(step, {0: tokens}, forced=True)[0]
    assert (cache.routes[place] == given).all()
    logits, free_choice = model.forward(tokens, "float32", given)
    np.testing.assert_allclose(got, logits, rtol=0, atol=TOLERANCE["float32"])
    same = (np.sort(free_choice, -1) == np.sort(given, -1)).all(-1)
    assert (cache.alike[place] == same.sum(1)).all()


def test_logits_only_of_rows_that_ask() -> None:
    model = Model(PLAIN, **FP8[0])
    step, _ = model.step()
    tokens = prompt(model, 50, 1)
    every = step.run(tokens, range(50), [0] * 50, range(50)).copy()
    for rows in ([49], [3, 30, 7], []):
        assert step.run(tokens, range(50), [0] * 50, rows).tobytes() == every[rows].tobytes()


def test_nan_stays_one_and_breaks_nothing_else() -> None:
    model = Model(PLAIN, **FLOAT32[0])
    model.embed_bits[5] = np.nan
    step, _ = model.step("float32")
    logits = step.run([4, 5, 6], [0, 0, 0], [0, 1, 2], [0, 1, 2])
    assert np.isfinite(logits[[0, 2]]).all() and np.isnan(logits[1]).all()


def test_helpers_sleep_and_wake() -> None:
    """Between steps the helping threads end in a blocking read, and a step after that finds them."""
    model = Model(PLAIN, **FP8[0])
    step, _ = model.step(num_threads=4)
    tokens = prompt(model, 20, 1)
    for position in range(6):
        step.run(tokens[:1], [position], [0], [0])
        while step._control[SLEEPERS] < 3:
            time.sleep(0.001)
    step.close()
    step.close()
    with pytest.raises(AssertionError):
        step.run([0], [0], [0], [0])


@pytest.mark.parametrize(
    "rows",
    [
        ([97], [0], [0], [0]),
        ([-1], [0], [0], [0]),
        ([0], [-1], [0], [0]),
        ([0], [512], [0], [0]),
        ([0], [40], [3], [0]),
        ([0], [0], [4], [0]),
        ([0], [0], [-1], [0]),
        ([0], [0], [0], [1]),
        ([0], [0], [0], [-1]),
        ([0], [256], [0], [0]),
        ([], [], [], []),
        ([0] * 65, range(65), [0] * 65, []),
        ([0], [0], [0], [0, 0]),
        ([0], [0], [0], [0], [1]),
    ],
)
def test_what_does_not_exist_is_refused(rows: Any) -> None:
    """And the step works on afterwards."""
    model = Model(replace(PLAIN, layers=1), **FP8[0])
    step, cache = model.step()
    cache.page_table[3, 2] = 64
    with pytest.raises(ValueError, match="row"):
        step.run(*rows)
    assert np.isfinite(step.run([0], [0], [0], [0])).all()


def test_wrong_arrays_are_refused() -> None:
    model = Model(replace(PLAIN, layers=1), **FP8[0])
    weights = model.weights()
    step, cache = model.step()
    step.close()
    for wrong in (
        replace(cache, k=cache.k[:, :, :1]),
        replace(cache, v=cache.v.astype(np.float32)),
        replace(cache, routes=cache.routes.astype(np.uint16)),
        replace(cache, alike=cache.alike[1:]),
        replace(cache, alike=cache.alike.astype(np.int32)),
        replace(cache, page_table=cache.page_table.astype(np.int64)),
        replace(cache, page_table=cache.page_table[0]),
    ):
        with pytest.raises(ValueError, match="it must be"):
            CpuStep(model.shape, weights, wrong, max_rows=8, num_threads=1)
    with pytest.raises(ValueError, match="more than 1048575 parts"):
        CpuStep(model.shape, weights, cache, max_rows=1 << 20, num_threads=1)
    for sizes in ({"max_rows": 0, "num_threads": 1}, {"max_rows": 1, "num_threads": 0}):
        with pytest.raises(ValueError, match="at least 1"):
            CpuStep(model.shape, weights, cache, **sizes)
