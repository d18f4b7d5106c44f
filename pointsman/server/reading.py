"""From a body to a request.

A body is read in two steps: JSON to plain values, then plain values to a class. Between the two, each name at the top is looked
up, so that a field that is misspelt, or that other servers have and this one does not, is refused by its name and never ignored. A
value that changes nothing, such as an empty list of tools, is no reason to refuse.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import msgspec
import msgspec.inspect

from pointsman.config import nearest
from pointsman.server.errors import ApiError

MAX_SHOWN = 80

# Fields of OpenAI and of other servers that are not supported, with the values that change nothing.
NO_EFFECT: dict[str, tuple[Any, ...]] = {
    "audio": (None,),
    "best_of": (None, 1),
    "custom_logit_processor": (None,),
    "custom_params": (None,),
    "documents": (None, []),
    "function_call": (None, "none", "auto"),
    "functions": (None, []),
    "guided_choice": (None,),
    "guided_grammar": (None,),
    "guided_json": (None,),
    "guided_regex": (None,),
    "lora_path": (None,),
    "metadata": (None, {}),
    "modalities": (None, ["text"]),
    "prediction": (None,),
    "prompt_cache_key": (None,),
    "reasoning_effort": (None,),
    "return_hidden_states": (None, False),
    "safety_identifier": (None,),
    "service_tier": (None, "auto", "default"),
    "spaces_between_special_tokens": (None, True, False),
    "store": (None, False),
    "structural_tag": (None,),
    "suffix": (None, ""),
    "use_beam_search": (None, False),
    "verbosity": (None, "medium"),
    "web_search_options": (None,),
}

# The words of msgspec, and ours.
_BOUNDS = ((">=", "at least"), ("<=", "at most"), ("<", "less than"), (">", "more than"))
_WORDS = (
    *((rf"Expected `\w+` {sign} (.+)", rf"it must be {words} \1") for sign, words in _BOUNDS),
    *((rf"Expected `\w+` of length {sign} (.+)", rf"its length must be {words} \1") for sign, words in _BOUNDS),
    (r"Expected `\w+` matching regex (.+)", r"it must match \1"),
    (r"Expected `(.+)`, got `(.+)`", r"it must be \1, not \2"),
    (r"Invalid (?:enum )?value .*", "it is none of the values that it may have"),
    (r"Object missing required field (.+)", r"its field \1 is missing"),
    (r"Object contains unknown field (.+)", r"it has no field \1"),
)

Body = TypeVar("Body", bound=msgspec.Struct)


def decode(data: bytes) -> dict[str, Any]:
    """The JSON object in a body. Raises ApiError where it is none."""
    try:
        plain = msgspec.json.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ApiError(400, f"the body is not valid JSON: {error}") from None
    except RecursionError:
        raise ApiError(400, "the body is not valid JSON: it is nested too deep") from None
    if not isinstance(plain, dict):
        raise ApiError(400, "the body must be a JSON object")
    return plain


def convert(plain: Mapping[str, Any], form: type[Body], no_effect: Mapping[str, tuple[Any, ...]] = NO_EFFECT) -> Body:
    """A request out of plain values. Raises ApiError, which names what is wrong."""
    known = form.__struct_fields__
    fields = {name: value for name, value in plain.items() if name in known or _refuse(name, value, known, no_effect)}
    try:
        return msgspec.convert(fields, form)
    except msgspec.ValidationError as error:
        path, message = explain(str(error), fields, form)
        raise ApiError(400, message, param=path) from None


def _refuse(name: str, value: Any, known: tuple[str, ...], no_effect: Mapping[str, tuple[Any, ...]]) -> bool:
    """Raises ApiError for a field that is not supported, unless its value changes nothing: then it is left out."""
    shown = name[:MAX_SHOWN]
    if name not in no_effect:
        raise ApiError(400, f"unknown field {shown!r}{nearest(shown, known)}", param=shown, code="unknown_parameter")
    if not any(type(value) is type(same) and value == same for same in no_effect[name]):
        raise ApiError(400, f"{name} is not supported here", param=name, code="unsupported_parameter")
    return False


def explain(message: str, fields: dict[str, Any], form: type[msgspec.Struct]) -> tuple[str | None, str]:
    """The place that a message of msgspec names, as a path, and the message in plain words, with the value that is there."""
    problem, _, place = message.partition(" - at ")
    found = re.search(r"`\$\.?([^`]*)`", place)
    path = found[1] if found else ""
    what = next((re.sub(pattern, words, problem) for pattern, words in _WORDS if re.fullmatch(pattern, problem)), problem)
    if problem.startswith("Invalid") and (values := _possible(msgspec.inspect.type_info(form), _steps(path))):
        what = f"it must be {' or '.join(values)}"
    if place.startswith("`key`"):
        return path, f"{path} has a key that cannot be: {what}"
    text = _shown(_value_at(fields, path)) if path else ""
    return path or None, f"{path} is {text}; {what}" if text else f"{path}: {what}".removeprefix(": ")


def _shown(value: Any) -> str:
    """A value for a message; nothing where it is long."""
    if isinstance(value, str | list | dict) and len(value) > MAX_SHOWN:
        return ""
    if isinstance(value, list | dict) and any(isinstance(entry, list | dict | str) and len(entry) > MAX_SHOWN for entry in value):
        return ""
    text = repr(value)
    return text if len(text) <= MAX_SHOWN else ""


def _steps(path: str) -> list[str]:
    return re.findall(r"[^.\[\]]+", path)


def _possible(kind: Any, steps: Sequence[str]) -> list[str]:
    """What a field may be that has some values alone, as JSON has them."""
    match kind:
        case msgspec.inspect.Metadata():
            return _possible(kind.type, steps)
        case msgspec.inspect.UnionType():
            return [value for each in kind.types for value in _possible(each, steps)]
        case msgspec.inspect.LiteralType() if not steps:
            return [json.dumps(value) for value in kind.values]
        case msgspec.inspect.EnumType() if not steps:
            return [json.dumps(member.value) for member in kind.cls]
        case msgspec.inspect.StructType() if steps and steps[0] == kind.tag_field:
            return [json.dumps(kind.tag)]
        case msgspec.inspect.StructType() if steps:
            return [value for field in kind.fields if field.encode_name == steps[0] for value in _possible(field.type, steps[1:])]
        case msgspec.inspect.ListType() if steps:
            return _possible(kind.item_type, steps[1:])
        case msgspec.inspect.DictType() if steps:
            return _possible(kind.value_type, steps[1:])
    return []


def _value_at(fields: Any, path: str) -> Any:
    for key in _steps(path):
        if isinstance(fields, dict) and key in fields:
            fields = fields[key]
        elif isinstance(fields, list) and key.isdigit():
            fields = fields[int(key)]
        else:
            return None
    return fields
