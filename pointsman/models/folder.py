"""Where a checkpoint's files are, and the JSON among them: the one door to the model hub.

Only weights in safetensors, JSON and chat templates are fetched, never code. No tensors: who asks what a model is need not wait for torch.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

TEXT_PATTERNS = ("*.json", "*.jinja")
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


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
