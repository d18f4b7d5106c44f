"""From records to replays and from replays to forced rows, against loops over positions."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pointsman.replay import ForcedRows, check_sizes, keep, replay_of, rows_of
from pointsman.request import Replay, Request, SamplingParams
from pointsman.routed_experts import RoutedExperts, encode

LAYERS, EXPERTS, TOP_K = 2, 5, 3
SIZES: dict[str, Any] = {"layers": range(LAYERS), "num_experts": EXPERTS, "top_k": TOP_K}


def rows(count: int, seed: int = 0, experts: int = EXPERTS) -> np.ndarray:
    rng = np.random.default_rng(seed)
    drawn = [[rng.permutation(experts)[:TOP_K] for _ in range(LAYERS)] for _ in range(count)]
    return np.array(drawn, np.uint8 if experts <= 256 else np.uint16).reshape(count, LAYERS, TOP_K)


def experts_of(count: int = 4, **fields: Any) -> RoutedExperts:
    return RoutedExperts(rows_RLK=rows(count), num_experts=EXPERTS, layers=(0, 1), **fields)


@st.composite
def replays(draw: st.DrawFn) -> Replay:
    count, start = draw(st.integers(0, 12)), draw(st.integers(0, 9))
    cuts = sorted(draw(st.sets(st.integers(0, count), max_size=6)))
    missing = tuple(zip(cuts[::2], cuts[1::2], strict=False))
    given_rows = rows(count, draw(st.integers(0, 99)))
    return replay_of(RoutedExperts(rows_RLK=given_rows, num_experts=EXPERTS, start=start, layers=(0, 1), missing=missing), **SIZES)


def by_position(replay: Replay) -> dict[int, list[Any]]:
    """What each position is forced to, by a loop."""
    lost = {row for first, last in replay.missing for row in range(first, last)}
    found = np.frombuffer(replay.data, np.uint8).reshape(replay.shape)
    return {replay.start + row: found[row].tolist() for row in range(replay.shape[0]) if row not in lost}


def flat(row: list[list[int]]) -> list[int]:
    return [expert for layer in row for expert in layer]


def test_every_form_gives_the_same_replay() -> None:
    whole = experts_of()
    expected = Replay(shape=(4, LAYERS, TOP_K), data=whole.rows_RLK.tobytes())
    for form in (whole, encode(whole), whole.rows_RLK, whole.rows_RLK.astype(np.int32), np.asfortranarray(whole.rows_RLK), expected):
        assert replay_of(form, **SIZES) == expected


def test_rows_that_are_missing_stay_so() -> None:
    whole = experts_of(missing=((1, 3),), start=7)
    replay = replay_of(encode(whole), **SIZES)
    assert (replay.start, replay.missing, list(replay.forced)) == (7, ((1, 3),), [(7, 8), (10, 11)])
    signed = whole.rows_RLK.astype(np.int16)
    signed[1:3] = -1
    assert list(replay_of(signed, **SIZES).forced) == [(0, 1), (3, 4)]


def test_two_bytes_an_id_beyond_256_experts() -> None:
    wide = rows(4, experts=300)
    sizes = SIZES | {"num_experts": 300}
    replay = replay_of(wide, **sizes)
    assert len(replay.data) == 2 * wide.size and np.array_equal(rows_of(replay), wide)
    assert replay.row(2) == wide[2].astype("<u2").tobytes()
    assert np.array_equal(rows_of(keep(wide)), wide)
    with pytest.raises(ValueError, match=r"has 48 bytes; 4 rows of a model of 5 experts are uint8"):
        check_sizes(replay, **SIZES)
    high = Replay(shape=(1, LAYERS, TOP_K), data=np.array([[[0, 1, 2], [3, 4, 400]]], "<u2").tobytes())
    with pytest.raises(ValueError, match="has the expert 400; ids of this model go from 0 to 299"):
        check_sizes(high, **sizes)


def changed(**fields: Any) -> dict[str, Any]:
    record = encode(experts_of())
    assert isinstance(record, dict)
    return record | fields


WRONG: list[tuple[Any, str]] = [
    ("AAAA", "it is a str; it must be a record"),
    (7, "it is a int; it must be a record"),
    ([[0, 1]], "it is a list; it must be a record"),
    (changed(crc32=1), "crc32 is 1"),
    (changed(version=2), "version is 2; this reads version 1"),
    (changed(start=-1), "start is -1"),
    (changed(missing=[[0, 9]]), "missing has the range"),
    (rows(4).astype(float), "dtype is 'float64'; experts are integers"),
    (rows(4)[0], "shape is"),
    (rows(4) + 4, "has the expert"),
    (np.zeros_like(rows(4)), "the expert 0 twice in layer 0 of position 0"),
    (RoutedExperts(rows_RLK=rows(4), num_experts=6, layers=(0, 1)), "of layers with 6 experts; this model's have 5"),
    (RoutedExperts(rows_RLK=rows(4), num_experts=EXPERTS, layers=(0, 2)), r"of the layers 0, 2; this model's are 0 to 1"),
    (rows(4)[:, :1], "of the layers 0; this model's are 0 to 1"),
    (rows(4)[..., :2], "has 2 experts a token; this model uses 3"),
    (RoutedExperts(rows_RLK=rows(4)[..., [0, 0, 1]], num_experts=EXPERTS, layers=(0, 1)), "twice"),
    (Replay(shape=(1, 1, 3), data=bytes([0, 1, 2])), "has 1 layers; this model has 2"),
    (Replay(shape=(1, 2, 1), data=bytes([0, 1])), "has 1 experts a token; this model uses 3"),
    (Replay(shape=(1, 2, 3), data=bytes([0, 1, 2, 0, 1, 5])), "has the expert 5; ids of this model go from 0 to 4"),
]


@pytest.mark.parametrize(("value", "words"), WRONG)
def test_what_cannot_be_replayed_here_is_refused(value: Any, words: str) -> None:
    with pytest.raises(ValueError, match=f"replay_routed_experts.*{words}"):
        replay_of(value, **SIZES)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"data": b"12345"}, "data has 5 bytes; shape"),
        ({"start": -1}, "start is -1"),
        ({"start": True}, "start is True"),
        ({"shape": (-2, 1, 3)}, "shape is -2"),
        ({"missing": ((1, 1),)}, "missing has"),
        ({"missing": ((1, 3),)}, "missing has"),
        ({"missing": ((1, 2), (0, 1))}, "missing has"),
    ],
)
def test_plain_data_that_does_not_fit_is_refused(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Replay(**({"shape": (2, 1, 3), "data": b"123456"} | fields))


@given(replays())
def test_positions_have_the_rows_that_a_loop_gives_them(replay: Replay) -> None:
    expected = by_position(replay)
    for position in range(25):
        row = replay.row(position)
        assert (None if row is None else list(row)) == (flat(expected[position]) if position in expected else None)
    assert [position for first, last in replay.forced for position in range(first, last)] == sorted(expected)


@given(st.lists(replays(), min_size=1, max_size=3), st.integers(0, 20), st.integers(1, 20))
def test_a_lane_is_forced_to_the_last_replay_that_has_a_row(many: list[Replay], start: int, length: int) -> None:
    expected: dict[int, list[Any]] = {}
    for replay in many:
        expected |= by_position(replay)
    forced = ForcedRows(many)
    assert forced.end == max(expected, default=-1) + 1
    within = [position for position in range(start, start + length) if position in expected]
    found = forced.within(start, length)
    if not within:
        assert found is None
    else:
        assert found is not None
        assert (start + found[0]).tolist() == within
        assert found[1].tolist() == [expected[position] for position in within]


def test_rows_are_not_shown() -> None:
    """A message or a log line with a request in it stays short."""
    replay = Replay(shape=(9, LAYERS, TOP_K), data=rows(9).tobytes())
    assert len(repr(Request(rid="a", prompt_token_ids=(1,), sampling=SamplingParams(), replay=replay))) < 1200
