"""The decoder against itself: however rows are cut into steps, mixed with others, or cached, the answer is one."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pointsman.models.decoder import Decoder
from pointsman.models.loader import load_model
from tests.models.checkpoints import Harness, Shape

SHAPE = Shape(layers=3, experts=7, top_k=3)
IDS = torch.randint(SHAPE.vocab, (30,), generator=torch.Generator().manual_seed(5)).tolist()
# products of other heights sum in another order; logits are of size 4
ORDER = 2e-5


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Decoder:
    return load_model(SHAPE.write(tmp_path_factory.mktemp("decoder")))


@pytest.fixture(scope="module")
def whole(decoder: Decoder) -> Tensor:
    return Harness(decoder).step({0: IDS})[0]


@settings(deadline=None, max_examples=15)
@given(cuts=st.sets(st.integers(1, len(IDS) - 1), max_size=6), page_size=st.sampled_from([1, 3, 4, 16]), seed=st.integers(0, 99))
def test_chunked_prefill_equals_unchunked(decoder: Decoder, whole: Tensor, cuts: set[int], page_size: int, seed: int) -> None:
    harness = Harness(decoder, page_size=page_size, seed=seed)
    edges = [0, *sorted(cuts), len(IDS)]
    chunks = [harness.step({0: IDS[a:b]})[0] for a, b in itertools.pairwise(edges)]
    torch.testing.assert_close(torch.cat(chunks), whole, atol=ORDER, rtol=0)


def test_rows_of_others_change_nothing(decoder: Decoder, whole: Tensor) -> None:
    harness = Harness(decoder)
    other = [(token * 7 + 1) % SHAPE.vocab for token in IDS]
    first = harness.step({2: other[:9], 0: IDS[:12], 3: other[3:4]})[0]
    rest = [harness.step({3: [position], 0: IDS[position : position + 1], 2: [1, 2]})[0] for position in range(12, len(IDS))]
    torch.testing.assert_close(torch.cat([first, *rest]), whole, atol=ORDER, rtol=0)


def test_only_the_rows_asked_for_get_logits(decoder: Decoder, whole: Tensor) -> None:
    harness = Harness(decoder)
    everything = decoder.forward

    def last_two(tokens: Tensor, ctx: object, rows: Tensor) -> Tensor:
        return everything(tokens, ctx, rows[-2:])  # type: ignore[arg-type]

    decoder.forward = last_two  # type: ignore[method-assign]
    try:
        logits = harness.step({0: IDS})[0]
    finally:
        del decoder.forward  # type: ignore[method-assign]
    assert logits.shape == (2, SHAPE.vocab) and logits.dtype == torch.float32
    torch.testing.assert_close(logits, whole[-2:], atol=ORDER, rtol=0)


@pytest.mark.parametrize(
    # keys and values are of size 1 to 3; bfloat16 rounds them by 2^-9 at most, e4m3 by 2^-4
    ("dtype", "bound"),
    [(torch.bfloat16, 0.006), (torch.float8_e4m3fn, 0.08)],
)
def test_a_narrow_cache_stays_within_its_bound(decoder: Decoder, whole: Tensor, dtype: torch.dtype, bound: float) -> None:
    free = Harness(decoder)
    free.step({0: IDS})
    experts = free.routes.gather(free.slots(0, 0, len(IDS))).long()
    logits = Harness(decoder, dtype=dtype).step({0: IDS}, replay_TNK=experts)[0]
    distance = float((logits - whole).square().mean().sqrt() / whole.square().mean().sqrt())
    assert 0 < distance < bound


def test_a_narrow_cache_chunked_equals_unchunked(decoder: Decoder) -> None:
    for dtype in (torch.bfloat16, torch.float8_e4m3fn):
        at_once = Harness(decoder, dtype=dtype).step({0: IDS})[0]
        harness = Harness(decoder, dtype=dtype, seed=3)
        steps = torch.cat([harness.step({0: [token]})[0] for token in IDS])
        # a key that rounds the other way moves logits a little; a row that read unrounded keys would move them by the bound above
        assert float((steps - at_once).square().mean().sqrt() / at_once.square().mean().sqrt()) < 2e-3


def test_replaying_a_record_repeats_the_run_bit_for_bit(decoder: Decoder) -> None:
    free = Harness(decoder)
    logits = free.step({1: IDS})[1]
    record = free.routes.gather(free.slots(1, 0, len(IDS))).long()
    replayed = Harness(decoder)
    assert torch.equal(replayed.step({1: IDS}, replay_TNK=record)[1], logits)
    assert torch.equal(replayed.routes.gather(replayed.slots(1, 0, len(IDS))).long(), record)


def test_replay_forces_experts_and_minus_one_routes_freely(decoder: Decoder) -> None:
    free = Harness(decoder)
    logits = free.step({0: IDS})[0]
    record = free.routes.gather(free.slots(0, 0, len(IDS))).long()
    assert torch.equal(Harness(decoder).step({0: IDS}, replay_TNK=torch.full_like(record, -1))[0], logits)
    forced = record.clone()
    forced[5:, 1] = torch.tensor([6, 0, 3])
    harness = Harness(decoder)
    assert not torch.allclose(harness.step({0: IDS}, replay_TNK=forced)[0][5:], logits[5:], atol=1e-2)
    assert torch.equal(harness.routes.gather(harness.slots(0, 0, len(IDS)))[5:, 1].long(), forced[5:, 1])


def test_forms_are_made_at_first_use_and_can_be_dropped(tmp_path: Path) -> None:
    decoder = load_model(Shape(hidden=32, width=32, block=(32, 32)).write(tmp_path))
    layer = decoder.layers[0]
    assert layer.moe._ready is None and layer.attention.qkv._ready is None and decoder.head._ready is None
    logits = Harness(decoder).step({0: [1, 2, 3]})[0]
    assert layer.moe._ready is not None
    decoder.release()
    assert layer.moe._ready is None and decoder.head._ready is None
    decoder.prepare()
    assert layer.moe._ready is not None and layer.attention.qkv._ready is not None
    assert torch.equal(Harness(decoder).step({0: [1, 2, 3]})[0], logits)
