"""Floors against arithmetic by hand, the figures of MiniMax-M2.5's roofline, and what must hold of any floor."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pointsman.config import EngineConfig, engine_config
from pointsman.engine.device_models import MODELS
from pointsman.engine.floor import CACHE, EXPERTS, LINKS, Rates, decode_floor, prefill_floors
from pointsman.engine.plan import Plan, plan_on, share_of
from pointsman.models import architecture_of
from pointsman.moe.spec import experts_hit
from tests.models.test_architecture import PUBLISHED

M25 = architecture_of(PUBLISHED)
# what the roofline that the project was planned with assumes of two H200: a copy's bandwidth, and products and links as kernels reach them
ROOFLINE = Rates(read=4.3e12, matrices=1.3e15, plain=1.3e15, num_ranks=2, link=400e9, reduce_seconds=6e-6)


def plan(config: EngineConfig | None = None, device: str = "h200", **options: object) -> Plan:
    return plan_on(config or engine_config(tp=2, kv_cache_dtype="fp8_e4m3", **options), M25, MODELS[device])


@pytest.mark.parametrize("num_tokens", [1, 3, 40])
def test_experts_hit_as_a_simulation_counts_them(num_tokens: int) -> None:
    rng = np.random.default_rng(0)
    hit = [len({int(e) for _ in range(num_tokens) for e in rng.choice(32, 4, replace=False)}) for _ in range(1500)]
    # the mean of 1500 draws whose spread is below 2
    assert experts_hit(32, 4, num_tokens) == pytest.approx(float(np.mean(hit)), abs=4 * 2 / math.sqrt(1500))


def test_a_decode_step_of_minimax_m25_by_hand() -> None:
    """Bytes of one rank of two, one sequence of 1000 tokens; scales of 4 bytes for 128 x 128 and whatever is float32 included."""
    floor = decode_floor(share_of(plan()), ROOFLINE, batch=1, context=1000)
    expert = 3 * 3072 * 1536 * (1 + 4 / 128**2) / 2
    near = pytest.approx
    assert floor.num_bytes[EXPERTS] == near(62 * 8 * expert, rel=1e-3)  # activations are less than that
    assert floor.num_bytes["attention"] == near(62 * 3072 * (8192 + 6144) * (1 + 4 / 128**2) / 2)
    assert floor.num_bytes["router"] == 62 * 4 * (256 * 3072 + 256)
    assert floor.num_bytes["head"] == 200064 * 3072 * 2 / 2
    assert floor.num_bytes[CACHE] == 1001 * 2 * 62 * 8 * 128 / 2
    assert floor.seconds[LINKS] == near(62 * 3 * 6e-6 + 62 * 2 * 3072 * 2 / 400e9)


# milliseconds of the roofline's arithmetic; norms are not part of it, and are less than 0.1 %
@pytest.mark.parametrize(("batch", "context", "ms"), [(1, 1386, 2.45), (16, 1386, 12.3), (128, 1386, 30.2)])
def test_the_floors_of_the_roofline(batch: int, context: int, ms: float) -> None:
    floor = decode_floor(share_of(plan()), ROOFLINE, batch=batch, context=context)
    assert 1000 * floor.total_seconds == pytest.approx(ms, rel=0.01)


def test_the_experts_of_a_layer_as_the_roofline_has_them() -> None:
    """Microseconds of one layer at TP1, TP2 and EP2: facts of 4.3 TB/s and 1500 TFLOP/s, printed with one digit."""
    rates = Rates(read=4.3e12, matrices=1.5e15, plain=1.5e15)
    for batch, one, two in [(1, 26.4, 13.2), (16, 335.9, 168.0), (128, 829.5, 414.9), (8192, 1237.0, 618.5)]:
        for layout, us in (({}, one), ({"tp": 2}, two), ({"tp": 2, "ep": 2}, two)):
            made = plan(engine_config(**layout))
            floor = decode_floor(share_of(made), Rates(**{**vars(rates), "num_ranks": made.shard.tp}), batch=batch, context=1)
            assert 1e6 * floor.seconds[EXPERTS] / 62 == pytest.approx(us, rel=0.01), (batch, layout)


@given(st.integers(1, 400), st.integers(1, 4000))
def test_more_sequences_or_tokens_never_take_less(batch: int, context: int) -> None:
    share = share_of(plan())
    here = decode_floor(share, ROOFLINE, batch=batch, context=context)
    assert all(seconds >= 0 for seconds in here.seconds.values())
    assert here.seconds.keys() == here.num_bytes.keys()
    for more in ({"batch": batch + 1, "context": context}, {"batch": batch, "context": context + 1}):
        assert decode_floor(share, ROOFLINE, **more).total_seconds >= here.total_seconds
    # a prompt has as many operations however it is cut, and a cut reads the weights again
    whole, cut = (prefill_floors(share, ROOFLINE, length=context, chunk=chunk) for chunk in (context, max(1, context // 2)))
    assert sum(step.num_tokens for step in cut) == sum(step.num_tokens for step in whole) == context
    assert sum(step.total_seconds for step in cut) >= whole[0].total_seconds * (1 - 1e-9)
