"""The continuation of prompts, as `/v1/completions` has it."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import Any

from pointsman.request import ChoiceDelta, Logprob, Request
from pointsman.server.answers import LOWEST_LOGPROB, Form, OpenAIAnswer, finish_of
from pointsman.text import Tokenizer


class CompletionAnswer(OpenAIAnswer):
    """The continuation of each prompt.

    Args:
        texts: what to put before each prompt's choices (the prompt itself, for echo), or None.
    """

    kind = "text_completion"
    piece_kind = "text_completion"

    def __init__(self, form: Form, requests: Sequence[Request], *, texts: Sequence[str] | None, tokenizer: Tokenizer | None) -> None:
        super().__init__(form, requests)
        sampling = requests[0].sampling
        self._echo = texts
        self._prompts = [request.prompt_token_ids for request in requests for _ in range(sampling.n)]
        self._choices_per_prompt = sampling.n
        self._logprobs = sampling.logprobs
        self._rulers = [_Ruler(tokenizer, sampling.skip_special_tokens) for _ in self._prompts] if tokenizer else []
        self._begun: set[int] = set()

    def _piece(self, index: int, delta: ChoiceDelta) -> tuple[dict[str, Any] | None, str | None]:
        text = delta.text
        tokens: list[int] = delta.token_ids
        entries: list[dict[int, Logprob] | None] = list(delta.logprobs or [])
        begins = index not in self._begun
        if begins and self._echo is not None:
            text = self._echo[index // self._choices_per_prompt] + text
            tokens = [*self._prompts[index], *tokens]
            entries = [*(delta.prompt_logprobs or []), *entries]
        self._begun.add(index)
        logprobs = self._rulers[index].shape(tokens, entries, self._logprobs) if self._logprobs is not None and tokens else None
        if not text and not logprobs and not self._form.token_ids and delta.finish_reason is None:
            return None, None
        piece: dict[str, Any] = {"text": text, "logprobs": logprobs}
        if begins and self._form.token_ids:
            piece["prompt_token_ids"] = self._prompts[index]
        return piece, finish_of(delta.finish_reason)

    def _join(self, index: int, pieces: Sequence[dict[str, Any]]) -> dict[str, Any]:
        logprobs: dict[str, list[Any]] | None = None
        if self._logprobs is not None:
            shaped = [piece["logprobs"] for piece in pieces if piece["logprobs"]]
            logprobs = {name: [entry for part in shaped for entry in part[name]] for name in _Ruler.NAMES}
        choice = {"text": "".join(piece["text"] for piece in pieces), "logprobs": logprobs}
        return choice | ({"prompt_token_ids": self._prompts[index]} if self._form.token_ids else {})


class _Ruler:
    """Lists tokens the way completions do, and where in the text each begins."""

    NAMES = ("text_offset", "token_logprobs", "tokens", "top_logprobs")

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_ids if skip_special_tokens else frozenset[int]()
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._offset = 0

    def shape(self, tokens: Sequence[int], entries: Sequence[dict[int, Logprob] | None], top: int) -> dict[str, list[Any]]:
        listed: dict[str, list[Any]] = {name: [] for name in self.NAMES}
        for token, entry in zip(tokens, entries, strict=True):
            listed["text_offset"].append(self._offset)
            if token not in self._skipped:
                self._offset += len(self._decoder.decode(self._tokenizer.token_bytes(token)))
            listed["tokens"].append(self._name(token))
            listed["token_logprobs"].append(None if entry is None else max(entry[token].logprob, LOWEST_LOGPROB))
            listed["top_logprobs"].append(None if entry is None else self._best(entry, top))
        return listed

    def _best(self, entry: dict[int, Logprob], top: int) -> dict[str, float]:
        best = sorted(entry.items(), key=lambda item: item[1].rank)[:top]
        return {self._name(token): max(item.logprob, LOWEST_LOGPROB) for token, item in best}

    def _name(self, token: int) -> str:
        """A token's text; bytes that are not text alone are spelt out, so that different tokens keep different names."""
        data = self._tokenizer.token_bytes(token)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
