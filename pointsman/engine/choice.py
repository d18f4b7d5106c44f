"""What delivering one choice needs to remember: the characters and the stop strings that are half there."""

from __future__ import annotations

from pointsman.request import ChoiceDelta, FinishReason, Logprob, Request
from pointsman.scheduler import Advance
from pointsman.text import Detokenizer, StopStrings, Tokenizer


class Choice:
    """One sequence's text.

    Attributes:
        prompt_logprobs: of the prompt's tokens so far; None for the first.
        delivered: something of it has been handed out.
    """

    def __init__(self, request: Request, tokenizer: Tokenizer | None) -> None:
        sampling = request.sampling
        self._sampling, self._tokenizer = sampling, tokenizer
        self._detokenizer = self._stops = None
        if tokenizer is not None:
            self._detokenizer = Detokenizer(tokenizer, request.prompt_token_ids, sampling.skip_special_tokens)
            self._stops = StopStrings(sampling.stop, sampling.include_stop_str_in_output) if sampling.stop else None
        self.prompt_logprobs: list[dict[int, Logprob] | None] = [None]
        self.delivered = False

    def take(self, advance: Advance, delta: ChoiceDelta) -> str | None:
        """Put into the delta what the step brought. Returns the stop string that is complete by it."""
        if (token := advance.token) is not None:
            delta.token_ids = [token]
            if advance.logprobs is not None:
                delta.logprobs = [self.decoded(dict(advance.logprobs))]
        if not self.delivered:
            self.delivered = True
            if self._sampling.prompt_logprobs is not None:
                delta.prompt_logprobs = self.prompt_logprobs
        return None if self._detokenizer is None else self._spell(self._detokenizer, advance, delta)

    def _spell(self, detokenizer: Detokenizer, advance: Advance, delta: ChoiceDelta) -> str | None:
        """Turn the token into text."""
        ended, token = advance.sequence.finish_reason, advance.token
        text = ""
        if token is not None and not (ended is FinishReason.STOP and not self._sampling.include_stop_str_in_output):
            text = detokenizer.push(token)
        if ended is not None:
            text += detokenizer.flush()
        if self._stops is None or advance.sequence.num_output < self._sampling.min_tokens:
            delta.text = text
            return None
        delta.text, matched = self._stops.push(text)
        if matched is None and ended is not None:
            delta.text += self._stops.flush()
        return matched

    def decoded(self, entry: dict[int, Logprob]) -> dict[int, Logprob]:
        """With the text of each token."""
        if self._tokenizer is None:
            return entry
        return {token: Logprob(item.logprob, item.rank, self._tokenizer.token_text(token)) for token, item in entry.items()}
