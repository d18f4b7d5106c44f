"""What clients may ask in SGLang's own words: `/generate`.

Most fields take one value for all prompts or a list with one for each.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, TypeVar, cast

import msgspec
from msgspec import Meta

from pointsman.server import bounds
from pointsman.server.errors import ApiError
from pointsman.server.formats import GrammarText
from pointsman.server.protocol import TOKEN_LISTS, prompts_of
from pointsman.server.routing import Record, Records, RoutingFields

T = TypeVar("T")

# Fields of SGLang that are not supported, with the values that change nothing.
NO_EFFECT: dict[str, tuple[Any, ...]] = {
    "audio_data": (None,),
    "background": (None, False),
    "custom_logit_processor": (None,),
    "extra_key": (None,),
    "image_data": (None,),
    "input_embeds": (None,),
    "log_metrics": (None, True),
    "lora_path": (None,),
    "modalities": (None,),
    "no_logs": (None, False),
    "return_hidden_states": (None, False),
    "session_params": (None,),
    "token_ids_logprob": (None,),
    "video_data": (None,),
}
_MANY = bounds.MAX_PROMPTS


class NativeSampling(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """`sampling_params`: what SamplingParams of the engine has, by SGLang's names.

    `spaces_between_special_tokens` is accepted for whoever has it: byte-level tokenizers put none there, whatever it says.
    """

    max_new_tokens: bounds.TokenCount | None = None
    min_new_tokens: bounds.TokenCount | None = None
    temperature: bounds.Temperature | None = None
    top_p: bounds.TopP | None = None
    top_k: bounds.TopK | None = None
    min_p: bounds.MinP | None = None
    repetition_penalty: bounds.RepetitionPenalty | None = None
    presence_penalty: bounds.Penalty | None = None
    frequency_penalty: bounds.Penalty | None = None
    logit_bias: bounds.LogitBias | None = None
    n: bounds.Choices | None = None
    sampling_seed: bounds.Seed | None = None
    stop: bounds.Stops | None = None
    stop_token_ids: bounds.StopTokens | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    no_stop_trim: bool | None = None
    spaces_between_special_tokens: bool | None = None
    json_schema: str | dict[str, Any] | None = None
    regex: GrammarText | None = None
    ebnf: GrammarText | None = None


class GenerateRequest(RoutingFields, kw_only=True, forbid_unknown_fields=True):
    """One prompt or a batch, as text or as token ids."""

    text: str | Annotated[list[str], Meta(min_length=1, max_length=_MANY)] | None = None
    input_ids: Annotated[list[Any], Meta(extra_json_schema=TOKEN_LISTS)] | None = None
    sampling_params: NativeSampling | Annotated[list[NativeSampling], Meta(max_length=_MANY)] | None = None
    rid: bounds.RequestName | Annotated[list[bounds.RequestName], Meta(max_length=_MANY)] | None = None
    return_logprob: bool | Annotated[list[bool], Meta(max_length=_MANY)] | None = None
    logprob_start_len: bounds.StartLength | Annotated[list[bounds.StartLength], Meta(max_length=_MANY)] | None = None
    top_logprobs_num: bounds.Top | Annotated[list[bounds.Top], Meta(max_length=_MANY)] | None = None
    return_text_in_logprobs: bool | None = None
    stream: bool | None = None
    priority: bounds.Priority | None = None
    cache_salt: bounds.Salt | None = None
    replay_routed_experts: Record | Records | None = None

    @property
    def single(self) -> bool:
        """Whether one prompt was given, and not a list of prompts."""
        return isinstance(self.text, str) or bool(self.input_ids and not isinstance(self.input_ids[0], list))

    def prompts(self) -> list[str | list[int]]:
        """Raises ApiError where there are none, or both texts and ids."""
        if (self.text is None) == (self.input_ids is None):
            raise ApiError(400, "give text or input_ids, and not both", param="text" if self.text is None else "input_ids")
        if self.text is not None:
            return prompts_of("text", self.text)
        assert self.input_ids is not None
        prompts = prompts_of("input_ids", self.input_ids)
        if any(isinstance(prompt, str) for prompt in prompts):
            raise ApiError(400, "input_ids must be token ids, or a list of token ids for each prompt", param="input_ids")
        return prompts

    def each(self, name: str, value: T | list[T] | None, count: int, default: T) -> Sequence[T]:
        """The value of a field for every prompt. Raises ApiError where a list has another length."""
        if not isinstance(value, list):
            return [default if value is None else value] * count
        if len(value) != count:
            raise ApiError(400, f"{name} has {len(value)} entries for {count} prompts", param=name)
        return cast("list[T]", value)
