"""A decoder's weights, packed for the step on a CPU.

Layers arrive one at a time, in the form of their checkpoint, and are packed into stacks over all layers, so that beside the
packed weights only one layer needs to be in memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from pointsman.kernels.cpu_pack import Matrix, PackedLinear, form_of, gate_up_order, pack_linear, stack_like

Floats = NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """Sizes of a decoder, and what its layers compute.

    Attributes:
        rotary_dim: channels of a head that turn.
        qk_norm: whether q and k are normed over "all" heads at once, over "each", or not.
        biased: whether the projections to q, k and v add a bias.
        shared: matrix pairs of `width` that all tokens take beside their experts.
        dense_layers, dense: the layers without experts, and how many pairs of `width` they have in their place.
        score, renormalize, routing_scale: how the router's logits become weights, as in `moe.spec.RoutingSpec`.
    """

    vocab: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    rotary_dim: int
    experts: int
    top_k: int
    width: int
    epsilon: float
    qk_norm: Literal["all", "each"] | None = "all"
    score: Literal["sigmoid", "softmax"] = "sigmoid"
    renormalize: bool = True
    routing_scale: float = 1.0
    biased: bool = False
    shared: int = 0
    dense_layers: tuple[int, ...] = ()
    dense: int = 0

    @property
    def routed_layers(self) -> int:
        return self.layers - len(self.dense_layers)

    def matrices(self, layer: int) -> int:
        """Pairs of matrices of a layer, `width` wide each."""
        return self.dense if layer in self.dense_layers else self.experts + self.shared

    def choices(self, layer: int) -> int:
        """How many of them a row takes."""
        return self.dense if layer in self.dense_layers else self.top_k + self.shared

    @property
    def most_matrices(self) -> int:
        return max(self.matrices(layer) for layer in range(self.layers))

    @property
    def most_choices(self) -> int:
        return max(self.choices(layer) for layer in range(self.layers))

    def __post_init__(self) -> None:
        for name in ("vocab", "hidden", "layers", "heads", "kv_heads", "head_dim", "experts", "top_k", "width"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.heads % self.kv_heads:
            raise ValueError(f"kv_heads is {self.kv_heads}; it must divide the number of heads ({self.heads})")
        if self.rotary_dim % 2 or not 0 <= self.rotary_dim <= self.head_dim:
            raise ValueError(f"rotary_dim is {self.rotary_dim}; it must be even and at most head_dim ({self.head_dim})")
        if self.top_k > self.experts or self.experts > 1 << 16:
            raise ValueError(f"top_k is {self.top_k} of {self.experts} experts; it must be at most their number, and that 65536")


@dataclass(frozen=True, kw_only=True, eq=False)
class LayerWeights:
    """One layer as its checkpoint has it.

    Attributes:
        qkv: q, k and v joined along their rows.
        q_norm, k_norm: as wide as all heads, or as one where each is normed; None where none is.
        gate: the router's matrix [experts, hidden], None in a dense layer; bias: [experts], None where there is none.
        experts: for each, gate and up joined along their rows, and down; then the pairs that all tokens take (`pieces`).
    """

    input_norm: Floats
    qkv: Matrix
    q_norm: Floats | None
    k_norm: Floats | None
    o: Matrix
    post_norm: Floats
    gate: Floats | None
    bias: Floats | None
    experts: Sequence[tuple[Matrix, Matrix]]
    qkv_bias: Floats | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class CpuWeights:
    """Everything a step multiplies with. cos and sin are [positions, rotary_dim / 2]; norms are padded to 64 channels."""

    embed: NDArray[np.generic]
    input_norm: Floats
    qkv: PackedLinear
    q_norm: Floats
    k_norm: Floats
    o: PackedLinear
    post_norm: Floats
    qkv_bias: Floats
    gate: PackedLinear
    bias: Floats
    gate_up: PackedLinear
    down: PackedLinear
    final_norm: Floats
    head: PackedLinear
    cos: Floats
    sin: Floats


def padded(size: int, multiple: int = 64) -> int:
    return -(-size // multiple) * multiple


def pack_weights(
    shape: ModelShape,
    *,
    embed: NDArray[np.generic],
    layers: Iterable[LayerWeights],
    final_norm: Floats,
    head: Matrix,
    cos: Floats,
    sin: Floats,
) -> CpuWeights:
    """Pack a whole model.

    Raises:
        ValueError: sizes disagree with the shape, or layers differ in how they are stored.
    """
    _expect("embed", embed, (shape.vocab, shape.hidden))
    _expect("head", head.values, (shape.vocab, shape.hidden))
    _expect("cos", cos, (len(cos), shape.rotary_dim // 2))
    _expect("sin", sin, (len(cos), shape.rotary_dim // 2))
    if form_of(embed) == "e4m3":
        raise ValueError("the embedding is e4m3; it must be bfloat16 or float32")
    stacks: dict[str, PackedLinear] = {}
    norms = {"input_norm": np.zeros((shape.layers, padded(shape.hidden)), np.float32)}
    norms["post_norm"] = norms["input_norm"].copy()
    norms["q_norm"] = np.empty((shape.layers, shape.heads * shape.head_dim), np.float32)
    norms["k_norm"] = np.empty((shape.layers, shape.kv_heads * shape.head_dim), np.float32)
    norms["qkv_bias"] = np.zeros((shape.layers, padded((shape.heads + 2 * shape.kv_heads) * shape.head_dim)), np.float32)
    norms["bias"] = np.zeros((shape.routed_layers, shape.experts), np.float32)
    number, routed, first = -1, 0, 0
    for number, layer in enumerate(layers):
        if number == 0:
            stacks = _stacks(shape, layer)
        for name, rows in norms.items():
            at = routed if name == "bias" else number
            if (value := _row(shape, name, getattr(layer, name))) is not None:
                rows[at, : len(value)] = value
        _pack_layer(shape, stacks, (number, routed, first), layer)
        routed, first = routed + (number not in shape.dense_layers), first + shape.matrices(number)
    if number + 1 != shape.layers:
        raise ValueError(f"{number + 1} layers were given; the shape has {shape.layers}")
    # The router reads activations that carry the experts' lift.
    stacks["gate"].scales_PB /= stacks["gate_up"].lift
    final = np.zeros(padded(shape.hidden), np.float32)
    final[: shape.hidden] = final_norm
    tables = {"cos": np.ascontiguousarray(cos, np.float32), "sin": np.ascontiguousarray(sin, np.float32)}
    packed: dict[str, Any] = norms | stacks | tables
    return CpuWeights(embed=np.ascontiguousarray(embed), final_norm=final, head=pack_linear(head), **packed)


def _row(shape: ModelShape, name: str, value: Floats | None) -> Floats | None:
    """A layer's row of a stack, if it has any; norms of heads are spread over all of them."""
    heads = {"q_norm": shape.heads, "k_norm": shape.kv_heads}.get(name, 0)
    if heads and shape.qk_norm is None:
        assert value is None, f"{name} is given, and the shape has none"
        return np.ones(heads * shape.head_dim, np.float32)
    if name in ("bias", "qkv_bias") and value is None:
        return None
    assert value is not None, f"{name} is missing"
    channels = (shape.heads + 2 * shape.kv_heads) * shape.head_dim
    norm = shape.head_dim if shape.qk_norm == "each" else heads * shape.head_dim
    _expect(name, value, (norm if heads else {"bias": shape.experts, "qkv_bias": channels}.get(name, shape.hidden),))
    return np.tile(value, heads) if heads and shape.qk_norm == "each" else value


def pieces(gate_up: Matrix, down: Matrix, width: int) -> list[tuple[Matrix, Matrix]]:
    """A pair of matrices of any width cut into pairs of this width, whose outputs sum to its own; what the last lacks is zeros.

    Raises:
        ValueError: they would be cut within blocks of scales.
    """
    whole = gate_up.values.shape[0] // 2
    count = -(-whole // width)
    cut_within = any(width % size for size in (gate_up.block[0], down.block[1]))
    if count > 1 and gate_up.scales is not None and cut_within:
        raise ValueError(f"matrices of {whole} columns cannot be cut at multiples of {width} in blocks of {gate_up.block}")
    found = []
    for first in range(0, count * width, width):
        rows = np.concatenate([_slice(gate_up.values, at, min(width, whole - first), width, 0) for at in (first, whole + first)])
        columns = _slice(down.values, first, min(width, whole - first), width, 1)
        gate_scales = down_scales = None
        if gate_up.scales is not None and down.scales is not None:
            height, blocks = -(-whole // gate_up.block[0]), -(-width // gate_up.block[0])
            at, some = first // gate_up.block[0], min(-(-whole // gate_up.block[0]) - first // gate_up.block[0], blocks)
            gate_scales = np.concatenate([_slice(gate_up.scales, start, some, blocks, 0, 1) for start in (at, height + at)])
            at, blocks = first // down.block[1], -(-width // down.block[1])
            down_scales = _slice(down.scales, at, min(down.scales.shape[1] - at, blocks), blocks, 1, 1)
        found.append((Matrix(rows, gate_scales, gate_up.block, (width, width)), Matrix(columns, down_scales, down.block)))
    return found


def _slice(values: NDArray[Any], first: int, count: int, size: int, axis: int, fill: int = 0) -> NDArray[Any]:
    """So many rows (or columns) from the first on, filled up to a size."""
    taken = values.take(range(first, first + count), axis)
    missing = [(0, 0), (0, 0)]
    missing[axis] = (0, size - count)
    return np.pad(taken, missing, constant_values=fill)


def _stacks(shape: ModelShape, layer: LayerWeights) -> dict[str, PackedLinear]:
    gate_up, down = layer.experts[0]
    count = sum(shape.matrices(number) for number in range(shape.layers))
    return {
        "qkv": stack_like(layer.qkv, shape.layers, len(layer.qkv.values)),
        "o": stack_like(layer.o, shape.layers, shape.hidden),
        "gate": stack_like(Matrix(np.zeros((shape.experts, shape.hidden), np.float32)), shape.routed_layers, shape.experts),
        "gate_up": stack_like(gate_up, count, len(gate_up_order(shape.width))),
        "down": stack_like(down, count, shape.hidden),
    }


def _pack_layer(shape: ModelShape, stacks: dict[str, PackedLinear], numbers: tuple[int, int, int], layer: LayerWeights) -> None:
    """Pack a layer, given its number, that among the layers that route, and that of its first pair of matrices."""
    (number, routed, first), channels = numbers, shape.heads * shape.head_dim
    _expect("qkv", layer.qkv.values, (channels + 2 * shape.kv_heads * shape.head_dim, shape.hidden))
    _expect("o", layer.o.values, (shape.hidden, channels))
    if len(layer.experts) != shape.matrices(number):
        raise ValueError(f"layer {number} has {len(layer.experts)} pairs of matrices; by the shape it has {shape.matrices(number)}")
    stacks["qkv"].fill(number, layer.qkv)
    stacks["o"].fill(number, layer.o)
    if number not in shape.dense_layers:
        assert layer.gate is not None, "gate is missing"
        _expect("gate", layer.gate, (shape.experts, shape.hidden))
        stacks["gate"].fill(routed, Matrix(np.asarray(layer.gate, np.float32)))
    order = gate_up_order(shape.width)
    for expert, (gate_up, down) in enumerate(layer.experts):
        _expect("gate_up", gate_up.values, (2 * shape.width, shape.hidden))
        _expect("down", down.values, (shape.hidden, shape.width))
        stacks["gate_up"].fill(first + expert, gate_up, order)
        stacks["down"].fill(first + expert, down)


def _expect(name: str, array: NDArray[np.generic], shape: tuple[int, ...]) -> None:
    if array.shape != shape:
        raise ValueError(f"{name} has the shape {array.shape}; it must be {shape}")
