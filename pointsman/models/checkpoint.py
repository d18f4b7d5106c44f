"""A checkpoint's files: where they are, what they hold, and its tensors one by one.

This is the one door to the model hub, and to files that somebody else wrote. Only weights in safetensors, JSON and chat
templates are fetched, never code. File names in an index are names inside the folder and nothing else, and the headers of the
weight files, not the index, say which tensors there are.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Container, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open
from torch import Tensor

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
TEXT_PATTERNS = ("*.json", "*.jinja")
MOST_READERS = 8
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


class Header(NamedTuple):
    """What a weight file's header says of one tensor; `dtype` is safetensors' name (BF16, F32, F8_E4M3)."""

    file: str
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class Checkpoint:
    """A folder of safetensors: `headers` has every tensor by name; `problems` what the index and the files disagree about."""

    folder: Path
    headers: dict[str, Header]
    problems: tuple[str, ...]

    def tensors(self, names: Container[str]) -> Iterator[tuple[str, Tensor]]:
        """The tensors of these names, file by file in stored order, each to be copied before the next."""
        for file in sorted({header.file for header in self.headers.values()}):
            with safe_open(self.folder / file, framework="pt") as shard:
                for name in shard.offset_keys():
                    if name in names:
                        yield name, shard.get_tensor(name)

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
            for name in shard.offset_keys():
                if name in names:
                    take(name, shard.get_tensor(name) if whole else shard.get_slice(name))


def locate(model_path: str, *, revision: str | None = None, weights: bool = True) -> Path:
    """The folder of a checkpoint: the path itself, or the hub's snapshot of an id, fetched if need be.

    Raises:
        ValueError: it is neither a folder nor an id, or the hub does not answer or does not have it.
    """
    folder = Path(model_path).expanduser()
    if folder.is_dir():
        if revision is not None:
            raise ValueError(f"revision is {revision!r}, but {model_path!r} is a folder; revisions are for Hugging Face ids")
        return folder
    if folder.exists() or not HUB_ID.fullmatch(model_path):
        raise ValueError(f"model path {model_path!r} is neither a folder nor a Hugging Face id (organisation/name)")
    return _fetch(model_path, revision, [*TEXT_PATTERNS, "*.safetensors"] if weights else [*TEXT_PATTERNS])


def _fetch(model_path: str, revision: str | None, patterns: list[str]) -> Path:
    # imported here: it takes a quarter of a second, and only ids of the hub need it
    from huggingface_hub import snapshot_download  # noqa: PLC0415
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled  # noqa: PLC0415

    try:
        return Path(snapshot_download(model_path, revision=revision, allow_patterns=patterns))
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        raise ValueError(
            f"cannot reach the Hugging Face hub for {model_path!r}, and it is not in the local cache; "
            "put the checkpoint's files in a folder and pass its path"
        ) from error
    except (HfHubHTTPError, HFValidationError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"the Hugging Face hub has no {model_path!r} for us: {reason}") from error


def read_json(folder: Path, name: str) -> dict[str, Any]:
    """A JSON object of the folder.

    Raises:
        ValueError: the file is missing, unreadable, or holds something else.
    """
    try:
        value = json.loads(inside(folder, name).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"cannot read {folder / name}: {error.strerror or error}") from error
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{folder / name} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{folder / name} must hold an object; it holds a {type(value).__name__}")
    return value


def open_checkpoint(folder: Path) -> Checkpoint:
    """Read the index and the headers of all weight files.

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
        for name, header in _read_headers(folder, file):
            if name in headers:
                problems.append(f"{name} is in both {headers[name].file} and {file}")
            if index and index.get(name) != file:
                problems.append(f"{name} is in {file}, but the index says {index.get(name, 'nothing of it')}")
            headers[name] = header
    problems += [f"{name} should be in {file} by the index, but no file has it" for name, file in index.items() if name not in headers]
    return Checkpoint(folder, headers, tuple(problems))


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
                yield name, Header(file, tuple(entry.get_shape()), entry.get_dtype())
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror or error}") from error
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file: {error}") from error


def inside(folder: Path, file: str) -> Path:
    """The path of a file of the folder; a name or link that leads out of it is refused."""
    path = folder / file
    if file != Path(file).name or file in ("", ".", ".."):
        raise ValueError(f"{file!r:.200} is no plain file name; the files of a checkpoint lie in its folder {folder}")
    allowed = [folder.resolve()]
    if folder.absolute().parent.name == "snapshots":
        # the hub's cache keeps the files once, under blobs, and its snapshots are links to them
        allowed.append(folder.absolute().parent.parent.resolve() / "blobs")
    if path.resolve().parent not in allowed:
        raise ValueError(f"{path} leads out of the folder, to {path.resolve()}; put the file itself there")
    return path
