"""How weights are to be changed: what is said once, and crosses with the weights from whoever asks to every rank."""

from __future__ import annotations

from dataclasses import dataclass

MAX_VERSION_LENGTH = 256


@dataclass(frozen=True, kw_only=True, slots=True)
class Update:
    """How weights are changed, whichever way they come.

    Attributes:
        begin: a new update; what had come of another is dropped. False goes on with the one before.
        final: nothing else comes, and it is put in force.
        quantize: plain matrices of an FP8 model are made FP8; else they are refused.
        flush_cache: forget cached prefixes, which were computed under the weights before.
        abort_all_requests: end every request when the weights change; else they go on with the new ones from their next token.
        weight_version: what the new weights are called; None counts on.

    Raises:
        ValueError: weight_version is no string of 1 to MAX_VERSION_LENGTH characters.
    """

    begin: bool = True
    final: bool = True
    quantize: bool = False
    flush_cache: bool = True
    abort_all_requests: bool = False
    weight_version: str | None = None

    def __post_init__(self) -> None:
        version = self.weight_version
        if version is not None and not (isinstance(version, str) and 0 < len(version) <= MAX_VERSION_LENGTH):
            raise ValueError(f"weight_version is {version!r:.80}; it must be a string of 1 to {MAX_VERSION_LENGTH} characters")


WHOLE = Update()
"""An update in one part, with nothing said of it."""
