"""Random prompts of exact lengths.

A text of random tokens rarely has as many tokens when it is read again. So prompts are drawn from tokens that stay themselves wherever
they stand: a space and letters. Their text is one pre-token, so a prompt of n of them is n tokens; it is counted again all the same,
with its beginning token or its chat template, and mended where it is not. Any other tokens can be sent as ids.

Lengths are counted by a tokenizer on this machine, or by the server's own `/tokenize`.
"""

from __future__ import annotations

import contextlib
import http.client
from collections.abc import Callable, Sequence
from random import Random
from typing import Protocol

import msgspec

from pointsman.bench import vocabulary
from pointsman.bench.serving.http import OK, Origin
from pointsman.text import Tokenizer

LOOKED_AT = 16384
FEWEST_WORDS = 64
ATTEMPTS = 32
SECONDS = 60.0


class Counter(Protocol):
    """What knows how many tokens a text has."""

    def count(self, text: str) -> int: ...
    def words(self, draws: Random) -> list[str]:
        """Texts that are one token each wherever they stand. Raises ValueError where there are too few."""
        ...

    def ids(self, text: str) -> list[int]: ...
    def wrap(self, text: str) -> str:
        """The prompt of a conversation with this one message. Raises ValueError where no template is known."""
        ...


class LocalCounter:
    """Counts with a tokenizer of this machine."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer

    def count(self, text: str) -> int:
        return len(self.tokenizer.encode(text))

    def ids(self, text: str) -> list[int]:
        return self.tokenizer.encode(text)

    def words(self, draws: Random) -> list[str]:
        size = self.tokenizer.vocab_size
        looked_at = draws.sample(range(size), min(size, LOOKED_AT))
        found = []
        for token in looked_at:
            text = self.tokenizer.token_text(token)
            plain = text[:1] == " " and text[1:].isalpha()
            if plain and self.tokenizer.encode(text, add_special_tokens=False) == [token]:
                found.append(text)
        return _enough(found)

    def wrap(self, text: str) -> str:
        template = self.tokenizer.chat_template
        if template is None:
            raise ValueError(f"the tokenizer in {self.tokenizer.folder} has no chat template; leave out --use-chat-template")
        return template.render([{"role": "user", "content": text}])


class ServerCounter:
    """Counts by asking a server: ours and vLLM's `/tokenize` take a prompt, llama.cpp's a content."""

    def __init__(self, origin: Origin, model: str | None, headers: dict[str, str]) -> None:
        self._origin = origin
        self._path = f"{origin.path}/tokenize"
        self._model = {} if model is None else {"model": model}
        self._headers = {"Content-Type": "application/json", **headers}
        self._field = next((name for name in ("prompt", "content") if self._ask(name, "A text of some words.")), None)
        if self._field is None:
            raise ValueError(f"{origin} does not count tokens at /tokenize; pass --tokenizer, the folder of the model's tokenizer")

    def count(self, text: str) -> int:
        return len(self.ids(text))

    def ids(self, text: str) -> list[int]:
        assert self._field is not None
        found = self._ask(self._field, text)
        if found is None:
            raise ValueError(f"/tokenize of the server has no answer for {text[:80]!r}")
        return found

    def words(self, draws: Random) -> list[str]:
        empty = self.count("")
        candidates = sorted({f" {word.lower()}" for word in (*vocabulary.GOODS, *vocabulary.COLOURS, *vocabulary.DAYS, *vocabulary.WOMEN)})
        found = [text for text in candidates if self.count(text) == empty + 1 and self.count(text + text) == empty + 2]
        draws.shuffle(found)
        return _enough(found)

    def wrap(self, text: str) -> str:
        raise ValueError("--use-chat-template needs the model's template, which the server does not give; pass --tokenizer, its folder")

    def _ask(self, field: str, text: str) -> list[int] | None:
        body = msgspec.json.encode(self._model | {field: text} if field == "prompt" else {field: text})
        make = http.client.HTTPSConnection if self._origin.secure else http.client.HTTPConnection
        with contextlib.closing(make(self._origin.host, self._origin.port, timeout=SECONDS)) as connection:
            connection.request("POST", self._path, body, self._headers)
            response = connection.getresponse()
            content = response.read()
        if response.status != OK:
            return None
        with contextlib.suppress(msgspec.MsgspecError, AttributeError):
            tokens = msgspec.json.decode(content).get("tokens")
            if isinstance(tokens, list) and (tokens or not text):
                return tokens
        return None


def _enough(words: list[str]) -> list[str]:
    if len(words) < FEWEST_WORDS:
        raise ValueError(
            f"only {len(words)} tokens of this tokenizer are a space and letters and stay one token, too few for random texts; "
            "send token ids with --tokenize-prompt"
        )
    return words


class Writer:
    """Writes prompts of exact lengths.

    Args:
        wrap: what a server makes of a text before it counts it, so that lengths include it; None for the text as it is.
        sent_wrapped: the prompt is sent as `wrap` makes it, and not as the text that the server will wrap.
    """

    def __init__(self, counter: Counter, draws: Random, *, wrap: Callable[[str], str] | None = None, sent_wrapped: bool = True) -> None:
        self._counter = counter
        self._wrap = wrap or (lambda text: text)
        self._sent_wrapped = sent_wrapped
        self.words = counter.words(draws)
        self.overhead = counter.count(self._wrap(""))

    def draw(self, count: int, draws: Random) -> list[str]:
        """Some random words."""
        return draws.choices(self.words, k=max(count, 0))

    def write(self, length: int, draws: Random, start: Sequence[str] = ()) -> str:
        """A prompt of exactly so many tokens; its text begins with these words.

        Raises:
            ValueError: it cannot be so short, or no text of that length is found.
        """
        least = self.overhead + len(start)
        if length <= least:
            what = "its template and beginning tokens" if not start else "its shared beginning"
            raise ValueError(f"a prompt cannot have {length} tokens: {what} alone are {least}")
        rest = self.draw(length - least, draws)
        for _ in range(ATTEMPTS):
            text = "".join([*start, *rest])
            wrapped = self._wrap(text)
            off = length - self._counter.count(wrapped)
            if off == 0:
                return wrapped if self._sent_wrapped else text
            if off < 0:
                del rest[off:]
            rest += self.draw(off if rest or off > 0 else 1, draws)
        raise ValueError(f"no text of exactly {length} tokens was found in {ATTEMPTS} attempts; send token ids with --tokenize-prompt")


def random_ids(tokenizer: Tokenizer, count: int, draws: Random) -> tuple[int, ...]:
    """Token ids of the whole vocabulary but its special ones."""
    found: list[int] = []
    while len(found) < count:
        found += [token for token in draws.choices(range(tokenizer.vocab_size), k=count - len(found)) if token not in tokenizer.special_ids]
    return tuple(found)
