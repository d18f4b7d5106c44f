"""From what a client asks to what the engine runs: names, templates, tokens, and the room that the context has.

Everything about a request that can be wrong is found here or before, in `reading` and `protocol`, and is answered with a message that has
the numbers in it.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from pointsman.request import Replay, Request, SamplingParams
from pointsman.scheduler.sequence import check_replay, limit_of
from pointsman.server import constraints, sampling
from pointsman.server.answers import Form
from pointsman.server.bounds import MAX_ANSWERS
from pointsman.server.chat_answer import ChatAnswer, Reading
from pointsman.server.completion_answer import CompletionAnswer
from pointsman.server.errors import ApiError
from pointsman.server.messages import plain_messages
from pointsman.server.native import GenerateRequest, NativeSampling
from pointsman.server.native_answer import Listing, NativeAnswer
from pointsman.server.output import Reasoning
from pointsman.server.protocol import ChatRequest, CompletionRequest, Conversation, offered
from pointsman.server.routing import replays_of, routing_of
from pointsman.server.tags import THINK_OPEN, Tag
from pointsman.server.wire import ModelInfo
from pointsman.text import ChatPrompt, Tokenizer, TooManyTokens, chat_prompt

PARSERS: dict[str, tuple[Reasoning, str]] = {"MiniMaxM2ForCausalLM": ("minimax", "minimax-m2")}


@dataclass(frozen=True)
class ServedModel:
    """A model as this side knows it.

    Attributes:
        tokenizer: None where the checkpoint has none; then only token ids can be asked about, and log-probabilities have no text.
        reasoning: how thinking is told from the answer; None where it is not.
        reads_calls: tool calls are understood.
        loaded: when, in seconds since 1970.
    """

    info: ModelInfo
    tokenizer: Tokenizer | None
    reasoning: Reasoning | None
    reads_calls: bool
    loaded: int

    @classmethod
    def load(cls, info: ModelInfo, reasoning_parser: str | None, tool_call_parser: str | None) -> ServedModel:
        """Read what this side needs; None for a parser is what the checkpoint calls for. Raises ValueError where a file cannot be used."""
        tokenizer = None if info.folder is None else Tokenizer.load(info.folder)
        if tokenizer is not None:
            tokenizer.encode_plain("")  # makes its copy now, and not during a request
        reasoning, calls = PARSERS.get(info.architecture, (None, None))
        if reasoning_parser is not None:
            reasoning = None if reasoning_parser == "none" else reasoning_parser  # type: ignore[assignment]  # a choice of the flag
        reads_calls = (calls if tool_call_parser is None else tool_call_parser) == "minimax-m2"
        return cls(info, tokenizer, reasoning, reads_calls, int(time.time()))

    def chat(self, request: ChatRequest, name: str) -> ChatAnswer:
        """Set up the answer to a conversation. Raises ApiError."""
        request.check()
        self.check_name(request.model)
        tools = offered(request)
        if tools and not self.reads_calls:
            raise ApiError(400, f"{self.info.name} has no parser of tool calls; start the server with --tool-call-parser", param="tools")
        prompt = self.prompt_of(request)
        assert self.tokenizer is not None
        opened = _opens_thinking(self._last_turn(prompt), continued=bool(request.continue_final_message))
        grammar = constraints.of_chat(request, tools, str(Tag.THINK_CLOSE) if opened else None)
        params = sampling.of_chat(request, self.info.generation_defaults, grammar)
        [replay] = self._replays(request, 1)
        run = self._request(name, tuple(prompt.ids), params, request, "messages", given=params.max_tokens, replay=replay)
        reading = Reading(
            reasoning=None if request.separate_reasoning is False else self.reasoning,
            tools=tools,
            opened=opened,
            stream_reasoning=request.stream_reasoning is not False,
            parallel=request.parallel_tool_calls is not False,
        )
        return ChatAnswer(self._form(request, name, [run]), [run], reading, self.tokenizer)

    def complete(self, request: CompletionRequest, name: str) -> CompletionAnswer:
        """Set up the continuation of one or several prompts. Raises ApiError."""
        request.check()
        self.check_name(request.model)
        prompts = request.prompts()
        params = sampling.of_completion(request, self.info.generation_defaults, constraints.of_completion(request))
        _check_count([params] * len(prompts), "n")
        if self.tokenizer is None and (request.echo or params.logprobs is not None):
            raise ApiError(400, f"{self.info.name} has no tokenizer: echo and logprobs are not supported", param="logprobs")
        ids = self._encode(prompts, "prompt")
        runs = [
            self._request(f"{name}-{index}", tokens, params, request, "prompt", given=request.max_tokens, replay=replay)
            for index, (tokens, replay) in enumerate(zip(ids, self._replays(request, len(ids)), strict=True))
        ]
        texts = None
        if request.echo:
            texts = [prompt if isinstance(prompt, str) else self.decode(prompt, params.skip_special_tokens) for prompt in prompts]
        return CompletionAnswer(self._form(request, name, runs), runs, texts=texts, tokenizer=self.tokenizer)

    def generate(self, request: GenerateRequest, name: str) -> NativeAnswer:
        """Set up the answers to `/generate`. Raises ApiError."""
        prompts = request.prompts()
        count = len(prompts)
        asked = request.each("sampling_params", request.sampling_params, count, NativeSampling())
        wanted = request.each("return_logprob", request.return_logprob, count, False)
        starts = request.each("logprob_start_len", request.logprob_start_len, count, -1)
        tops = request.each("top_logprobs_num", request.top_logprobs_num, count, 0)
        replays = self._replays(request, count)
        field = "text" if request.input_ids is None else "input_ids"
        runs: list[Request] = []
        listings: list[Listing | None] = []
        for index, ids in enumerate(self._encode(prompts, field)):
            start = starts[index] if 0 <= starts[index] < len(ids) else None
            listing = Listing(start=start, top=tops[index], texts=bool(request.return_text_in_logprobs)) if wanted[index] else None
            logprobs = None if listing is None else listing.top
            place = f"sampling_params[{index}]." if isinstance(request.sampling_params, list) else "sampling_params."
            both = {"logprobs": logprobs, "prompt_logprobs": logprobs if start is not None else None}
            both |= {"return_routed_experts": bool(request.return_routed_experts), "routed_experts_start": request.routing_start()}
            params = sampling.of_native(asked[index], self.info.generation_defaults, both, place)
            given = asked[index].max_new_tokens
            runs.append(self._request(f"{name}-{index}", ids, params, request, field, given=given, replay=replays[index]))
            listings.append(listing)
        _check_count([run.sampling for run in runs], "sampling_params")
        names = self._names(request, name, count)
        return NativeAnswer(
            runs,
            names,
            listings,
            stream=bool(request.stream),
            single=request.single,
            tokenizer=self.tokenizer,
            routing=routing_of(request, self.info, runs, default="int32"),
        )

    def prompt_of(self, request: Conversation, *, most: int | None = None) -> ChatPrompt:
        """The prompt that a conversation makes. Raises ApiError, also where it is far longer than `most` tokens: else the context."""
        if self.tokenizer is None or self.tokenizer.chat_template is None:
            raise ApiError(400, f"{self.info.name} has no chat template; use /v1/completions", param="messages")
        try:
            return chat_prompt(
                self.tokenizer,
                plain_messages(request.messages),
                offered(request),
                continue_final_message=bool(request.continue_final_message),
                most=most or self.info.context_length,
                **(request.chat_template_kwargs or {}),
            )
        except ValueError as error:
            raise _not_encoded(error, "messages") from None

    def _last_turn(self, prompt: ChatPrompt) -> str:
        """The text behind the last control token, which no client can write: what turns before say of thinking means nothing."""
        assert self.tokenizer is not None
        start = len(prompt.ids)
        while start and prompt.ids[start - 1] not in self.tokenizer.special_ids:
            start -= 1
        return self.tokenizer.decode(prompt.ids[start:], skip_special_tokens=False)

    def encode(self, text: str, field: str, *, add_special_tokens: bool = True, most: int | None = None) -> tuple[int, ...]:
        """The tokens of a text, which the client gave in this field. Raises ApiError, also where they are far more than `most`: else the
        context."""
        if self.tokenizer is None:
            raise ApiError(400, f"{self.info.name} has no tokenizer; give the prompt as token ids", param=field)
        try:
            return tuple(self.tokenizer.encode(text, add_special_tokens=add_special_tokens, most=most or self.info.context_length))
        except ValueError as error:
            raise _not_encoded(error, field) from None

    def decode(self, ids: Sequence[int], skip_special_tokens: bool) -> str:
        """The text of tokens. Raises ApiError."""
        if self.tokenizer is None:
            raise ApiError(400, f"{self.info.name} has no tokenizer")
        return self.tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)

    def check_name(self, name: str | None) -> None:
        """Raises ApiError for a name that is not this model's; None is no name."""
        if name is not None and name != self.info.name:
            message = f"the model {name[:200]!r} does not exist; this server has {self.info.name!r}"
            raise ApiError(404, message, param="model", code="model_not_found")

    def check_ids(self, name: str, ids: Sequence[int]) -> None:
        """Raises ApiError for a token that the model does not have."""
        for token in (min(ids, default=0), max(ids, default=0)):
            if not 0 <= token < self.info.vocab_size:
                message = f"{name} has the token id {token}; ids of this model go from 0 to {self.info.vocab_size - 1}"
                raise ApiError(400, message, param=name)

    def _replays(self, request: ChatRequest | CompletionRequest | GenerateRequest, count: int) -> list[Replay | None]:
        info = self.info
        return replays_of(request.replay_routed_experts, count, layers=info.layers, num_experts=info.num_experts, top_k=info.top_k)

    def _encode(self, prompts: Sequence[str | list[int]], field: str) -> list[tuple[int, ...]]:
        return [self.encode(prompt, field) if isinstance(prompt, str) else tuple(prompt) for prompt in prompts]

    def _form(self, request: ChatRequest | CompletionRequest, name: str, runs: Sequence[Request]) -> Form:
        return Form(
            id=request.rid or name,
            name=request.rid or name,
            model=self.info.name,
            stream=bool(request.stream),
            include_usage=request.include_usage,
            token_ids=bool(request.return_token_ids),
            routing=routing_of(request, self.info, runs),
        )

    def _names(self, request: GenerateRequest, name: str, count: int) -> list[str]:
        """What `/abort_request` calls each prompt of a batch: one name for all has a number for each appended."""
        if isinstance(request.rid, list):
            if len(set(request.rid)) != count:
                raise ApiError(400, f"rid has {len(set(request.rid))} different names for {count} prompts", param="rid")
            return request.rid
        given = request.rid or name
        return [given] if request.single else [f"{given}_{index}" for index in range(count)]

    def _request(
        self,
        rid: str,
        ids: tuple[int, ...],
        params: SamplingParams,
        asked: ChatRequest | CompletionRequest | GenerateRequest,
        field: str,
        *,
        given: int | None,
        replay: Replay | None,
    ) -> Request:
        """One prompt for the engine. `given`: how long an answer the client asks for; a default gives way to the room that there is."""
        for name, tokens in ((field, ids), ("stop_token_ids", params.stop_token_ids), ("logit_bias", tuple(params.logit_bias))):
            self.check_ids(name, tokens)
        room = self.info.context_length - len(ids)
        wanted = max(given or 0, params.min_tokens)
        if room < wanted or (room == 0 and given != 0):
            asks = f" and asks for {wanted} more" if wanted else ""
            message = f"the prompt has {len(ids)} tokens{asks}; the context of this model has {self.info.context_length} for both"
            raise ApiError(400, message, param=field, code="context_length_exceeded")
        if params.max_tokens is not None and params.max_tokens > room:
            params = params.replace(max_tokens=room)
        try:
            run = Request(
                rid=rid,
                prompt_token_ids=ids,
                sampling=params,
                replay=replay,
                priority=asked.priority or 0,
                cache_salt=asked.cache_salt or "",
            )
            if replay is not None:
                check_replay(run, limit_of(run, self.info.context_length, self.info.cache_tokens))
            return run
        except ValueError as error:
            named = str(error).partition(" ")[0]  # these begin with the field, where it is one
            raise ApiError(400, str(error), param=named if named in asked.__struct_fields__ else field) from None


def _not_encoded(error: ValueError, field: str) -> ApiError:
    code = "context_length_exceeded" if isinstance(error, TooManyTokens) else None
    return ApiError(400, str(error), param=field, code=code)


def _check_count(each: Sequence[SamplingParams], field: str) -> None:
    total = sum(params.n for params in each)
    if total > MAX_ANSWERS:
        raise ApiError(400, f"{len(each)} prompts with n {each[0].n} are more than {MAX_ANSWERS} answers", param=field)


def _opens_thinking(turn: str, *, continued: bool) -> bool:
    """Whether the prompt's last turn ends inside `<think>`.

    A generation prompt does only if the tag is its last word. In a turn to be continued the tag may be far back, and the last of the
    two tags decides.
    """
    return turn.rfind(THINK_OPEN) > turn.rfind(Tag.THINK_CLOSE) if continued else turn.rstrip().endswith(THINK_OPEN)
