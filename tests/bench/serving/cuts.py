"""Bytes cut into pieces at any places."""

from hypothesis import strategies as st


def pieces(data: bytes, places: list[int]) -> list[bytes]:
    ordered = sorted({place % (len(data) + 1) for place in places})
    return [data[start:end] for start, end in zip([0, *ordered], [*ordered, len(data)], strict=True)]


PLACES = st.lists(st.integers(0, 1 << 12), max_size=12)
