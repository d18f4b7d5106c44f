"""How a checkpoint names its tensors and where each belongs in ours: one declared row for each kind of tensor.

The table is read in both directions. Loading asks for the place of a name; handing weights out asks for the name of a place.
A row's shape is written in the architecture's sizes, so that the same row also says what a tensor must look like.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from enum import Enum
from typing import Any, NamedTuple

from pointsman.models.architecture import Architecture, Part

SCALE_SUFFIX = "_scale_inv"


class Kind(Enum):
    """How a tensor is stored: always float32 (norms, router), as in the file, or FP8 with scales in a quantized checkpoint."""

    FLOAT32 = "float32"
    PLAIN = "plain"
    MATRIX = "matrix"


class Row(NamedTuple):
    """One kind of tensor: its name with {layer} and {expert} left open, our parameter, and which part of it along the rows.

    `where` is the part of a layer that it belongs to; layers without that part have no such tensor.
    """

    name: str
    parameter: str
    kind: Kind
    shape: tuple[str, ...]
    part: int = 0
    where: Part | None = None

    @property
    def per_layer(self) -> bool:
        return "{layer}" in self.name

    @property
    def per_expert(self) -> bool:
        return "{expert}" in self.name


class Place(NamedTuple):
    """Where a tensor belongs: part `part` of `parameter` of a layer, of an expert; its numbers or their scales."""

    parameter: str
    layer: int | None = None
    expert: int | None = None
    part: int = 0
    scale: bool = False


class Model(NamedTuple):
    """What the registry knows of a model: how to read its config, and its table of names."""

    parse: Callable[[Mapping[str, Any]], Architecture]
    rows: tuple[Row, ...]


def name_of(rows: tuple[Row, ...], place: Place) -> str:
    """The checkpoint's name of a place."""
    row = next(row for row in rows if (row.parameter, row.part) == (place.parameter, place.part))
    return row.name.format(layer=place.layer, expert=place.expert) + (SCALE_SUFFIX if place.scale else "")


def places(rows: tuple[Row, ...], architecture: Architecture) -> dict[str, tuple[Row, Place]]:
    """Every tensor a checkpoint of this architecture has: its name, with its row and place."""
    found: dict[str, tuple[Row, Place]] = {}
    for row in rows:
        quantized = row.kind is Kind.MATRIX and architecture.quantization_block is not None
        for layer, expert in _indices(row, architecture):
            name = row.name.format(layer=layer, expert=expert)
            found[name] = (row, Place(row.parameter, layer, expert, row.part))
            if quantized:
                found[name + SCALE_SUFFIX] = (row, Place(row.parameter, layer, expert, row.part, scale=True))
    return found


def _indices(row: Row, architecture: Architecture) -> Iterator[tuple[int | None, int | None]]:
    for layer in architecture.layers_with(row.where) if row.per_layer else (None,):
        for expert in range(architecture.num_experts) if row.per_expert else (None,):
            yield layer, expert
