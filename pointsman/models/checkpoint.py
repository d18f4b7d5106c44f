"""A checkpoint's weight files: what they hold, and its tensors one by one.

File names in an index are names inside the folder and nothing else, and the headers of the weight files, not the index, say which
tensors there are.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open
from torch import Tensor

from pointsman.models.folder import inside, read_json

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
MOST_READERS = 8


class Header(NamedTuple):
    """What a weight file's header says of one tensor; `dtype` is safetensors' name (BF16, F32, F8_E4M3), `stored` the file's for it."""

    file: str
    shape: tuple[int, ...]
    dtype: str
    stored: str


@dataclass(frozen=True)
class Checkpoint:
    """A folder of safetensors: `headers` has every tensor by name, as `respell` has it; `problems` what index and files disagree about."""

    folder: Path
    headers: dict[str, Header]
    problems: tuple[str, ...]
    respell: Callable[[str], str] = str

    def tensors(self, names: Container[str]) -> Iterator[tuple[str, Tensor]]:
        """The tensors of these names, file by file in stored order, each to be copied before the next."""
        for file in sorted({header.file for header in self.headers.values()}):
            with safe_open(self.folder / file, framework="pt") as shard:
                for stored in shard.offset_keys():
                    if (name := self.respell(stored)) in names:
                        yield name, shard.get_tensor(stored)

    def slices(self, names: Container[str], take: Callable[[str, Any], None], *, whole: bool) -> None:
        """Have `take` read what it wants of the tensors of these names, several files at once.

        Args:
            whole: it is given tensors; else what reads as much of one as it is sliced for.
        """
        with ThreadPoolExecutor(MOST_READERS, thread_name_prefix="reader") as pool:
            reading = [
                pool.submit(self._slices, file, names, take, whole) for file in sorted({header.file for header in self.headers.values()})
            ]
        for file in reading:
            file.result()

    def _slices(self, file: str, names: Container[str], take: Callable[[str, Any], None], whole: bool) -> None:
        with safe_open(self.folder / file, framework="pt") as shard:
            for stored in shard.offset_keys():
                if (name := self.respell(stored)) in names:
                    take(name, shard.get_tensor(stored) if whole else shard.get_slice(stored))


def open_checkpoint(folder: Path, respell: Callable[[str], str] = str) -> Checkpoint:
    """Read the index and the headers of all weight files.

    Args:
        respell: gives a stored name as it is wanted.

    Raises:
        ValueError: there are none, a file is broken, or the index names something outside the folder.
    """
    index = _read_index(folder)
    files = sorted(set(index.values()))
    if not files:
        files = [SINGLE] if (folder / SINGLE).exists() else sorted(path.name for path in folder.glob("*.safetensors"))
    if not files:
        raise ValueError(f"{folder} has no weights in safetensors files; for random weights use --load-format dummy")
    headers: dict[str, Header] = {}
    problems = []
    for file in files:
        for stored, header in _read_headers(folder, file):
            name = respell(stored)
            if name in headers:
                other = headers[name]
                twice = f"both {other.file} and {file}" if stored == other.stored else f"{file} as {stored} and as {other.stored}"
                problems.append(f"{name} is in {twice}")
            if index and index.get(stored) != file:
                problems.append(f"{stored} is in {file}, but the index says {index.get(stored, 'nothing of it')}")
            headers[name] = header
    there = {header.stored for header in headers.values()}
    problems += [f"{name} should be in {file} by the index, but no file has it" for name, file in index.items() if name not in there]
    return Checkpoint(folder, headers, tuple(problems), respell)


def _read_index(folder: Path) -> dict[str, str]:
    if not (folder / INDEX).exists():
        return {}
    index = read_json(folder, INDEX).get("weight_map")
    if not isinstance(index, dict) or not index or not all(isinstance(file, str) for file in index.values()):
        raise ValueError(f"weight_map in {folder / INDEX} must be an object that names a file for each tensor")
    return index


def _read_headers(folder: Path, file: str) -> Iterator[tuple[str, Header]]:
    path = inside(folder, file)
    try:
        with safe_open(path, framework="pt") as shard:
            for name in shard.offset_keys():
                entry = shard.get_slice(name)
                yield name, Header(file, tuple(entry.get_shape()), entry.get_dtype(), name)
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror or error}") from error
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file: {error}") from error
