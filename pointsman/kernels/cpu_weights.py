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
        gate: the router's matrix [experts, hidden]; bias: [experts], None where there is none.
        experts: for each, gate and up joined along their rows, and down.
    """

    input_norm: Floats
    qkv: Matrix
    q_norm: Floats | None
    k_norm: Floats | None
    o: Matrix
    post_norm: Floats
    gate: Floats
    bias: Floats | None
    experts: Sequence[tuple[Matrix, Matrix]]


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
    norms["bias"] = np.empty((shape.layers, shape.experts), np.float32)
    number = -1
    for number, layer in enumerate(layers):
        if number == 0:
            stacks = _stacks(shape, layer)
        for name, rows in norms.items():
            value = _row(shape, name, getattr(layer, name), rows.shape[1])
            rows[number, : len(value)] = value
        _pack_layer(shape, stacks, number, layer)
    if number + 1 != shape.layers:
        raise ValueError(f"{number + 1} layers were given; the shape has {shape.layers}")
    # The router reads activations that carry the experts' lift.
    stacks["gate"].scales_PB /= stacks["gate_up"].lift
    final = np.zeros(padded(shape.hidden), np.float32)
    final[: shape.hidden] = final_norm
    tables = {"cos": np.ascontiguousarray(cos, np.float32), "sin": np.ascontiguousarray(sin, np.float32)}
    packed: dict[str, Any] = norms | stacks | tables
    return CpuWeights(embed=np.ascontiguousarray(embed), final_norm=final, head=pack_linear(head), **packed)


def _row(shape: ModelShape, name: str, value: Floats | None, width: int) -> Floats:
    """A layer's row of a stack; norms of heads are spread over all of them."""
    if name in ("q_norm", "k_norm") and shape.qk_norm != "all":
        if shape.qk_norm is None:
            assert value is None, f"{name} is given, and the shape has none"
            return np.ones(width, np.float32)
        assert value is not None, f"{name} is missing"
        _expect(name, value, (shape.head_dim,))
        return np.tile(value, width // shape.head_dim)
    if name == "bias" and value is None:
        return np.zeros(width, np.float32)
    assert value is not None, f"{name} is missing"
    _expect(name, value, (shape.hidden if name in ("input_norm", "post_norm") else width,))
    return value


def _stacks(shape: ModelShape, layer: LayerWeights) -> dict[str, PackedLinear]:
    gate_up, down = layer.experts[0]
    count = shape.layers * shape.experts
    return {
        "qkv": stack_like(layer.qkv, shape.layers, len(layer.qkv.values)),
        "o": stack_like(layer.o, shape.layers, shape.hidden),
        "gate": stack_like(Matrix(np.asarray(layer.gate, np.float32)), shape.layers, shape.experts),
        "gate_up": stack_like(gate_up, count, len(gate_up_order(shape.width))),
        "down": stack_like(down, count, shape.hidden),
    }


def _pack_layer(shape: ModelShape, stacks: dict[str, PackedLinear], number: int, layer: LayerWeights) -> None:
    channels = shape.heads * shape.head_dim
    _expect("qkv", layer.qkv.values, (channels + 2 * shape.kv_heads * shape.head_dim, shape.hidden))
    _expect("o", layer.o.values, (shape.hidden, channels))
    _expect("gate", layer.gate, (shape.experts, shape.hidden))
    if len(layer.experts) != shape.experts:
        raise ValueError(f"layer {number} has {len(layer.experts)} experts; the shape has {shape.experts}")
    stacks["qkv"].fill(number, layer.qkv)
    stacks["o"].fill(number, layer.o)
    stacks["gate"].fill(number, Matrix(np.asarray(layer.gate, np.float32)))
    order = gate_up_order(shape.width)
    for expert, (gate_up, down) in enumerate(layer.experts):
        _expect("gate_up", gate_up.values, (2 * shape.width, shape.hidden))
        _expect("down", down.values, (shape.hidden, shape.width))
        stacks["gate_up"].fill(number * shape.experts + expert, gate_up, order)
        stacks["down"].fill(number * shape.experts + expert, down)


def _expect(name: str, array: NDArray[np.generic], shape: tuple[int, ...]) -> None:
    if array.shape != shape:
        raise ValueError(f"{name} has the shape {array.shape}; it must be {shape}")
