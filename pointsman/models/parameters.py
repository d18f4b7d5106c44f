"""A model's weights, stacked, in the form the checkpoint has them: FP8 bytes stay bytes beside their scales.

Whoever computes takes from here: the torch layers through their implementations' `prepare`, a compiled step by packing what it
finds. Norm weights, gate and bias are float32 whatever their file has, because they are computed with in float32.

Shape suffixes: V vocabulary, D hidden, E experts, Q all query channels, W all key channels.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from pointsman.kernels.weight import FP8, Weight, num_blocks, scale_shape
from pointsman.models.architecture import Architecture
from pointsman.models.names import Kind, Place, Row
from pointsman.moe.weights import ExpertWeights


@dataclass(frozen=True, eq=False)
class LayerParameters:
    """One layer; `qkv` has parts (q, k, v) and `experts.gate_up` parts (gate, up)."""

    attention_norm_D: Tensor
    qkv: Weight
    q_norm_Q: Tensor
    k_norm_W: Tensor
    o: Weight
    expert_norm_D: Tensor
    gate_ED: Tensor
    bias_E: Tensor
    experts: ExpertWeights


@dataclass(frozen=True, eq=False)
class Parameters:
    """All weights of a model."""

    embed_VD: Tensor
    layers: tuple[LayerParameters, ...]
    norm_D: Tensor
    head: Weight


class Storage:
    """Empty tensors for all parameters, and the view of them that each place fills."""

    def __init__(
        self, rows: tuple[Row, ...], architecture: Architecture, plain_dtype: Mapping[str, torch.dtype], device: torch.device
    ) -> None:
        self._architecture = architecture
        self._plain_dtype = plain_dtype
        self._device = device
        self._tensors: dict[tuple[str, int | None], Tensor] = {}
        self._weights: dict[tuple[str, int | None], Weight] = {}
        by_parameter: dict[str, list[Row]] = {}
        for row in sorted(rows, key=lambda row: row.part):
            by_parameter.setdefault(row.parameter, []).append(row)
        for parameter, parts in by_parameter.items():
            for layer in range(architecture.num_layers) if parts[0].per_layer else (None,):
                if parts[0].kind is Kind.FLOAT32:
                    shape = [architecture.sizes[name] for name in parts[0].shape]
                    self._tensors[parameter, layer] = torch.empty(shape, dtype=torch.float32, device=device)
                else:
                    self._weights[parameter, layer] = self._weight(parts)

    def _weight(self, rows: list[Row]) -> Weight:
        sizes, block = self._architecture.sizes, self._architecture.quantization_block
        stack = (sizes["experts"],) if rows[0].per_expert else ()
        parts, columns = tuple(sizes[row.shape[0]] for row in rows), sizes[rows[0].shape[1]]
        shape = (*stack, sum(parts), columns)
        if rows[0].kind is Kind.PLAIN or block is None:
            return Weight(torch.empty(shape, dtype=self._plain_dtype[rows[0].parameter], device=self._device), parts=parts)
        scale = torch.empty((*stack, *scale_shape(parts, columns, block)), dtype=torch.float32, device=self._device)
        return Weight(torch.empty(shape, dtype=FP8, device=self._device), scale, block, parts)

    @staticmethod
    def of(rows: tuple[Row, ...], architecture: Architecture, parameters: Parameters) -> Storage:
        """The storage that these parameters are in."""
        storage = Storage((), architecture, {}, parameters.norm_D.device)
        storage._weights = {("embed", None): Weight(parameters.embed_VD), ("head", None): parameters.head}
        storage._tensors = {("norm", None): parameters.norm_D}
        for index, layer in enumerate(parameters.layers):
            weights = {"qkv": layer.qkv, "o": layer.o, "gate_up": layer.experts.gate_up, "down": layer.experts.down}
            tensors = {"attention_norm": layer.attention_norm_D, "q_norm": layer.q_norm_Q, "k_norm": layer.k_norm_W}
            tensors |= {"expert_norm": layer.expert_norm_D, "gate": layer.gate_ED, "bias": layer.bias_E}
            storage._weights |= {(name, index): weight for name, weight in weights.items()}
            storage._tensors |= {(name, index): tensor for name, tensor in tensors.items()}
        assert {row.parameter for row in rows} == {name for name, _ in (*storage._weights, *storage._tensors)}
        return storage

    def plain_dtypes(self) -> dict[str, torch.dtype]:
        """The types of the parameters that are kept as their file has them."""
        return {name: weight.data.dtype for (name, _), weight in self._weights.items() if not weight.quantized}

    def revised(self, changed: Collection[tuple[str, int | None]], dtypes: Mapping[str, torch.dtype]) -> Storage:
        """A storage that shares what does not change. What does is copied, and plain numbers have these types."""
        other = Storage((), self._architecture, dtypes, self._device)
        other._tensors = {key: tensor.clone() if key in changed else tensor for key, tensor in self._tensors.items()}
        for key, weight in self._weights.items():
            dtype = weight.data.dtype if weight.quantized else dtypes[key[0]]
            if key in changed or dtype != weight.data.dtype:
                scale = None if weight.scale is None else weight.scale.clone()
                weight = Weight(weight.data.to(dtype, copy=True), scale, weight.block, weight.parts)
            other._weights[key] = weight
        return other

    def view(self, place: Place) -> Tensor:
        """The memory that a tensor of the checkpoint fills, in the tensor's shape."""
        if (place.parameter, place.layer) in self._tensors:
            return self._tensors[place.parameter, place.layer]
        weight = self._weights[place.parameter, place.layer]
        tensor, heights = weight.data, list(weight.parts)
        if place.scale:
            assert weight.scale is not None
            tensor, heights = weight.scale, [num_blocks(part, weight.block[0]) for part in weight.parts]
        if place.expert is not None:
            tensor = tensor[place.expert]
        first = sum(heights[: place.part])
        return tensor[first : first + heights[place.part]]

    def parameters(self) -> Parameters:
        """The parameters, once their storage is filled."""
        layers = tuple(self._layer(index) for index in range(self._architecture.num_layers))
        return Parameters(self._weights["embed", None].data, layers, self._tensors["norm", None], self._weights["head", None])

    def _layer(self, index: int) -> LayerParameters:
        tensors = {name: tensor for (name, layer), tensor in self._tensors.items() if layer == index}
        weights = {name: weight for (name, layer), weight in self._weights.items() if layer == index}
        return LayerParameters(
            attention_norm_D=tensors["attention_norm"],
            qkv=weights["qkv"],
            q_norm_Q=tensors["q_norm"],
            k_norm_W=tensors["k_norm"],
            o=weights["o"],
            expert_norm_D=tensors["expert_norm"],
            gate_ED=tensors["gate"],
            bias_E=tensors["bias"],
            experts=ExpertWeights(weights["gate_up"], weights["down"]),
        )
