"""A model's weights, stacked, in the form the checkpoint has them: FP8 bytes stay bytes beside their scales.

Of a model that is split over ranks they are one rank's part, cut out of each tensor as it comes (`sharding`). Whoever computes takes
from here: the torch layers through their implementations' `prepare`, a compiled step by packing what it finds. Norm weights, gate and
bias are float32 whatever their file has, because they are computed with in float32.

Shape suffixes: V vocabulary, D hidden, E experts, Q all query channels, W all key channels.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pointsman.kernels.apart import apart
from pointsman.kernels.weight import FP8, Weight, num_blocks, scale_shape
from pointsman.models.names import Kind, Place, Row
from pointsman.models.sharding import Shard
from pointsman.models.sizes import Size, add_size
from pointsman.moe.weights import ExpertWeights


class Mlp(NamedTuple):
    """Two matrices that every token takes: those of a dense layer, or of a shared expert. `gate_up` has parts (gate, up)."""

    gate_up: Weight
    down: Weight


@dataclass(frozen=True, eq=False)
class LayerParameters:
    """One layer; `qkv` has parts (q, k, v) and `experts.gate_up` parts (gate, up). What the layer has not is None."""

    attention_norm_D: Tensor
    qkv: Weight
    qkv_bias_N: Tensor | None
    q_norm_Q: Tensor | None
    k_norm_W: Tensor | None
    o: Weight
    expert_norm_D: Tensor
    gate_ED: Tensor | None
    bias_E: Tensor | None
    experts: ExpertWeights | None
    shared: Mlp | None
    dense: Mlp | None


@dataclass(frozen=True, eq=False)
class Parameters:
    """All weights of a model."""

    embed_VD: Tensor
    layers: tuple[LayerParameters, ...]
    norm_D: Tensor
    head: Weight


class Storage:
    """Empty tensors for all parameters of a shard, and the view of them that each place fills."""

    def __init__(self, rows: tuple[Row, ...], shard: Shard, plain_dtype: Mapping[str, torch.dtype], device: torch.device) -> None:
        self._shard, self._sizes = shard, shard.sizes
        architecture = shard.architecture
        self._plain_dtype = plain_dtype
        self._device = device
        self._tensors: dict[tuple[str, int | None], Tensor] = {}
        self._weights: dict[tuple[str, int | None], Weight] = {}
        self._parts: dict[str, tuple[int, ...]] = {}
        with apart(device):
            for parts in _by_parameter(rows):
                self._parts[parts[0].parameter] = tuple(self._sizes[row.shape[0]] for row in parts)
                for layer in architecture.layers_with(parts[0].where) if parts[0].per_layer else (None,):
                    if parts[0].kind is Kind.FLOAT32:
                        self._tensors[parts[0].parameter, layer] = self._float32(parts)
                    else:
                        self._weights[parts[0].parameter, layer] = self._weight(parts)

    def _float32(self, rows: list[Row]) -> Tensor:
        shape = (sum(self._parts[rows[0].parameter]), *(self._sizes[name] for name in rows[0].shape[1:]))
        return torch.empty(shape, dtype=torch.float32, device=self._device)

    def _weight(self, rows: list[Row]) -> Weight:
        block = self._shard.architecture.quantization_block
        stack = (len(self._shard.experts),) if rows[0].per_expert else ()
        parts, columns = self._parts[rows[0].parameter], self._sizes[rows[0].shape[1]]
        shape = (*stack, sum(parts), columns)
        if rows[0].kind is Kind.PLAIN or block is None:
            return Weight(torch.empty(shape, dtype=self._plain_dtype[rows[0].parameter], device=self._device), parts=parts)
        block = (self._shard.block([row.shape[0] for row in rows], block[0]), self._shard.block(rows[0].shape[1:], block[1]))
        scale = torch.empty((*stack, *scale_shape(parts, columns, block)), dtype=torch.float32, device=self._device)
        has_inputs = self._shard.architecture.input_scales
        inputs = torch.empty((*stack, len(parts)), dtype=torch.float32, device=self._device) if has_inputs else None
        return Weight(torch.empty(shape, dtype=FP8, device=self._device), scale, block, parts, inputs)

    @staticmethod
    def of(rows: tuple[Row, ...], shard: Shard, parameters: Parameters) -> Storage:
        """The storage that these parameters are in."""
        storage = Storage((), shard, {}, parameters.norm_D.device)
        storage._weights = {("embed", None): Weight(parameters.embed_VD), ("head", None): parameters.head}
        storage._tensors = {("norm", None): parameters.norm_D}
        for index, layer in enumerate(parameters.layers):
            for name, there in tensors_of(layer).items():
                storage._tensors[name, index] = there
            for name, weight in weights_of(layer).items():
                storage._weights[name, index] = weight
        storage._parts = {row[0].parameter: tuple(shard.sizes[part.shape[0]] for part in row) for row in _by_parameter(rows)}
        return storage

    def plain_dtypes(self) -> dict[str, torch.dtype]:
        """The types of the parameters that are kept as their file has them."""
        return {name: weight.data.dtype for (name, _), weight in self._weights.items() if not weight.quantized}

    def revised(self, changed: Collection[tuple[str, int | None]], dtypes: Mapping[str, torch.dtype]) -> Storage:
        """A storage that shares what does not change. What does is copied, and plain numbers have these types."""
        other = Storage((), self._shard, dtypes, self._device)
        other._parts = self._parts
        with apart(self._device):
            other._tensors = {key: tensor.clone() if key in changed else tensor for key, tensor in self._tensors.items()}
            for key, weight in self._weights.items():
                dtype = weight.data.dtype if weight.quantized else dtypes[key[0]]
                if key in changed or dtype != weight.data.dtype:
                    scale, inputs = (None if part is None else part.clone() for part in (weight.scale, weight.input_scale))
                    weight = Weight(weight.data.to(dtype, copy=True), scale, weight.block, weight.parts, inputs)
                other._weights[key] = weight
        return other

    def holds(self, row: Row, place: Place) -> bool:
        """Whether the shard has anything of a tensor of the checkpoint."""
        return (place.expert is None or place.expert in self._shard.experts) and all(self._sizes[name] for name in row.shape)

    def cut(self, row: Row, place: Place, tensor: Any) -> Any:
        """What the shard has of a tensor of the checkpoint, or of anything that is sliced like one."""
        if place.input or (place.scale and self._shard.architecture.scalar_scales):
            return tensor[...].reshape(())  # some write [1]
        if self._shard.whole:
            return tensor
        if not place.scale:
            return tensor[tuple(slice(there.start, there.stop) for there in map(self._shard.ranges.__getitem__, row.shape))]
        own, block = self._weights[place.parameter, place.layer].block, self._shard.architecture.quantization_block
        assert block is not None
        rows, columns = (self._shard.scales(name, step, part) for name, step, part in zip(row.shape, block, own, strict=True))
        near = tensor[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        return near[[at - rows[0] for at in rows]][:, [at - columns[0] for at in columns]]

    def view(self, place: Place) -> Tensor:
        """The memory that the shard's part of a tensor of the checkpoint fills, in that part's shape; one scale fills all blocks'."""
        heights = list(self._parts[place.parameter])
        if place.input:
            inputs = self._weights[place.parameter, place.layer].input_scale
            assert inputs is not None
            return inputs[..., place.part] if place.expert is None else inputs[place.expert - self._shard.experts.start, place.part]
        if (tensor := self._tensors.get((place.parameter, place.layer))) is None:
            weight = self._weights[place.parameter, place.layer]
            tensor = weight.data
            if place.scale:
                assert weight.scale is not None
                tensor, heights = weight.scale, [num_blocks(part, weight.block[0]) for part in heights]
        if place.expert is not None:
            tensor = tensor[place.expert - self._shard.experts.start]
        first = sum(heights[: place.part])
        return tensor[first : first + heights[place.part]]

    def parameters(self) -> Parameters:
        """The parameters, once their storage is filled."""
        layers = tuple(self._layer(index) for index in range(self._shard.architecture.num_layers))
        return Parameters(self._weights["embed", None].data, layers, self._tensors["norm", None], self._weights["head", None])

    def _layer(self, index: int) -> LayerParameters:
        tensors = {name: tensor for (name, layer), tensor in self._tensors.items() if layer == index}
        weights = {name: weight for (name, layer), weight in self._weights.items() if layer == index}
        return LayerParameters(
            attention_norm_D=tensors["attention_norm"],
            qkv=weights["qkv"],
            qkv_bias_N=tensors.get("qkv_bias"),
            q_norm_Q=tensors.get("q_norm"),
            k_norm_W=tensors.get("k_norm"),
            o=weights["o"],
            expert_norm_D=tensors["expert_norm"],
            gate_ED=tensors.get("gate"),
            bias_E=tensors.get("bias"),
            experts=ExpertWeights(weights["gate_up"], weights["down"]) if "gate_up" in weights else None,
            shared=Mlp(weights["shared_gate_up"], weights["shared_down"]) if "shared_gate_up" in weights else None,
            dense=Mlp(weights["dense_gate_up"], weights["dense_down"]) if "dense_gate_up" in weights else None,
        )


def tensors_of(layer: LayerParameters) -> dict[str, Tensor]:
    """The float32 tensors that a layer has, by their names in the table."""
    named = {"attention_norm": layer.attention_norm_D, "expert_norm": layer.expert_norm_D, "qkv_bias": layer.qkv_bias_N}
    named |= {"q_norm": layer.q_norm_Q, "k_norm": layer.k_norm_W, "gate": layer.gate_ED, "bias": layer.bias_E}
    return {name: tensor for name, tensor in named.items() if tensor is not None}


def weights_of(layer: LayerParameters) -> dict[str, Weight]:
    """The matrices that a layer has, by their names in the table."""
    named = {"qkv": layer.qkv, "o": layer.o}
    for prefix, pair in (("", layer.experts), ("shared_", layer.shared), ("dense_", layer.dense)):
        if pair is not None:
            named |= {f"{prefix}gate_up": pair.gate_up, f"{prefix}down": pair.down}
    return named


def held(parameters: Parameters) -> dict[str, Size]:
    """The sizes of weights that are there, by kind: what `sizes.described` tells of them before."""
    sizes: dict[str, Size] = {}
    weights: list[tuple[str, Weight]] = [("embed", Weight(parameters.embed_VD)), ("head", parameters.head)]
    tensors = [("norm", parameters.norm_D)]
    for layer in parameters.layers:
        weights += weights_of(layer).items()
        tensors += tensors_of(layer).items()
    for name, weight in weights:
        scales = sum(part.nbytes for part in (weight.scale, weight.input_scale) if part is not None)
        add_size(sizes, name, weight.data.nbytes + scales, weight.data.numel())
    for name, tensor in tensors:
        add_size(sizes, name, tensor.nbytes, tensor.numel())
    return sizes


def _by_parameter(rows: tuple[Row, ...]) -> list[list[Row]]:
    """The rows of each parameter, in the order of its parts."""
    found: dict[str, list[Row]] = {}
    for row in sorted(rows, key=lambda row: row.part):
        found.setdefault(row.parameter, []).append(row)
    return list(found.values())
