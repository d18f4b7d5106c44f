"""The schemas of all answers, for the OpenAPI document. Tests hold the answers to them."""

from __future__ import annotations

from typing import Any

Schema = dict[str, Any]

TEXT: Schema = {"type": "string"}
WHOLE: Schema = {"type": "integer"}
NUMBER: Schema = {"type": "number"}
TRUTH: Schema = {"type": "boolean"}
ANY_OBJECT: Schema = {"type": "object"}


def _object(properties: dict[str, Schema], optional: dict[str, Schema] | None = None) -> Schema:
    """An object with these properties, and none besides."""
    return {
        "type": "object",
        "properties": properties | (optional or {}),
        "required": list(properties),
        "additionalProperties": False,
    }


def _list(items: Schema) -> Schema:
    return {"type": "array", "items": items}


def _or_null(schema: Schema) -> Schema:
    return {"anyOf": [schema, {"type": "null"}]}


def _constant(value: Any) -> Schema:
    return {"const": value}


def _ref(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}


IDS = _list(WHOLE)
TAGS = _list({"enum": ["weights", "kv_cache"]})
_PAIR = {"type": "array", "items": WHOLE, "minItems": 2, "maxItems": 2}
_RECORD = _object(
    {
        "version": _constant(1),
        "dtype": {"enum": ["uint8", "uint16"]},
        "shape": {"type": "array", "items": WHOLE, "minItems": 3, "maxItems": 3},
        "start": WHOLE,
        "num_experts": WHOLE,
        "layers": IDS,
        "missing": _list(_PAIR),
        "weight_versions": _list({"type": "array", "prefixItems": [WHOLE, WHOLE, TEXT], "minItems": 3, "maxItems": 3}),
        "crc32": WHOLE,
        "data": TEXT,
    }
)
_ROUTING = {
    "routed_experts": {"anyOf": [_ref("RoutingRecord"), TEXT]},
    "routing_agreement": _or_null(NUMBER),
}
FINISH = _or_null({"enum": ["stop", "length", "tool_calls", "abort"]})
_METADATA = _object({"weight_version": TEXT})
_ENVELOPE = {"id": TEXT, "created": WHOLE, "model": TEXT}
_TOKEN = {"token": TEXT, "logprob": NUMBER, "bytes": _list(WHOLE)}
_CHAT_LOGPROBS = _or_null(_object({"content": _list(_object(_TOKEN | {"top_logprobs": _list(_object(_TOKEN))}))}))
_LOGPROBS = _or_null(
    _object(
        {
            "text_offset": _list(WHOLE),
            "token_logprobs": _list(_or_null(NUMBER)),
            "tokens": _list(TEXT),
            "top_logprobs": _list(_or_null({"type": "object", "additionalProperties": NUMBER})),
        }
    )
)
_CALL = _object({"id": TEXT, "type": _constant("function"), "index": WHOLE, "function": _object({"name": TEXT, "arguments": TEXT})})
_CALL_PIECE = {"anyOf": [_CALL, _object({"index": WHOLE, "function": _object({"arguments": TEXT})})]}
_WHOLE_CALL = _object({"id": TEXT, "type": _constant("function"), "function": _object({"name": TEXT, "arguments": TEXT})})
_MESSAGE = _object(
    {"role": _constant("assistant"), "content": _or_null(TEXT)},
    {"reasoning_content": _or_null(TEXT), "tool_calls": _list(_WHOLE_CALL)},
)
_DELTA = _object({}, {"role": _constant("assistant"), "content": TEXT, "reasoning_content": TEXT, "tool_calls": _list(_CALL_PIECE)})
_ENTRY = {"type": "array", "prefixItems": [_or_null(NUMBER), WHOLE, _or_null(TEXT)], "minItems": 3, "maxItems": 3}
_NATIVE_FINISH = _or_null(
    {
        "anyOf": [
            _object({"type": _constant("stop"), "matched": {"type": ["integer", "string", "null"]}}),
            _object({"type": _constant("length"), "length": WHOLE}),
            _object({"type": _constant("abort"), "message": TEXT}),
        ]
    }
)
_META = _object(
    {
        "id": TEXT,
        "finish_reason": _NATIVE_FINISH,
        "prompt_tokens": WHOLE,
        "completion_tokens": WHOLE,
        "cached_tokens": WHOLE,
        "e2e_latency": NUMBER,
        "weight_version": TEXT,
    },
    _ROUTING
    | {
        "input_token_logprobs": _list(_ENTRY),
        "output_token_logprobs": _list(_ENTRY),
        "input_top_logprobs": _list(_or_null(_list(_ENTRY))),
        "output_top_logprobs": _list(_or_null(_list(_ENTRY))),
    },
)

ANSWERS: dict[str, Schema] = {
    "RoutingRecord": _RECORD,
    "Error": _object({"error": _object({"message": TEXT, "type": TEXT, "param": _or_null(TEXT), "code": _or_null(TEXT)})}),
    "Usage": _object(
        {
            "prompt_tokens": WHOLE,
            "completion_tokens": WHOLE,
            "total_tokens": WHOLE,
            "prompt_tokens_details": _object({"cached_tokens": WHOLE}),
            "completion_tokens_details": _object({"reasoning_tokens": WHOLE}),
        }
    ),
    "ChatCompletion": _object(
        _ENVELOPE
        | {
            "object": _constant("chat.completion"),
            "choices": _list(
                _object(
                    {"index": WHOLE, "message": _MESSAGE, "logprobs": _CHAT_LOGPROBS, "finish_reason": FINISH},
                    _ROUTING | {"token_ids": IDS},
                )
            ),
            "usage": _ref("Usage"),
            "metadata": _METADATA,
        },
        {"prompt_token_ids": IDS},
    ),
    "ChatCompletionChunk": _object(
        _ENVELOPE
        | {
            "object": _constant("chat.completion.chunk"),
            "choices": _list(
                _object(
                    {"index": WHOLE, "delta": _DELTA, "logprobs": _CHAT_LOGPROBS, "finish_reason": FINISH}, _ROUTING | {"token_ids": IDS}
                )
            ),
        },
        {"prompt_token_ids": IDS, "usage": _or_null(_ref("Usage")), "metadata": _METADATA},
    ),
    "Completion": _object(
        _ENVELOPE
        | {
            "object": _constant("text_completion"),
            "choices": _list(
                _object(
                    {"index": WHOLE, "text": TEXT, "logprobs": _LOGPROBS, "finish_reason": FINISH},
                    _ROUTING | {"token_ids": IDS, "prompt_token_ids": IDS},
                )
            ),
        },
        {"usage": _or_null(_ref("Usage")), "metadata": _METADATA},
    ),
    "GeneratedItem": _object({"text": TEXT, "output_ids": IDS, "meta_info": _META}, {"index": WHOLE}),
    "Generated": {"anyOf": [_ref("GeneratedItem"), _list(_ref("GeneratedItem"))]},
    "Model": _object(
        {"id": TEXT, "object": _constant("model"), "created": WHOLE, "owned_by": TEXT, "max_model_len": WHOLE},
    ),
    "ModelList": _object({"object": _constant("list"), "data": _list(_ref("Model"))}),
    "Tokens": _object({"tokens": {"anyOf": [IDS, _list(IDS)]}, "count": {"anyOf": [WHOLE, IDS]}, "max_model_len": WHOLE}),
    "Texts": _object({"text": {"anyOf": [TEXT, _list(TEXT)]}}),
    "FunctionCalls": _object(
        {"normal_text": TEXT, "calls": _list(_object({"tool_index": WHOLE, "name": TEXT, "parameters": TEXT}))},
    ),
    "Reasoning": _object({"reasoning_text": TEXT, "text": TEXT}),
    "ServerInfo": _object(
        {
            "version": TEXT,
            "model": ANY_OBJECT,
            "engine": ANY_OBJECT,
            "running": WHOLE,
            "paused": TRUTH,
            "released": TAGS,
            "weight_version": TEXT,
        },
        {"replicas": _list(ANY_OBJECT)},
    ),
    "RoutingLoad": _object({"layers": IDS, "num_experts": WHOLE, "num_tokens": WHOLE, "counts": _list(IDS)}),
    "Flushed": _object({"flushed": TRUTH}),
    "Controlled": _object({"success": _constant(True), "paused": TRUTH, "released": TAGS, "weight_version": TEXT}),
    "WeightVersion": _object({"weight_version": TEXT}),
    "Aborted": _object({"aborted": WHOLE}),
    "Document": {"type": "object", "required": ["openapi", "paths"]},
}
