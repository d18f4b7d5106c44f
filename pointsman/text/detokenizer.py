"""Token ids to text, one token at a time.

The tokens of a byte-level tokenizer are bytes, and text is their concatenation, so no window of tokens is decoded again and
again: each token's bytes are decoded behind what is left of those before, at most the three bytes of an unfinished
character. Bytes that no continuation can make valid become U+FFFD without waiting, as does a true U+FFFD of the model (only the two bytes
that would begin a surrogate wait for a third: Python's decoder tells them from a character no sooner). What is held back is never
more than that, so no run of odd tokens can hold up the stream or make it slow. Most tokens are whole characters behind whole
characters, and what such a one spells is looked up.
"""

from __future__ import annotations

from codecs import utf_8_decode
from collections.abc import Sequence

from pointsman.text.tokenizer import Tokenizer

MAX_UNFINISHED = 3


class Detokenizer:
    """The text of a growing list of tokens.

    All texts from `push` and `flush`, joined, are `tokenizer.decode(ids)`. Where the prompt ends inside a character, they begin with that
    character: the prompt's finished characters and they, joined, are `tokenizer.decode(prompt_ids + ids)`.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int] = (), skip_special_tokens: bool = True) -> None:
        self._token_bytes = tokenizer.token_bytes
        self._skipped = tokenizer.special_ids if skip_special_tokens else frozenset[int]()
        self._texts = tokenizer.whole_texts[skip_special_tokens]
        tail = b""
        for token in reversed(prompt_ids):
            if token not in self._skipped:
                tail = self._token_bytes(token) + tail
            if len(tail) >= MAX_UNFINISHED:
                break
        self._unfinished = tail[utf_8_decode(tail, "replace", False)[1] :]

    def push(self, token: int) -> str:
        """The characters that this token finishes."""
        if not self._unfinished:
            text = self._texts.get(token)
            if text is not None:
                return text
        return self._decode(token)

    def _decode(self, token: int) -> str:
        before = self._unfinished
        data = before if token in self._skipped else before + self._token_bytes(token)
        text, length = utf_8_decode(data, "replace", False)
        self._unfinished = data[length:]
        if not before and not self._unfinished:
            self._texts[token] = text
        return text

    def flush(self) -> str:
        """What is left at the end: U+FFFD for an unfinished character, else nothing."""
        text, _ = utf_8_decode(self._unfinished, "replace", True)
        self._unfinished = b""
        return text
