"""Where routing comes from: files in every form that records have, answers that hold one, and the counters of a running server."""

from __future__ import annotations

import base64
import json
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pointsman.cli.routes.load import Load
from pointsman.cli.routes.options import Reading
from pointsman.routed_experts import MAX_BYTES, RoutedExperts, decode_record, from_numbers, read_npy

FIELD = "routed_experts"
MAGIC = b"\x93NUMPY"
MAX_ANSWER = 64 << 20
TIMEOUT = 10.0
MAX_DEPTH = 64


def records(path: str, options: Reading) -> list[RoutedExperts]:
    """Every record in a file.

    Raises:
        ValueError: there is none, or one cannot be read; the message names the file and what is wrong.
        OSError: the file cannot be read.
    """
    try:
        if path != "-" and Path(path).stat().st_size > 2 * MAX_BYTES:
            raise ValueError(f"it is larger than {2 * MAX_BYTES} bytes")
        data = sys.stdin.buffer.read(2 * MAX_BYTES + 1) if path == "-" else Path(path).read_bytes()
        if data.startswith(MAGIC):
            return [_sized(read_npy(data), options)]
        found = [_decode(entry, options) for value in _values(data) for entry in _entries(value, 0)]
        if not found:
            raise ValueError(f"there is no record in it: no object that is one, and none with {FIELD!r}")
        return found
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _sized(numbers_RLK: npt.NDArray[Any], options: Reading) -> RoutedExperts:
    """A record of bare numbers; unless it is told, a layer has as many experts as occur."""
    found = max(int(numbers_RLK.max(initial=0)) + 1, numbers_RLK.shape[2])
    return from_numbers(numbers_RLK, num_experts=options.num_experts or found)


def _values(data: bytes) -> list[Any]:
    """The JSON value of a file, or of each of its lines."""
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        raise ValueError("it is neither JSON nor a .npy file") from None
    try:
        return [json.loads(text)]
    except (ValueError, RecursionError) as error:
        lines = [line for line in text.splitlines() if line.strip()]
        if len(lines) < 2:
            raise ValueError(f"it is neither JSON nor a .npy file: {error}") from None
    try:
        return [json.loads(line) for line in lines]
    except (ValueError, RecursionError) as error:
        raise ValueError(f"it is neither JSON nor lines of JSON: {error}") from None


def _entries(value: Any, depth: int) -> Iterator[Any]:
    """Records in a JSON value: itself, or what stands anywhere in it under `routed_experts`."""
    if depth > MAX_DEPTH:
        raise ValueError(f"objects in it are nested deeper than {MAX_DEPTH}")
    if isinstance(value, dict):
        if "crc32" in value and "data" in value:
            yield value
            return
        for name, inner in value.items():
            if name == FIELD and isinstance(inner, str):
                yield inner
            else:
                yield from _entries(inner, depth + 1)
    elif isinstance(value, list):
        for inner in value:
            yield from _entries(inner, depth + 1)


def _decode(entry: Any, options: Reading) -> RoutedExperts:
    """A record, or one of the two bare forms in base64."""
    if not isinstance(entry, str):
        return decode_record(entry)
    try:
        data = base64.b64decode(entry, validate=True)
    except ValueError as error:
        raise ValueError(f"{FIELD} is not base64: {error}") from None
    if data.startswith(MAGIC):
        return _sized(read_npy(data), options)
    if options.num_layers is None or options.top_k is None:
        raise ValueError(f"{FIELD} is base64 of flat int32, which does not tell its shape: give --num-layers and --top-k")
    if len(data) % (row := 4 * options.num_layers * options.top_k):
        raise ValueError(f"{FIELD} has {len(data)} bytes; rows of {options.num_layers} layers by {options.top_k} experts have {row} each")
    return _sized(np.frombuffer(data, "<i4").reshape(-1, options.num_layers, options.top_k), options)


def server_load(url: str, api_key: str | None) -> Load:
    """What a running server has counted since it started.

    Raises:
        ValueError: the address is none, or what answers there is no Pointsman server; the message has its answer.
    """
    if not url.startswith(("http://", "https://")):
        raise ValueError(f"--url is {url!r}; it must begin with http:// or https://")
    address = url.rstrip("/") + "/routing_load"
    headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
    try:
        with urllib.request.urlopen(urllib.request.Request(address, headers=headers), timeout=TIMEOUT) as answer:
            value = json.loads(answer.read(MAX_ANSWER))
    except urllib.error.HTTPError as error:
        raise ValueError(f"{address} answers {error.code}: {error.read(300).decode('utf-8', 'replace')}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{address} cannot be read: {error}") from None
    return _counted(address, url, value)


def _counted(address: str, source: str, value: Any) -> Load:
    """The counts in a server's answer. Raises ValueError where it has none."""
    fields = value if isinstance(value, dict) else {}
    counts, layers, num_tokens = (fields.get(name) for name in ("counts", "layers", "num_tokens"))
    try:
        counts_LE = np.array(counts, np.int64)
    except (ValueError, TypeError, OverflowError):
        counts_LE = np.zeros(0, np.int64)
    if counts_LE.ndim != 2 or not counts_LE.size or counts_LE.min() < 0 or type(num_tokens) is not int or num_tokens < 0:
        raise ValueError(f"{address} answers {value!r:.200}; it must have counts, by layer and expert, layers and num_tokens")
    if not counts_LE.any():
        raise ValueError(f"{source} has counted nothing yet")
    if not isinstance(layers, list) or len(layers) != len(counts_LE) or not all(type(layer) is int for layer in layers):
        raise ValueError(f"{address} has the layers {layers!r:.80} and counts of {len(counts_LE)}; it must name each")
    return Load(counts_LE=counts_LE, layers=tuple(layers), num_tokens=num_tokens, source=source)
