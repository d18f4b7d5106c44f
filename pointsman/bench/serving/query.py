"""What is asked of a server, and what came of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Query:
    """One request to be made. It has exactly one of text, ids and messages.

    Attributes:
        input_len: tokens of the prompt, as the client counts them; None where it cannot.
        output_len: most tokens of the answer.
        arrival_s: seconds after the start at which a trace has it.
        stop: texts that end the answer.
    """

    text: str | None = None
    ids: tuple[int, ...] | None = None
    messages: list[dict[str, Any]] | None = None
    input_len: int | None
    output_len: int
    arrival_s: float | None = None
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        assert sum(form is not None for form in (self.text, self.ids, self.messages)) == 1


@dataclass(kw_only=True)
class Outcome:
    """What came of a query. Moments are seconds after the start of the run.

    Attributes:
        piece_s: the moment of each piece of the answer, that is, of each event that brought tokens.
        end_s: when the answer was whole, or failed.
        prompt_tokens, output_tokens: as the server counts them; None where it does not say.
        counted: tokens in the pieces, a piece that does not say how many counting as one.
        routing: the routing record as the server sent it.
        error: why there is no answer.
    """

    query: Query
    sent_s: float = 0.0
    piece_s: list[float] = field(default_factory=list)
    end_s: float = 0.0
    texts: list[str] = field(default_factory=list)
    prompt_tokens: int | None = None
    output_tokens: int | None = None
    counted: int = 0
    finish_reason: str | None = None
    routing: Any = None
    error: str | None = None

    @property
    def input_len(self) -> int:
        """Tokens of the prompt: the client's count, or the server's where there is none."""
        return self.prompt_tokens or 0 if self.query.input_len is None else self.query.input_len

    @property
    def output_len(self) -> int:
        """Tokens of the answer: the server's count, or the client's where there is none."""
        return self.counted if self.output_tokens is None else self.output_tokens

    @property
    def text(self) -> str:
        return "".join(self.texts)
