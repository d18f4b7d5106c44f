"""How a request is sampled: its fields, and the checkpoint's advice where it says nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pointsman.grammar import Grammar
from pointsman.request import SamplingParams
from pointsman.server import constraints
from pointsman.server.errors import ApiError
from pointsman.server.native import NativeSampling
from pointsman.server.protocol import ChatRequest, CompletionRequest, Fields

COMPLETION_TOKENS = 16
NATIVE_TOKENS = 128

Advice = Mapping[str, int | float]

_SHARED = tuple(name for name in SamplingParams.__dataclass_fields__ if name in Fields.__struct_fields__ and name != "max_tokens")
_FORMS = ("json_schema", "regex", "ebnf")
_APART = (*_FORMS, "spaces_between_special_tokens")
_NATIVE = {
    "max_new_tokens": "max_tokens",
    "min_new_tokens": "min_tokens",
    "no_stop_trim": "include_stop_str_in_output",
    "sampling_seed": "seed",
}


def of_chat(request: ChatRequest, advice: Advice, grammar: Grammar | None) -> SamplingParams:
    """For a conversation: as long as the context has room. Raises ApiError for values that do not go together."""
    values = _values(request, advice) | {"grammar": grammar}
    values["max_tokens"] = request.max_completion_tokens if request.max_tokens is None else request.max_tokens
    values["logprobs"] = (request.top_logprobs or 0) if request.logprobs else None
    return _sampling(values, "")


def of_completion(request: CompletionRequest, advice: Advice, grammar: Grammar | None) -> SamplingParams:
    """For a text to continue: 16 tokens, as OpenAI has it. Raises ApiError for values that do not go together."""
    values = _values(request, advice) | {"grammar": grammar}
    default = max(COMPLETION_TOKENS, request.min_tokens or 0)
    values["max_tokens"] = default if request.max_tokens is None else request.max_tokens
    values["logprobs"] = request.logprobs
    values["prompt_logprobs"] = request.logprobs if request.echo else None
    return _sampling(values, "")


def of_native(request: NativeSampling, advice: Advice, logprobs: Mapping[str, int | None], place: str) -> SamplingParams:
    """For SGLang's form: 128 tokens. Raises ApiError for values that do not go together; `place` is where they stand in the body."""
    given = {name: getattr(request, name) for name in request.__struct_fields__ if name not in _APART}
    values: dict[str, Any] = dict(advice) | {_NATIVE.get(name, name): value for name, value in given.items() if value is not None}
    values.setdefault("max_tokens", max(NATIVE_TOKENS, values.get("min_tokens", 0)))
    values["logit_bias"] = _biases(request.logit_bias)
    values["grammar"] = constraints.of_answer(**{name: getattr(request, name) for name in _FORMS}, place=place)
    return _sampling(values | dict(logprobs), place)


def _values(request: Fields, advice: Advice) -> dict[str, Any]:
    given = {name: getattr(request, name) for name in _SHARED}
    values: dict[str, Any] = dict(advice) | {name: value for name, value in given.items() if value is not None}
    values["logit_bias"] = _biases(request.logit_bias)
    values["routed_experts_start"] = request.routing_start()
    return values


def _biases(given: Mapping[str, float] | None) -> dict[int, float]:
    return {int(token): bias for token, bias in (given or {}).items()}


def _sampling(values: Mapping[str, Any], place: str) -> SamplingParams:
    try:
        return SamplingParams(**values)
    except ValueError as error:
        name = str(error).split(" ", 1)[0].split("[", 1)[0]
        raise ApiError(400, f"{place}{error}", param=f"{place}{name}" if name in SamplingParams.__dataclass_fields__ else None) from None
