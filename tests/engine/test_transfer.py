"""Arrays sent in one copy are on the other side what they were."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from pointsman.engine.transfer import ALIGNMENT, Download, Upload, lay_out

KINDS = [np.int64, np.int32, np.uint8, np.float32, np.float64]
SHAPES = st.lists(st.tuples(st.sampled_from(KINDS), st.lists(st.integers(0, 5), min_size=1, max_size=2)), min_size=1, max_size=6)


def arrays_of(kinds: list, seed: int) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 200, shape).astype(kind) for kind, shape in kinds]


@given(SHAPES)
def test_arrays_arrive_as_they_were_sent(kinds: list) -> None:
    upload = Upload(torch.device("cpu"))
    sent = [arrays_of(kinds, seed) for seed in range(3)]
    arrived = [upload(arrays) for arrays in sent]
    for arrays, tensors in zip(sent, arrived, strict=True):
        for array, tensor in zip(arrays, tensors, strict=True):
            assert tensor.numpy().dtype == array.dtype and np.array_equal(tensor.numpy(), array)


@given(SHAPES)
def test_arrays_of_the_same_sizes_lie_where_they_lay(kinds: list) -> None:
    first, second = arrays_of(kinds, 0), arrays_of(kinds, 1)
    offsets, size = lay_out(first)
    assert (offsets, size) == lay_out(second) and all(offset % ALIGNMENT == 0 for offset in offsets)
    memory = torch.zeros(size + 8, dtype=torch.uint8)
    upload = Upload(torch.device("cpu"))
    before = upload(first, into=memory)
    after = upload(second, into=memory)
    for old, new, array in zip(before, after, second, strict=True):
        assert old.data_ptr() == new.data_ptr() and np.array_equal(old.numpy(), array)
    assert memory[size:].eq(0).all()


def test_a_download_is_a_copy() -> None:
    tensor = torch.arange(6).view(2, 3)
    download = Download(tensor)
    tensor.zero_()
    assert download.array().tolist() == [[0, 1, 2], [3, 4, 5]]
