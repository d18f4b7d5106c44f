"""Attention by tiles against the reference's spans, and what is promised bit for bit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pointsman.kernels import norm_quant, paged_attention, reference
from pointsman.kernels.candidates import AttentionShape
from pointsman.kernels.paged_attention import ZERO_LANE, TilePlan, lay_out_tiles, most_prefill_tiles, plan, write_tiles
from pointsman.kernels.reference import Span
from pointsman.kernels.weight import Quantized
from tests.kernels.interpreter import correct

correct()
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# weights and the result are rounded to bfloat16: each by 2^-9 of numbers about 1
BOUND = {"rtol": 2**-6, "atol": 2**-6}


def normal(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


class Case:
    """Lanes with (earlier tokens, new tokens), their pages scattered over a cache that is poisoned elsewhere."""

    def __init__(
        self,
        lanes: list[tuple[int, int]],
        *,
        heads: int,
        kv_heads: int,
        channels: int,
        page_size: int = 16,
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        self.shape = AttentionShape(heads, kv_heads, channels)
        most = max(-(-(past + new) // page_size) for past, new in lanes)
        order = torch.randperm(most * len(lanes), generator=torch.Generator().manual_seed(1))
        self.table_LP = torch.full((len(lanes), most), 1 << 20, dtype=torch.int32)
        shape = (most * len(lanes), kv_heads, page_size, channels)
        self.k, self.v = (torch.full(shape, float("nan"), device=DEVICE).to(dtype) for _ in range(2))
        self.spans: list[Span] = []
        positions: list[int] = []
        for lane, (past, new) in enumerate(lanes):
            count = -(-(past + new) // page_size)
            self.table_LP[lane, :count] = order[lane * most : lane * most + count]
            at = torch.arange(past + new)
            slots = self.table_LP[lane][at // page_size].long() * page_size + at % page_size
            k, v = normal(past + new, kv_heads, channels, seed=2 * lane), normal(past + new, kv_heads, channels, seed=2 * lane + 1)
            reference.write_kv(self.k, self.v, k, v, slots.to(DEVICE))
            if new:
                self.spans.append(Span(lane, len(positions), new))
            positions += range(past, past + new)
        self.positions_T = torch.tensor(positions, device=DEVICE)
        self.table_LP = self.table_LP.to(DEVICE)
        self.q_TQC = normal(len(positions), heads, channels, seed=99).bfloat16()
        self.scale = channels**-0.5

    def plan(self, *, uniform: bool = False, rows: int | None = None) -> TilePlan:
        return plan(self.spans, rows or len(self.q_TQC), self.shape, DEVICE, uniform=uniform)

    def run(self, tiles: TilePlan) -> Tensor:
        return paged_attention.attention(self.q_TQC, self.k, self.v, tiles, self.positions_T, self.table_LP, self.scale)

    def run_quantize(self, tiles: TilePlan) -> Quantized:
        return paged_attention.attention_quantize(self.q_TQC, self.k, self.v, tiles, self.positions_T, self.table_LP, self.scale)

    def want(self) -> Tensor:
        return reference.attention(self.q_TQC, self.k, self.v, self.spans, self.positions_T, self.table_LP, self.scale)


MIXED = [(30, 1), (0, 1), (63, 1), (64, 1), (5, 17), (0, 33), (79, 12), (200, 1)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float8_e4m3fn])
def test_a_mixed_step_is_the_references(dtype: torch.dtype) -> None:
    case = Case(MIXED, heads=6, kv_heads=1, channels=128, dtype=dtype)
    whole = case.plan()
    assert whole.num_splits == 32 and len(whole.decode_D3) == 5 and len(whole.prefill_P3) == 2 + 4 + 2
    tiles = TilePlan(decode_D3=whole.decode_D3, prefill_P3=whole.prefill_P3, num_splits=4)
    torch.testing.assert_close(case.run(tiles), case.want(), **BOUND)
    torch.testing.assert_close(case.run(case.plan(uniform=True)), case.want(), **BOUND)


@pytest.mark.parametrize("group", range(1, 9))
def test_any_number_of_query_heads_per_head(group: int) -> None:
    case = Case([(20, 1), (3, 9)], heads=2 * group, kv_heads=2, channels=16, page_size=[1, 2, 16, 64][group % 4])
    torch.testing.assert_close(case.run(case.plan()), case.want(), **BOUND)


@pytest.mark.parametrize("splits", [1, 2, 3, 5, 16])
def test_parts_of_a_sequence_join_to_the_whole(splits: int) -> None:
    case = Case([(299, 1), (0, 1), (64, 1), (127, 1)], heads=6, kv_heads=2, channels=64)
    whole = case.plan()
    tiles = TilePlan(decode_D3=whole.decode_D3, prefill_P3=whole.prefill_P3, num_splits=splits)
    got = case.run(tiles)
    torch.testing.assert_close(got, case.want(), **BOUND)
    assert torch.equal(got, case.run(tiles))


@pytest.mark.parametrize("splits", [1, 4])
def test_the_quantized_answer_is_the_answer_quantized(splits: int) -> None:
    case = Case([(70, 1), (2, 3), (150, 1)], heads=6, kv_heads=1, channels=128)
    tiles = case.plan()
    tiles = TilePlan(decode_D3=tiles.decode_D3, prefill_P3=tiles.prefill_P3, num_splits=splits)
    got, want = case.run_quantize(tiles), norm_quant.quantize(case.run(tiles).flatten(1))
    assert torch.equal(got.data.view(torch.uint8), want.data.view(torch.uint8)) and torch.equal(got.scale, want.scale)


def test_in_the_uniform_mode_no_bit_of_a_row_depends_on_others() -> None:
    """A token decoded alone, in a batch, or computed again as part of a chunk of any size."""
    whole = Case([(0, 100)], heads=6, kv_heads=1, channels=64)
    want_TQC = whole.run(whole.plan(uniform=True))
    for first, new in ((99, 1), (40, 1), (37, 29), (0, 55)):
        part = Case([(0, 100), (11, 3)], heads=6, kv_heads=1, channels=64)
        part.spans = [Span(1, 0, 3), Span(0, 3, new)]
        part.positions_T = torch.cat((torch.arange(11, 14), torch.arange(first, first + new))).to(DEVICE)
        part.q_TQC = torch.cat((normal(3, 6, 64).bfloat16(), whole.q_TQC[first : first + new]))
        got = part.run(part.plan(uniform=True))
        assert torch.equal(got[3:], want_TQC[first : first + new]), (first, new)


@pytest.mark.parametrize("lanes", [[(10, 1), (20, 1)], [(10, 1), (3, 8)]])
@pytest.mark.parametrize("splits", [1, 4])
def test_rows_that_pad_a_step_become_zeros_and_empty_tiles_do_nothing(lanes: list[tuple[int, int]], splits: int) -> None:
    case = Case(lanes, heads=4, kv_heads=2, channels=32)
    rows, wanted = len(case.q_TQC), case.want()
    padded = rows + 21
    found = case.plan(rows=padded)
    room = [torch.cat((tiles, torch.zeros(3, 3, dtype=torch.int32, device=DEVICE))) for tiles in (found.decode_D3, found.prefill_P3)]
    case.q_TQC = torch.cat((case.q_TQC, torch.full((21, 4, 32), float("nan"), dtype=torch.bfloat16, device=DEVICE)))
    case.positions_T = torch.cat((case.positions_T, torch.zeros(21, dtype=torch.int64, device=DEVICE)))
    got = case.run(TilePlan(decode_D3=room[0], prefill_P3=room[1], num_splits=splits))
    torch.testing.assert_close(got[:rows], wanted, **BOUND)
    assert bool((got[rows:] == 0).all())


@settings(deadline=None, max_examples=200)
@given(lengths=st.lists(st.integers(1, 70), max_size=9), padding=st.integers(0, 40), per_tile=st.integers(1, 64), uniform=st.booleans())
def test_tiles_cover_every_row_once_within_their_room(lengths: list[int], padding: int, per_tile: int, uniform: bool) -> None:
    spans, end = [], 0
    for lane, length in enumerate(lengths):
        spans.append(Span(lane, end, length))
        end += length
    decode, prefill = lay_out_tiles(spans, end + padding, per_tile, uniform=uniform)
    covered = sorted(row for tile in decode + prefill for row in range(tile.start, tile.start + tile.length))
    assert covered == list(range(end + padding))
    assert all(tile.length == 1 for tile in decode) and all(1 <= tile.length <= per_tile for tile in prefill)
    assert len(prefill) <= most_prefill_tiles(end + padding, len(lengths), per_tile)
    lane_of = {row: span.lane for span in spans for row in range(span.start, span.start + span.length)}
    assert all(tile.lane == lane_of.get(tile.start, ZERO_LANE) for tile in decode + prefill)


def test_room_behind_the_tiles_is_cleared() -> None:
    array = torch.full((4, 3), 9, dtype=torch.int32).numpy()
    write_tiles(array, [Span(2, 5, 1)])
    assert array.tolist() == [[5, 1, 2], [0, 0, 0], [0, 0, 0], [0, 0, 0]]
    with pytest.raises(AssertionError, match="5 tiles in room for 4"):
        write_tiles(array, [Span(0, 0, 1)] * 5)


@given(lengths=st.lists(st.integers(1, 30), max_size=9), padding=st.integers(0, 40), uniform=st.booleans(), spare=st.integers(0, 3))
def test_fixed_tiles_cover_every_row_once_whatever_the_step(lengths: list[int], padding: int, uniform: bool, spare: int) -> None:
    shape = AttentionShape(12, 2, 64)
    spans, end = [], 0
    for lane, length in enumerate(lengths):
        spans.append(Span(lane, end, length))
        end += length
    num_rows, num_lanes = end + padding, max(len(lengths) + spare, 1)
    arrays = paged_attention.fixed_tiles(spans, num_rows, num_lanes, shape, uniform=uniform)
    empty = paged_attention.fixed_tiles([], num_rows, num_lanes, shape, uniform=uniform)
    assert [array.shape for array in arrays] == [array.shape for array in empty]
    lane_of = {row: span.lane for span in spans for row in range(span.start, span.start + span.length)}
    covered = [(row, lane) for array in arrays for first, length, lane in array.tolist() for row in range(first, first + length)]
    assert sorted(covered) == [(row, lane_of.get(row, ZERO_LANE)) for row in range(num_rows)]
    assert paged_attention.plan_of([torch.from_numpy(array) for array in arrays], shape).num_splits >= 1
