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
SCALAR_SUFFIX = "_scale"  # of one for the matrix
INPUT_SCALE = "input_scale"  # of what it multiplies, in place of "weight"
# what transformers calls them
SPELLINGS = {"weight_scale_inv": "weight_scale", "activation_scale": INPUT_SCALE}
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


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


LAYER = "model.layers.{layer}."
ATTENTION = LAYER + "self_attn."
# what all models' checkpoints have by the same names
DECODER_ROWS = (
    Row("model.embed_tokens.weight", "embed", Kind.PLAIN, ("vocab", "hidden")),
    Row(LAYER + "input_layernorm.weight", "attention_norm", Kind.FLOAT32, ("hidden",)),
    Row(ATTENTION + "q_proj.weight", "qkv", Kind.MATRIX, ("q", "hidden"), 0),
    Row(ATTENTION + "k_proj.weight", "qkv", Kind.MATRIX, ("kv", "hidden"), 1),
    Row(ATTENTION + "v_proj.weight", "qkv", Kind.MATRIX, ("kv", "hidden"), 2),
    Row(ATTENTION + "o_proj.weight", "o", Kind.MATRIX, ("hidden", "q")),
    Row(LAYER + "post_attention_layernorm.weight", "expert_norm", Kind.FLOAT32, ("hidden",)),
    Row("model.norm.weight", "norm", Kind.FLOAT32, ("hidden",)),
    Row("lm_head.weight", "head", Kind.PLAIN, ("vocab", "hidden")),
)


def qk_norm_rows(q: str, k: str) -> tuple[Row, ...]:
    """The norms of q and k, of these dimensions."""
    return (
        Row(ATTENTION + "q_norm.weight", "q_norm", Kind.FLOAT32, (q,), where="qk_norm"),
        Row(ATTENTION + "k_norm.weight", "k_norm", Kind.FLOAT32, (k,), where="qk_norm"),
    )


def pair_rows(at: str, where: Part, width: str, prefix: str = "", names: tuple[str, str, str] = PROJECTIONS) -> tuple[Row, ...]:
    """Gate, up and down below a name; `width` is a dimension, and `prefix` tells our parameters from those of other pairs."""
    gate, up, down = names
    return (
        Row(f"{at}{gate}.weight", f"{prefix}gate_up", Kind.MATRIX, (width, "hidden"), 0, where),
        Row(f"{at}{up}.weight", f"{prefix}gate_up", Kind.MATRIX, (width, "hidden"), 1, where),
        Row(f"{at}{down}.weight", f"{prefix}down", Kind.MATRIX, ("hidden", width), 0, where),
    )


def up_before_gate(rows: tuple[Row, ...]) -> tuple[Row, ...]:
    """The same table with the experts' gate and up in the other order of their parts."""
    return tuple(row._replace(part=1 - row.part) if row.parameter == "gate_up" else row for row in rows)


class Place(NamedTuple):
    """Where a tensor belongs: part `part` of `parameter` of a layer, of an expert; its numbers, their scales, or its input's scale."""

    parameter: str
    layer: int | None = None
    expert: int | None = None
    part: int = 0
    scale: bool = False
    input: bool = False


class Model(NamedTuple):
    """What the registry knows of a model: how to read its config, and its table of names."""

    parse: Callable[[Mapping[str, Any]], Architecture]
    rows: tuple[Row, ...]


def name_of(rows: tuple[Row, ...], place: Place, *, scalar: bool = False) -> str:
    """The checkpoint's name of a place; `scalar`: of a checkpoint with one scale a matrix."""
    row = next(row for row in rows if (row.parameter, row.part) == (place.parameter, place.part))
    name = row.name.format(layer=place.layer, expert=place.expert)
    return input_scale_of(name) if place.input else name + scale_suffix(scalar) if place.scale else name


def scale_suffix(scalar: bool) -> str:
    """What follows a matrix's name in that of its scales, or of its one scale."""
    return SCALAR_SUFFIX if scalar else SCALE_SUFFIX


def input_scale_of(name: str) -> str:
    """The scale of what a matrix multiplies."""
    return f"{name.removesuffix('weight')}{INPUT_SCALE}"


def respelled(name: str, *, scalar: bool) -> str:
    """A tensor's name as the table has it: where matrices have one scale, that goes by two names."""
    module, _, last = name.rpartition(".")
    return f"{module}.{SPELLINGS[last]}" if scalar and last in SPELLINGS else name


def places(rows: tuple[Row, ...], architecture: Architecture) -> dict[str, tuple[Row, Place]]:
    """Every tensor a checkpoint of this architecture has: its name, with its row and place."""
    found: dict[str, tuple[Row, Place]] = {}
    for row in rows:
        quantized = row.kind is Kind.MATRIX and architecture.quantization_block is not None
        for layer, expert in _indices(row, architecture):
            name = row.name.format(layer=layer, expert=expert)
            found[name] = (row, Place(row.parameter, layer, expert, row.part))
            if quantized:
                suffix = scale_suffix(architecture.scalar_scales)
                found[name + suffix] = (row, Place(row.parameter, layer, expert, row.part, scale=True))
            if quantized and architecture.input_scales:
                found[input_scale_of(name)] = (row, Place(row.parameter, layer, expert, row.part, input=True))
    return found


def _indices(row: Row, architecture: Architecture) -> Iterator[tuple[int | None, int | None]]:
    for layer in architecture.layers_with(row.where) if row.per_layer else (None,):
        for expert in range(architecture.num_experts) if row.per_expert else (None,):
            yield layer, expert
