"""One random number for each (seed, position), from Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011).

A counter-based generator has no state to carry: the number for the tenth token of a request depends on its seed and on ten, and on nothing
else, so a request draws the same tokens in any batch, on any lane, and after a preemption. It is the generator of CUDA's and Triton's
libraries, so that a kernel can draw the same numbers. Pure integers: there is no rounding before the last division.
"""

from __future__ import annotations

Words2 = tuple[int, int]
Words4 = tuple[int, int, int, int]

_MASK = 0xFFFFFFFF
_ROUNDS = 10


def round_keys(seed: int) -> tuple[Words2, ...]:
    """The keys of the rounds; of a seed, 64 bits count."""
    low, high = seed & _MASK, (seed >> 32) & _MASK
    return tuple(((low + 0x9E3779B9 * at) & _MASK, (high + 0xBB67AE85 * at) & _MASK) for at in range(_ROUNDS))


def philox(keys: tuple[Words2, ...], counter: Words4) -> Words4:
    """Four random words of 32 bits for a counter of as many."""
    a, b, c, d = counter
    for low, high in keys:
        first, second = 0xD2511F53 * a, 0xCD9E8D57 * c
        a, b, c, d = (second >> 32) ^ b ^ low, second & _MASK, (first >> 32) ^ d ^ high, first & _MASK
    return a, b, c, d


def uniform(keys: tuple[Words2, ...], position: int) -> float:
    """A number from 0 to below 1, of 53 bits, for one position in the output."""
    high, low, _, _ = philox(keys, (position & _MASK, position >> 32, 0, 0))
    return ((high >> 5) * 0x4000000 + (low >> 6)) * 2.0**-53
