"""From what a client asks to what the engine runs: names, templates, tokens, and the room that the context has.

Everything about a request that can be wrong is found here or in `protocol`, before the engine sees it, and is answered with a
message that has the numbers in it.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import msgspec

from pointsman.request import Request, SamplingParams
from pointsman.server.answers import ChatAnswer, CompletionAnswer
from pointsman.server.parsers import CLOSE, OPEN, ReasoningParser
from pointsman.server.protocol import MAX_ANSWERS, ApiError, ChatRequest, CompletionRequest, sampling_of
from pointsman.server.wire import ModelInfo
from pointsman.text import Tokenizer

THINKING_MODELS = ("MiniMaxM2ForCausalLM",)


@dataclass(frozen=True)
class ServedModel:
    """A model as this side knows it.

    Attributes:
        tokenizer: None where the checkpoint has none; then only token ids can be asked about, and log-probabilities have no text.
        splits_thinking: answers come as thinking and content.
        loaded: when, in seconds since 1970.
    """

    info: ModelInfo
    tokenizer: Tokenizer | None
    splits_thinking: bool
    loaded: int

    @classmethod
    def load(cls, info: ModelInfo, reasoning_parser: str | None) -> ServedModel:
        """Read what this side needs. Raises ValueError where a file is not what it should be."""
        tokenizer = None if info.folder is None else Tokenizer.load(info.folder)
        splits = info.architecture in THINKING_MODELS if reasoning_parser is None else reasoning_parser != "none"
        return cls(info, tokenizer, splits, int(time.time()))

    def chat(self, request: ChatRequest, rid: str) -> ChatAnswer:
        """Set up the answer to a conversation. Raises ApiError."""
        self.check_name(request.model)
        if self.tokenizer is None or self.tokenizer.chat_template is None:
            raise ApiError(400, f"{self.info.name} has no chat template; use /v1/completions", param="messages")
        prompt = self._render(request)
        sampling = sampling_of(request, self.info.generation_defaults)
        run = self._request(rid, self._encode(prompt, chat=True), sampling, request)
        parsers = None
        if self.splits_thinking and request.separate_reasoning is not False:
            opened = _opens_thinking(prompt, continued=bool(request.continue_final_message))
            parsers = [ReasoningParser(opened=opened) for _ in range(sampling.n)]
        return ChatAnswer(
            rid,
            self.info.name,
            [run],
            stream=bool(request.stream),
            include_usage=request.include_usage,
            parsers=parsers,
            tokenizer=self.tokenizer,
        )

    def complete(self, request: CompletionRequest, rid: str) -> CompletionAnswer:
        """Set up the continuation of one or several prompts. Raises ApiError."""
        self.check_name(request.model)
        prompts = request.prompts()
        sampling = sampling_of(request, self.info.generation_defaults)
        if len(prompts) * sampling.n > MAX_ANSWERS:
            raise ApiError(400, f"{len(prompts)} prompts with n {sampling.n} are more than {MAX_ANSWERS} answers", param="n")
        if self.tokenizer is None and (request.echo or sampling.logprobs is not None):
            raise ApiError(400, f"{self.info.name} has no tokenizer: echo and logprobs are not supported", param="logprobs")
        ids = [self._encode(prompt, chat=False) if isinstance(prompt, str) else tuple(prompt) for prompt in prompts]
        runs = [self._request(f"{rid}-{index}", tokens, sampling, request) for index, tokens in enumerate(ids)]
        texts = None
        if request.echo:
            texts = [prompt if isinstance(prompt, str) else self._decode(prompt, sampling) for prompt in prompts]
        return CompletionAnswer(
            rid,
            self.info.name,
            runs,
            stream=bool(request.stream),
            include_usage=request.include_usage,
            texts=texts,
            tokenizer=self.tokenizer,
        )

    def check_name(self, name: str | None) -> None:
        """Raises ApiError for a name that is not this model's; None is no name."""
        if name is not None and name != self.info.name:
            message = f"the model {name[:200]!r} does not exist; this server has {self.info.name!r}"
            raise ApiError(404, message, param="model", code="model_not_found")

    def _render(self, request: ChatRequest) -> str:
        assert self.tokenizer is not None and self.tokenizer.chat_template is not None
        messages: list[dict[str, Any]] = [msgspec.to_builtins(message) for message in request.messages]
        if messages[0]["role"] == "developer":
            messages[0]["role"] = "system"
        try:
            return self.tokenizer.chat_template.render(
                messages, continue_final_message=bool(request.continue_final_message), **(request.chat_template_kwargs or {})
            )
        except ValueError as error:
            raise ApiError(400, str(error), param="messages") from None

    def _encode(self, text: str, *, chat: bool) -> tuple[int, ...]:
        if self.tokenizer is None:
            raise ApiError(400, f"{self.info.name} has no tokenizer; give the prompt as token ids", param="prompt")
        try:
            return tuple(self.tokenizer.encode(text, add_special_tokens=not chat))
        except ValueError as error:
            raise ApiError(400, str(error), param="messages" if chat else "prompt") from None

    def _decode(self, ids: list[int], sampling: SamplingParams) -> str:
        assert self.tokenizer is not None
        return self.tokenizer.decode(ids, skip_special_tokens=sampling.skip_special_tokens)

    def _request(self, rid: str, ids: tuple[int, ...], sampling: SamplingParams, asked: ChatRequest | CompletionRequest) -> Request:
        field = "messages" if isinstance(asked, ChatRequest) else "prompt"
        for name, tokens in ((field, ids), ("stop_token_ids", sampling.stop_token_ids), ("logit_bias", tuple(sampling.logit_bias))):
            self._check_ids(name, tokens)
        given = asked.max_tokens if isinstance(asked, CompletionRequest) else sampling.max_tokens
        room = self.info.context_length - len(ids)
        wanted = max(given or 0, sampling.min_tokens)
        if room < wanted or (room == 0 and given != 0):
            asks = f" and asks for {wanted} more" if wanted else ""
            message = f"the prompt has {len(ids)} tokens{asks}; the context of this model has {self.info.context_length} for both"
            raise ApiError(400, message, param=field, code="context_length_exceeded")
        if sampling.max_tokens is not None and sampling.max_tokens > room:
            sampling = sampling.replace(max_tokens=room)
        try:
            return Request(
                rid=rid, prompt_token_ids=ids, sampling=sampling, priority=asked.priority or 0, cache_salt=asked.cache_salt or ""
            )
        except ValueError as error:
            raise ApiError(400, str(error), param=field) from None

    def _check_ids(self, name: str, ids: tuple[int, ...]) -> None:
        for token in (min(ids, default=0), max(ids, default=0)):
            if not 0 <= token < self.info.vocab_size:
                message = f"{name} has the token id {token}; ids of this model go from 0 to {self.info.vocab_size - 1}"
                raise ApiError(400, message, param=name)


def _opens_thinking(prompt: str, *, continued: bool) -> bool:
    """Whether a rendered prompt ends inside `<think>`.

    A generation prompt does only if the tag is its last word: the same tag in a user's text means nothing. In a turn to be
    continued the tag may be far back, and the last of the two tags decides.
    """
    return prompt.rfind(OPEN) > prompt.rfind(CLOSE) if continued else prompt.rstrip().endswith(OPEN)
