"""Where the tokens of each sequence stand in a batch, told in the words in which trainers tell it.

A router sees the tokens of a batch flat, padding included. A layout says which of those positions belong to which sequence: a padded
batch by its attention mask or by its lengths, a packed one by the sums of its lengths or by its position ids. Each is checked
here, because a layout that is off by one replays every token under its neighbour's experts, and nothing would show it.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

import torch
from torch import Tensor

Numbers = Tensor | Sequence[Any] | Any
KINDS = ("attention_mask", "lengths", "cu_seqlens", "position_ids")


@dataclass(frozen=True)
class Layout:
    """Spans of a batch of `num_positions` flat positions: the first position of each sequence, and its length in tokens."""

    num_positions: int
    spans: tuple[tuple[int, int], ...]


class Batch(TypedDict, total=False):
    """The layout of a batch, told in one of four ways.

    Attributes:
        attention_mask: [sequences, width] of 1 for tokens and 0 for padding, on one side or both.
        lengths: [sequences] tokens of each, padded on `padding_side` ("right" unless told) to `width` (the longest unless told).
        cu_seqlens: [sequences + 1] sums of the lengths of a packed batch, from 0, as flash attention takes them.
        position_ids: [1, tokens] or [tokens] of a packed batch: 0, 1, ... in each sequence.
    """

    attention_mask: Numbers
    lengths: Numbers
    width: int
    padding_side: str
    cu_seqlens: Numbers
    position_ids: Numbers


def layout_of(batch: Batch) -> Layout:
    """The layout that was told.

    Raises:
        ValueError: it is not told in one way, or it is no layout.
        TypeError: a name is none of `Batch`.
    """
    if unknown := batch.keys() - Batch.__annotations__.keys():
        raise TypeError(f"{', '.join(sorted(unknown))} is no part of a layout; there are {', '.join(Batch.__annotations__)}")
    given = [name for name in KINDS if batch.get(name) is not None]
    if len(given) != 1:
        raise ValueError(f"{' and '.join(given) or 'nothing'} given; tell the batch's layout by one of {', '.join(KINDS)}")
    if given != ["lengths"] and (alone := batch.keys() & {"width", "padding_side"}):
        raise ValueError(f"{' and '.join(sorted(alone))} given with {given[0]}; it goes with lengths alone")
    if given == ["attention_mask"]:
        return _masked(_whole("attention_mask", batch["attention_mask"], 2))
    if given == ["lengths"]:
        return _padded(_whole("lengths", batch["lengths"], 1).tolist(), batch.get("width"), batch.get("padding_side", "right"))
    if given == ["cu_seqlens"]:
        return _packed(_whole("cu_seqlens", batch["cu_seqlens"], 1).tolist())
    return _counted(_whole("position_ids", batch["position_ids"], 1, squeeze=True))


def _masked(mask: Tensor) -> Layout:
    batch, width = mask.shape
    spans = []
    for index, row in enumerate(mask):
        tokens = row.nonzero().flatten()
        if not bool(((row == 0) | (row == 1)).all()) or len(tokens) == 0 or int(tokens[-1] - tokens[0]) + 1 != len(tokens):
            raise ValueError(f"attention_mask of sequence {index} is {row.tolist()!r:.80}; it must be ones in a row, zeros around them")
        spans.append((index * width + int(tokens[0]), len(tokens)))
    return Layout(batch * width, tuple(spans))


def _padded(lengths: list[int], width: int | None, padding_side: str) -> Layout:
    if padding_side not in ("left", "right"):
        raise ValueError(f"padding_side is {padding_side!r}; it must be 'left' or 'right'")
    if not lengths or min(lengths) < 1:
        raise ValueError(f"lengths are {lengths!r:.80}; there must be one at least, each 1 or more")
    room = max(lengths) if width is None else width
    if room < max(lengths):
        raise ValueError(f"width is {width}; a sequence has {max(lengths)} tokens")
    before = [room - length if padding_side == "left" else 0 for length in lengths]
    spans = tuple((index * room + skip, length) for index, (skip, length) in enumerate(zip(before, lengths, strict=True)))
    return Layout(len(lengths) * room, spans)


def _packed(sums: list[int]) -> Layout:
    if len(sums) < 2 or sums[0] != 0 or any(low >= high for low, high in itertools.pairwise(sums)):
        raise ValueError(f"cu_seqlens is {sums!r:.80}; it must ascend from 0")
    return Layout(sums[-1], tuple((low, high - low) for low, high in itertools.pairwise(sums)))


def _counted(positions: Tensor) -> Layout:
    firsts = (positions == 0).nonzero().flatten().tolist()
    if not firsts or firsts[0] != 0:
        raise ValueError(f"position_ids are {positions.tolist()!r:.80}; the first must be 0")
    layout = _packed([*firsts, len(positions)])
    counted = torch.cat([torch.arange(length, device=positions.device) for _, length in layout.spans])
    if not torch.equal(positions, counted):
        raise ValueError(f"position_ids are {positions.tolist()!r:.80}; those of a packed batch count 0, 1, ... in each sequence")
    return layout


def _whole(name: str, numbers: Numbers, dimensions: int, *, squeeze: bool = False) -> Tensor:
    tensor = torch.as_tensor(numbers)
    if squeeze and tensor.ndim == 2 and len(tensor) == 1:
        tensor = tensor[0]
    if tensor.ndim != dimensions or tensor.is_floating_point() or tensor.is_complex() or not tensor.numel():
        raise ValueError(f"{name} is {tensor.dtype} of shape {list(tensor.shape)}; it must be integers of {dimensions} dimensions")
    return tensor.long()
