"""The flags of `routes` and `routes diff`."""

from __future__ import annotations

from dataclasses import dataclass

from pointsman.config import flag
from pointsman.routed_experts import MAX_EXPERTS, MAX_LAYERS


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What a file does not tell by itself."""

    num_experts: int | None = flag(None, "experts of a layer, for .npy and int32 (default: as many as occur)", low=1, high=MAX_EXPERTS)
    num_layers: int | None = flag(None, "layers of the record, for base64 of flat int32", low=1, high=MAX_LAYERS)
    top_k: int | None = flag(None, "experts a token, for base64 of flat int32", low=1, high=MAX_EXPERTS)


@dataclass(frozen=True, kw_only=True)
class RoutesOptions(Reading):
    """Load of the experts, from files or from a running server."""

    files: tuple[str, ...] = flag((), "records: JSON, JSON lines, an answer that has one, or .npy; - reads standard input")
    url: str | None = flag(None, "address of a running server, for its load since it started, as http://127.0.0.1:30000")
    api_key: str | None = flag(None, "key of that server")
    png: str | None = flag(None, "draw a heat map into this file")
    html: str | None = flag(None, "write a page to look at and to point at into this file")
    json: bool = flag(False, "print one JSON object, counts included, instead of the table")

    def __post_init__(self) -> None:
        if bool(self.files) == (self.url is not None):
            raise ValueError("give files with records, or --url of a server" + (", not both" if self.files else ""))
        if self.api_key is not None and self.url is None:
            raise ValueError("--api-key goes with --url")


@dataclass(frozen=True, kw_only=True)
class DiffOptions(Reading):
    """Two records of the same tokens."""

    files: tuple[str, ...] = flag((), "the two records, as for routes")
    json: bool = flag(False, "print one JSON object instead of the table")

    def __post_init__(self) -> None:
        if len(self.files) != 2:
            raise ValueError(f"give two files with a record each; {len(self.files)} are given")
