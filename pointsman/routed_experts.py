"""The routing record: which experts every token of a prompt and its answer used, as data that describes itself.

Elsewhere such rows travel as bare numbers, and whoever reads them must know the shape, the type, where they begin and whether any
were lost. Here a record says so itself, and says what is not known instead of filling it with zeros: expert ids use every value
of their type, so no value is left to mean "missing". It is one class and three forms that cross a wire:

    record   a JSON object with the data in base64 and its CRC-32: nothing has to be known to read it, and damage is noticed
    npy      base64 of a `.npy` file: shape and type, nothing else; rows not known are -1, and the type is then int16
    int32    base64 of flat little-endian int32, as SGLang sends it: no shape at all; rows not known are -1

What is read is checked before it is believed: a ValueError names the field that is wrong. Only numpy is needed.

Shape suffixes: R rows, L layers that have experts, K experts a token.
"""

from __future__ import annotations

import base64
import binascii
import io
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

VERSION = 1
FORMATS = ("record", "npy", "int32")
MAX_ROWS = 1 << 22
MAX_LAYERS = 1 << 10
MAX_EXPERTS = 1 << 16
MAX_BYTES = 1 << 30
MAX_VERSION_LENGTH = 256

_FIELDS = ("version", "dtype", "shape", "start", "num_experts", "layers", "missing", "weight_versions", "crc32", "data")
_UNKNOWN = -1
_PIECE = 3 << 18

Rows = npt.NDArray[np.uint8] | npt.NDArray[np.uint16]


@dataclass(frozen=True, eq=False, kw_only=True)
class RoutedExperts:
    """Rows of logical expert ids, best first; row r is of the token at position start + r of prompt and output together.

    Attributes:
        rows_RLK: uint8 up to 256 experts, uint16 beyond. What stands in missing rows means nothing.
        num_experts: ids are below it.
        start: position of the first row.
        layers: which layers of the model the L are, ascending.
        missing: half-open ranges of rows that are not known, ascending and apart.
        weight_versions: (first row, row after the last, version of the weights that chose), ascending and apart; rows that no
            range has are of a version not told.

    Raises:
        ValueError: a field does not fit the others. The ids themselves are checked by `check_ids`.
    """

    rows_RLK: Rows
    num_experts: int
    start: int = 0
    layers: tuple[int, ...]
    missing: tuple[tuple[int, int], ...] = ()
    weight_versions: tuple[tuple[int, int, str], ...] = ()

    def __post_init__(self) -> None:
        num_experts = _whole("num_experts", self.num_experts, 1, MAX_EXPERTS)
        if self.rows_RLK.dtype != _dtype(num_experts):
            raise ValueError(f"dtype is {self.rows_RLK.dtype.name!r}; with {num_experts} experts it must be {_dtype(num_experts).name!r}")
        num_rows, num_layers, _ = _check_shape(self.rows_RLK.shape, num_experts)
        _whole("start", self.start, 0, MAX_ROWS)
        _check_layers(self.layers, num_layers)
        _check_ranges("missing", self.missing, num_rows)
        _check_ranges("weight_versions", [entry[:2] for entry in self.weight_versions], num_rows)

    @property
    def num_rows(self) -> int:
        return len(self.rows_RLK)

    @property
    def known_R(self) -> npt.NDArray[np.bool_]:
        """Which rows are known."""
        known = np.ones(self.num_rows, np.bool_)
        for first, last in self.missing:
            known[first:last] = False
        return known

    def check_ids(self) -> None:
        """Raises ValueError where a known row has an id that there is no expert for, or the same expert twice in a layer."""
        rows = self.rows_RLK if not self.missing else self.rows_RLK[self.known_R]
        if (highest := int(rows.max(initial=0))) >= self.num_experts:
            raise ValueError(f"data has the expert {highest}; ids go from 0 to {self.num_experts - 1}")
        ordered = np.sort(rows, axis=-1)
        twice = np.argwhere(ordered[..., 1:] == ordered[..., :-1])
        if len(twice):
            row, layer, place = (int(index) for index in twice[0])
            where = f"layer {self.layers[layer]} of position {self.start + int(np.flatnonzero(self.known_R)[row])}"
            raise ValueError(f"data has the expert {ordered[row, layer, place]} twice in {where}; each may occur once")


def encode(experts: RoutedExperts, form: str = "record") -> dict[str, Any] | str:
    """In one of FORMATS: an object for JSON, or base64."""
    if form == "record":
        return _record(experts)
    if form == "npy":
        file = io.BytesIO()
        np.save(file, experts.rows_RLK if not experts.missing else _signed(experts, np.dtype("<i2")), allow_pickle=False)
        return _base64(file.getbuffer())
    if form == "int32":
        return _base64(_bytes(_signed(experts, np.dtype("<i4"))))
    raise ValueError(f"format is {form!r}; it must be one of {', '.join(FORMATS)}")


def decode_record(record: Mapping[str, Any]) -> RoutedExperts:
    """The rows of a record. Raises ValueError that names the field at fault."""
    if not isinstance(record, Mapping):
        raise ValueError(f"the record is {record!r:.80}; it must be an object")
    for name in _FIELDS:
        if name not in record:
            raise ValueError(f"{name} is missing from the record")
    for name in record:
        if name not in _FIELDS:
            raise ValueError(f"{name!r:.80} is not a field of a record")
    if type(record["version"]) is not int or record["version"] != VERSION:
        raise ValueError(f"version is {record['version']!r:.80}; this reads version {VERSION}")
    num_experts = _whole("num_experts", record["num_experts"], 1, MAX_EXPERTS)
    dtype = _dtype(num_experts)
    if record["dtype"] != dtype.name:
        raise ValueError(f"dtype is {record['dtype']!r:.80}; with {num_experts} experts it must be {dtype.name!r}")
    shape = _check_shape(record["shape"], num_experts)
    data = _unbase64("data", record["data"], _size("data", shape, dtype))
    if len(data) != (expected := _size("data", shape, dtype)):
        raise ValueError(f"data has {len(data)} bytes; shape {list(shape)} of {dtype.name} has {expected}")
    if (crc := zlib.crc32(data)) != _whole("crc32", record["crc32"], 0, 2**32 - 1):
        raise ValueError(f"crc32 is {record['crc32']}, but that of the data is {crc}: the record was damaged on its way")
    experts = RoutedExperts(
        rows_RLK=np.frombuffer(data, dtype.newbyteorder("<")).astype(dtype, copy=False).reshape(shape),
        num_experts=num_experts,
        start=record["start"],
        layers=tuple(_list("layers", record["layers"])),
        missing=tuple(tuple(_list("missing", entry)) for entry in _list("missing", record["missing"])),  # type: ignore[misc]
        weight_versions=tuple(_version(entry) for entry in _list("weight_versions", record["weight_versions"])),
    )
    experts.check_ids()
    return experts


def decode_npy(text: str, *, num_experts: int, start: int = 0, layers: Sequence[int] | None = None) -> RoutedExperts:
    """The rows of the npy form; what it does not tell is given. Raises ValueError."""
    return from_numbers(read_npy(_unbase64("npy", text, 2 * MAX_BYTES)), num_experts=num_experts, start=start, layers=layers)


def read_npy(data: bytes) -> npt.NDArray[Any]:
    """The numbers of a `.npy` file of three dimensions, uint8, uint16, or int16 where rows are missing. Raises ValueError."""
    file = io.BytesIO(data)
    try:
        version = np.lib.format.read_magic(file)
        if version != (1, 0):
            raise ValueError(f"its format is {version}, not (1, 0)")
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
    except ValueError as error:
        raise ValueError(f"npy is not a .npy file: {error}") from None
    if dtype not in (np.dtype("u1"), np.dtype("<u2"), np.dtype("<i2")):
        raise ValueError(f"npy has the dtype {dtype.name!r}; it must be uint8 or uint16, or int16 where rows are missing")
    if fortran:
        raise ValueError("npy is in Fortran order; it must be in C order")
    checked, left = _check_shape(shape, MAX_EXPERTS), file.read()
    if len(left) != (expected := _size("npy", checked, dtype)):
        raise ValueError(f"npy has {len(left)} bytes of data; shape {list(checked)} of {dtype.name} has {expected}")
    return np.frombuffer(left, dtype).reshape(checked)


def decode_int32(
    text: str, *, num_layers: int, top_k: int, num_experts: int, start: int = 0, layers: Sequence[int] | None = None
) -> RoutedExperts:
    """The rows of the int32 form; what it does not tell is given. Raises ValueError."""
    data = _unbase64("int32", text, 4 * MAX_BYTES)
    row = _whole("num_layers", num_layers, 1, MAX_LAYERS) * _whole("top_k", top_k, 1, MAX_EXPERTS)
    if len(data) % (4 * row):
        raise ValueError(f"int32 has {len(data)} bytes; rows of {num_layers} layers by {top_k} experts have {4 * row} each")
    shape = _check_shape((len(data) // (4 * row), num_layers, top_k), num_experts)
    return from_numbers(np.frombuffer(data, "<i4").reshape(shape), num_experts=num_experts, start=start, layers=layers)


def from_numbers(numbers_RLK: npt.NDArray[Any], *, num_experts: int, start: int = 0, layers: Sequence[int] | None = None) -> RoutedExperts:
    """A checked record of integers in which rows of -1 are not known; `layers` are 0, 1, ... where it is not told. Raises ValueError."""
    if numbers_RLK.dtype.kind not in "iu":
        raise ValueError(f"dtype is {numbers_RLK.dtype.name!r}; experts are integers")
    _check_shape(numbers_RLK.shape, num_experts)
    unknown_R = (numbers_RLK == _UNKNOWN).all(axis=(1, 2)) if numbers_RLK.dtype.kind == "i" else np.zeros(len(numbers_RLK), np.bool_)
    known = numbers_RLK[~unknown_R]
    lowest, highest = int(known.min(initial=0)), int(known.max(initial=0))
    if lowest < 0 or highest >= num_experts:
        raise ValueError(f"data has the expert {lowest if lowest < 0 else highest}; ids go from 0 to {num_experts - 1}")
    edges = np.flatnonzero(np.diff(np.concatenate(([False], unknown_R, [False])).astype(np.int8))).tolist()
    missing = tuple(zip(edges[::2], edges[1::2], strict=True))
    rows_RLK = numbers_RLK.astype(_dtype(num_experts))
    fill_missing(rows_RLK, missing)
    ids = tuple(range(rows_RLK.shape[1])) if layers is None else tuple(layers)
    experts = RoutedExperts(rows_RLK=rows_RLK, num_experts=num_experts, start=start, layers=ids, missing=missing)
    experts.check_ids()
    return experts


def fill_missing(rows_RLK: npt.NDArray[Any], missing: Sequence[tuple[int, int]]) -> None:
    """Put 0, 1, ... into rows that are not known: ids that exist, each once, and the same bytes every time."""
    for first, last in missing:
        rows_RLK[first:last] = np.arange(rows_RLK.shape[2], dtype=rows_RLK.dtype)


def _record(experts: RoutedExperts) -> dict[str, Any]:
    data = _bytes(experts.rows_RLK)
    return {
        "version": VERSION,
        "dtype": experts.rows_RLK.dtype.name,
        "shape": list(experts.rows_RLK.shape),
        "start": experts.start,
        "num_experts": experts.num_experts,
        "layers": list(experts.layers),
        "missing": [list(entry) for entry in experts.missing],
        "weight_versions": [list(entry) for entry in experts.weight_versions],
        "crc32": zlib.crc32(data),
        "data": _base64(data),
    }


def _dtype(num_experts: int) -> np.dtype[Any]:
    return np.dtype(np.uint8 if num_experts <= 256 else np.uint16)


def _signed(experts: RoutedExperts, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    """The rows as numbers with a sign, -1 where they are not known."""
    if experts.missing and experts.num_experts > 1 << (8 * dtype.itemsize - 1):
        raise ValueError(f"format 'npy' has no room for rows that are missing with {experts.num_experts} experts; use 'record'")
    rows = experts.rows_RLK.astype(dtype)
    for first, last in experts.missing:
        rows[first:last] = _UNKNOWN
    return rows


def _bytes(array: npt.NDArray[Any]) -> memoryview:
    """The bytes of an array in C order, little endian."""
    little = array.astype(array.dtype.newbyteorder("<"), order="C", copy=False)
    return little.reshape(-1).view(np.uint8).data


def _base64(data: memoryview) -> str:
    """In pieces, because encoding holds the interpreter's lock and other threads have clients to serve."""
    return "".join(binascii.b2a_base64(data[at : at + _PIECE], newline=False).decode() for at in range(0, len(data), _PIECE))


def _unbase64(name: str, text: object, most: int) -> bytes:
    if not isinstance(text, str):
        raise ValueError(f"{name} is {text!r:.80}; it must be a string in base64")
    if len(text) > 4 * (most // 3 + 1):
        raise ValueError(f"{name} has {len(text)} characters of base64, more than the {most} bytes that it may hold need")
    try:
        data = base64.b64decode(text, validate=True)
    except ValueError as error:
        raise ValueError(f"{name} is not base64: {error}") from None
    if data and base64.b64encode(data[-(len(data) % 3 or 3) :]).decode() != text[-4:]:
        raise ValueError(f"{name} is not base64: bits after the end are set")
    return data


def _whole(name: str, value: object, low: int, high: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ValueError(f"{name} is {value!r:.80}; it must be a whole number from {low} to {high}")
    return value


def _list(name: str, value: object) -> Sequence[Any]:
    if not isinstance(value, (list, tuple)):
        raise ValueError(f"{name} has {value!r:.80} where a list must be")
    return value


def _size(name: str, shape: tuple[int, int, int], dtype: np.dtype[Any]) -> int:
    size = shape[0] * shape[1] * shape[2] * dtype.itemsize
    if size > MAX_BYTES:
        raise ValueError(f"{name} would be {size} bytes; at most {MAX_BYTES} are read")
    return size


def _check_shape(shape: object, num_experts: int) -> tuple[int, int, int]:
    sizes = _list("shape", shape)
    if len(sizes) != 3:
        raise ValueError(f"shape is {list(sizes)!r:.80}; it must be [rows, layers, top_k]")
    num_experts = _whole("num_experts", num_experts, 1, MAX_EXPERTS)
    rows, layers, top_k = sizes
    return _whole("shape[0]", rows, 0, MAX_ROWS), _whole("shape[1]", layers, 1, MAX_LAYERS), _whole("shape[2]", top_k, 1, num_experts)


def _check_layers(layers: Sequence[object], num_layers: int) -> None:
    if len(layers) != num_layers:
        raise ValueError(f"layers names {len(layers)}; shape[1] is {num_layers}")
    before = -1
    for layer in layers:
        before = _whole("layers, which must ascend,", layer, before + 1, MAX_ROWS)


def _check_ranges(name: str, ranges: Sequence[Sequence[Any]], num_rows: int) -> None:
    before = 0
    for entry in ranges:
        if len(entry) != 2 or any(isinstance(end, bool) or not isinstance(end, int) for end in entry):
            raise ValueError(f"{name} has {entry!r:.80}; ranges are [first row, row after the last]")
        if not before <= entry[0] < entry[1] <= num_rows:
            raise ValueError(f"{name} has the range {list(entry)!r:.80}; ranges must ascend, be apart and lie within {num_rows} rows")
        before = entry[1]


def _version(entry: object) -> tuple[int, int, str]:
    parts = _list("weight_versions", entry)
    if len(parts) != 3 or not isinstance(parts[2], str) or len(parts[2]) > MAX_VERSION_LENGTH:
        raise ValueError(f"weight_versions has {entry!r:.80}; entries are [first row, row after the last, version]")
    return parts[0], parts[1], parts[2]
