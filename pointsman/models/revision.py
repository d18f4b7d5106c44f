"""Tensors that take the place of some of a model's, or of all: collected and checked by their names, then applied as one.

The table of names says what each must look like, as it does for a checkpoint. Collecting touches nothing; applying makes new parameters
that share with the old ones what does not change. So a revision that is refused, at its first tensor or its last, has done nothing.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from pointsman.kernels.reference import quantize_weight
from pointsman.models import MODELS
from pointsman.models.loader import FILE_DTYPES, MOST_LISTED, broken_words, fits, form, is_broken, shape_words
from pointsman.models.names import Kind, Place, Row, places, respelled, scale_suffix
from pointsman.models.parameters import Parameters, Storage
from pointsman.models.sharding import Shard

_NAMES = {dtype: name for name, dtype in FILE_DTYPES.items()}


class Revision:
    """An update of a model's weights that is being collected.

    Args:
        rows: the model's table, as its parameters were loaded by it (`loader.rows_for`); None: as it is.
    """

    def __init__(self, shard: Shard, rows: tuple[Row, ...] | None = None) -> None:
        architecture = shard.architecture
        self._shard, self._architecture = shard, architecture
        self._rows = MODELS[architecture.name].rows if rows is None else rows
        self._expected = places(self._rows, architecture)
        self._tensors: dict[str, Tensor] = {}  # whole, whatever part of them is here

    def __len__(self) -> int:
        """How many tensors have come; a quantized matrix is two."""
        return len(self._tensors)

    def add(self, tensors: Mapping[str, Tensor], *, quantize: bool = False) -> None:
        """Take these in, all or none.

        Args:
            tensors: by the names that a checkpoint has for them.
            quantize: plain matrices of a model that is FP8 are quantized by `kernels.reference.quantize_weight`, in its blocks or as one.

        Raises:
            ValueError: some do not belong to the model, or are broken; the message names them.
        """
        taken: dict[str, Tensor] = {}
        problems: list[str] = []
        for given, tensor in tensors.items():
            name = self._named(given)
            if name not in self._expected:
                problems.append(f"{given:.200} does not belong to this model")
            elif name in self._tensors or name in taken:
                problems.append(f"{name} has come already in this update")
            elif wrong := self._wrong(name, tensor, quantize):
                problems.append(wrong)
            elif self._is_raw(name, tensor):
                taken |= self._quantized(name, tensor)
            else:
                taken[name] = tensor
        _raise(problems)
        self._tensors |= taken

    def check(self, name: str, shape: tuple[int, ...], dtype: str, *, quantize: bool = False) -> torch.dtype:
        """The type of a tensor that is announced by safetensors' name of its type. Raises ValueError where it would be refused."""
        if (known := self._expected.get(self._named(name))) is None:
            raise ValueError(f"{name:.200} does not belong to this model")
        row, place = known
        right, dtypes = form(row, place, self._architecture)
        if quantize and row.kind is Kind.MATRIX and _is_numbers(place):
            dtypes = (*dtypes, "BF16", "F32")
        if not fits(shape, right):
            raise ValueError(f"{name} is {list(shape)} where {shape_words(right)} belongs")
        if dtype not in dtypes:
            hint = "; quantize true makes FP8 of plain numbers" if dtypes == ("F8_E4M3",) and dtype in ("BF16", "F32") else ""
            raise ValueError(f"{name} is {dtype:.20} where {' or '.join(dict.fromkeys(dtypes))} belongs{hint}")
        return FILE_DTYPES[dtype]

    def _wrong(self, name: str, tensor: Tensor, quantize: bool) -> str | None:
        try:
            self.check(name, tuple(tensor.shape), _NAMES.get(tensor.dtype, str(tensor.dtype)), quantize=quantize)
        except ValueError as error:
            return str(error)
        place = self._expected[name][1]
        return broken_words(name, place) if is_broken(tensor, positive=place.input) else None

    def _named(self, name: str) -> str:
        return respelled(name, scalar=self._architecture.scalar_scales)

    def _quantized(self, name: str, tensor: Tensor) -> dict[str, Tensor]:
        """A plain matrix in FP8, and its scales or one scale."""
        block, scalar = self._architecture.quantization_block, self._architecture.scalar_scales
        weight = quantize_weight(tensor, (tensor.shape[0], tensor.shape[1]) if scalar else block or (1, 1))
        assert weight.scale is not None
        return {name: weight.data, name + scale_suffix(scalar): weight.scale.reshape(()) if scalar else weight.scale}

    def _is_raw(self, name: str, tensor: Tensor) -> bool:
        """Whether it is a matrix of plain numbers where the model has FP8."""
        row, place = self._expected[name]
        quantized = row.kind is Kind.MATRIX and self._architecture.quantization_block is not None
        return quantized and _is_numbers(place) and tensor.element_size() > 1

    def apply(self, parameters: Parameters | None, device: torch.device) -> Parameters:
        """The parameters with these tensors in their places; where there are none, these are all of them, on this device.

        Raises:
            ValueError: none has come, or numbers came without their scales or scales without their numbers, or not all of those that
                are needed.
        """
        if not self._tensors:
            raise ValueError("the update has no tensors")
        _raise([f"{name} came without {partner}" for name in self._tensors if (partner := self._partner(name)) not in self._tensors])
        storage = self._storage(device) if parameters is None else self._revised(parameters)
        for name, tensor in self._tensors.items():
            row, place = self._expected[name]
            if storage.holds(row, place):
                storage.view(place).copy_(storage.cut(row, place, tensor))
        return storage.parameters()

    def _storage(self, device: torch.device) -> Storage:
        _raise([f"{name} is missing, and the weights before are released" for name in self._expected.keys() - self._tensors.keys()])
        return Storage(self._rows, self._shard, self._dtypes({}), device)

    def _revised(self, parameters: Parameters) -> Storage:
        live = Storage.of(self._rows, self._shard, parameters)
        changed = {(place.parameter, place.layer) for _, place in map(self._expected.__getitem__, self._tensors)}
        return live.revised(changed, self._dtypes(live.plain_dtypes()))

    def _partner(self, name: str) -> str:
        """The tensor without which this one means nothing: scales and numbers; itself for one that is alone."""
        suffix = scale_suffix(self._architecture.scalar_scales)
        partner = name.removesuffix(suffix) if self._expected[name][1].scale else name + suffix
        return partner if partner in self._expected else name

    def _dtypes(self, live: Mapping[str, torch.dtype]) -> dict[str, torch.dtype]:
        """For each parameter that is kept as it comes the widest type among its tensors, as the loader has it; those that stay count."""
        found: dict[str, list[torch.dtype]] = {}
        for name, (row, _) in self._expected.items():
            tensor = self._tensors.get(name)
            dtype = tensor.dtype if tensor is not None else live.get(row.parameter)
            if dtype is not None:
                found.setdefault(row.parameter, []).append(dtype)
        return {parameter: max(dtypes, key=lambda dtype: dtype.itemsize) for parameter, dtypes in found.items()}


def _is_numbers(place: Place) -> bool:
    return not place.scale and not place.input


def _raise(problems: list[str]) -> None:
    if problems:
        more = f"; and {len(problems) - MOST_LISTED} more" if len(problems) > MOST_LISTED else ""
        raise ValueError(f"the tensors cannot be used: {'; '.join(sorted(problems)[:MOST_LISTED])}{more}")
