"""Against the generator's published known answers (Random123, kat_vectors)."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pointsman.sampling.philox import philox, round_keys, uniform

WORD = 0xFFFFFFFF


@pytest.mark.parametrize(
    ("counter", "key", "answer"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((WORD, WORD, WORD, WORD), (WORD, WORD), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_known_answers(counter, key, answer) -> None:
    assert philox(round_keys(key[0] | key[1] << 32), counter) == answer


@given(st.integers(-(1 << 63), (1 << 64) - 1), st.integers(0, 1 << 40))
def test_uniform_is_53_bits_of_the_first_two_words(seed: int, position: int) -> None:
    number = uniform(round_keys(seed), position)
    high, low, _, _ = philox(round_keys(seed), (position % 2**32, position // 2**32, 0, 0))
    assert 0 <= number < 1
    assert number * 2**53 == (high >> 5) * 2**26 + (low >> 6)
    assert uniform(round_keys(seed % 2**64), position) == number


def test_seeds_and_positions_give_different_numbers() -> None:
    numbers = {uniform(round_keys(seed), position) for seed in range(-20, 20) for position in range(50)}
    assert len(numbers) == 40 * 50
