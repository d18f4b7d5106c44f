"""Which JSON schemas an answer can be kept to, and how they are handed to the grammar compiler.

The compiler passes over what it does not know, and over some of what it knows where two keywords stand together: the answer would then
not fit the schema, and nobody would be told. So a schema is read here first. What would be lost is refused by its name and place; what the
compiler only understands when it is written differently is written so: a missing `type`, `required` names without a property, arrays and
objects of anything, `allOf`, keywords beside `anyOf`.

The result accepts nothing that the schema does not. It may accept less: properties that a schema neither names nor excludes are
excluded. `oneOf` reads as `anyOf` where the alternatives cannot be told apart. Annotations are left out, a `format` that is not known
among them, as the standard has it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pointsman.grammar.pattern import string_of_pattern

Schema = dict[str, Any]

MAX_DEPTH = 32

_FOR_PEOPLE = ("title", "description", "default", "example", "examples", "deprecated", "readOnly", "writeOnly", "externalDocs")
_FOR_READERS = ("discriminator", "xml", "contentEncoding", "contentMediaType", "contentSchema", "$schema", "$id", "$comment")
_ANNOTATIONS = frozenset((*_FOR_PEOPLE, *_FOR_READERS))
_DEFINITIONS = ("$defs", "definitions")
_FORMS = ("$ref", "const", "enum", "anyOf", "oneOf", "allOf")
_OF_KIND = {
    "string": ("minLength", "maxLength", "pattern", "format"),
    "number": ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"),
    "array": ("items", "prefixItems", "minItems", "maxItems", "uniqueItems"),
    "object": (
        "properties",
        "required",
        "additionalProperties",
        "unevaluatedProperties",
        "patternProperties",
        "propertyNames",
        "minProperties",
        "maxProperties",
    ),
}
_TYPES = ("string", "number", "integer", "boolean", "null", "array", "object")
_KNOWN = frozenset((*_DEFINITIONS, *_FORMS, "type", "nullable", *(word for words in _OF_KIND.values() for word in words)))
_FORMATS = frozenset(["date", "time", "date-time", "duration", "email", "hostname", "ipv4", "ipv6", "uri", "uuid"])
_COUNTS = ("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties")


def checked_schema(schema: Any, place: str = "json_schema") -> Schema | bool:
    """The schema as the compiler keeps to it.

    Raises:
        ValueError: names the place and the keyword that could not be kept to.
    """
    return _node(schema, place, 0)


def _node(schema: Any, place: str, depth: int) -> Schema | bool:
    if isinstance(schema, bool):
        return schema
    if not isinstance(schema, Mapping):
        raise ValueError(f"{place} is {schema!r:.80}; a schema must be an object, true or false")
    if depth > MAX_DEPTH:
        raise ValueError(f"{place[:80]}... is nested too deep; schemas may be nested {MAX_DEPTH} deep")
    words = {word: value for word, value in schema.items() if word not in _ANNOTATIONS and not word.startswith("x-")}
    for word in words:
        if word not in _KNOWN:
            raise ValueError(f"{place} has {word!r:.80}, which an answer cannot be kept to; leave it out, or say it in other words")
    found = {word: _nodes(words.pop(word), f"{place}.{word}", depth) for word in _DEFINITIONS if word in words}
    if words.pop("nullable", False) is True:
        return found | {"anyOf": [_body(words, place, depth), {"type": "null"}]}
    body = _body(words, place, depth)
    return (found | body if isinstance(body, dict) else {"anyOf": [body], **found}) if found else body


def _nodes(schemas: Any, place: str, depth: int) -> dict[str, Schema | bool]:
    if not isinstance(schemas, Mapping):
        raise ValueError(f"{place} is {schemas!r:.80}; it must be an object of schemas")
    return {name: _node(schema, f"{place}.{name}", depth + 1) for name, schema in schemas.items()}


def _list(schemas: Any, place: str) -> list[Any]:
    if not isinstance(schemas, Sequence) or isinstance(schemas, str) or not schemas:
        raise ValueError(f"{place} is {schemas!r:.80}; it must be a list, and not empty")
    return list(schemas)


def _body(words: Schema, place: str, depth: int) -> Schema | bool:
    """A schema without annotations and definitions."""
    forms = [form for form in _FORMS if form in words]
    if not forms:
        return _typed(words, place, depth)
    if len(forms) > 1:
        raise ValueError(f"{place} has {forms[0]!r} and {forms[1]!r}; an answer can be kept to one of them")
    form = forms[0]
    value = words.pop(form)
    if form == "$ref":
        _alone(words, place, form)
        return {"$ref": _reference(value, place)}
    if form in ("const", "enum"):
        return _values([value] if form == "const" else _list(value, f"{place}.enum"), words, place, form)
    members = [
        _joined(words, member, f"{place}.{form}[{index}]") if words else member
        for index, member in enumerate(_list(value, f"{place}.{form}"))
    ]
    if form == "allOf":
        whole = members[0]
        for index, member in enumerate(members[1:], 1):
            whole = _joined(whole, member, f"{place}.allOf[{index}]")
        return _node(whole, f"{place}.allOf", depth + 1)
    return {form: [_node(member, f"{place}.{form}[{index}]", depth + 1) for index, member in enumerate(members)]}


def _alone(words: Schema, place: str, form: str) -> None:
    if words:
        raise ValueError(f"{place} has {next(iter(words))!r} beside {form!r}; an answer can be kept to one of them")


def _joined(one: Any, other: Any, place: str) -> Any:
    """What accepts what both accept, where that can be written without thinking: they do not speak of the same thing differently."""
    if not isinstance(one, Mapping) or not isinstance(other, Mapping):
        raise ValueError(f"{place} is a schema that cannot be joined with those beside it")
    joined = dict(one)
    for word, value in other.items():
        if word in _ANNOTATIONS or word not in joined:
            joined[word] = value
        elif word == "required" and isinstance(value, list) and isinstance(joined[word], list):
            joined[word] = list(dict.fromkeys([*joined[word], *value]))
        elif word in ("properties", *_DEFINITIONS) and isinstance(value, Mapping) and isinstance(joined[word], Mapping):
            if twice := [name for name in value if name in joined[word] and joined[word][name] != value[name]]:
                raise ValueError(f"{place} has {word} {twice[0]!r:.80} beside another one; write both as one schema")
            joined[word] = {**joined[word], **value}
        elif joined[word] != value:
            raise ValueError(f"{place} has {word!r} beside another one; write both as one schema")
    if joined.get("additionalProperties") is False and set(one.get("properties", ())) != set(other.get("properties", ())):
        raise ValueError(f"{place} excludes properties that a schema beside it has; write both as one schema")
    return joined


def _reference(value: Any, place: str) -> str:
    if not isinstance(value, str) or not (value == "#" or value.startswith("#/")) or "~" in value or "%" in value:
        raise ValueError(f"{place}.$ref is {value!r:.80}; it must point into the same schema: '#/$defs/...', without '~' and '%'")
    return value


def _values(values: list[Any], words: Schema, place: str, form: str) -> Schema:
    """Some of the listed values: those of the type, if that is given too."""
    types = _types(words.pop("type"), place) if "type" in words else _TYPES
    _alone(words, place, form)
    kept = [value for value in values if any(_is(value, name) for name in types)]
    if not kept:
        raise ValueError(f"{place}.{form} has no value of type {', '.join(types)}")
    return {"enum": kept}


def _is(value: Any, name: str) -> bool:
    if isinstance(value, bool) or value is None:
        return name == ("null" if value is None else "boolean")
    if isinstance(value, int | float):
        return name == "number" or (name == "integer" and float(value).is_integer())
    return name == ("string" if isinstance(value, str) else "array" if isinstance(value, list) else "object")


def _types(value: Any, place: str) -> tuple[str, ...]:
    names = value if isinstance(value, list) and value else [value]
    for name in names:
        if name not in _TYPES:
            raise ValueError(f"{place}.type is {name!r:.80}; it must be one of {', '.join(_TYPES)}, or a list of them")
    return tuple(dict.fromkeys(names))


def _typed(words: Schema, place: str, depth: int) -> Schema | bool:
    """A schema of types and the keywords that belong to them; keywords of other types mean nothing."""
    kinds = [kind for kind, own in _OF_KIND.items() if any(word in words for word in own)]
    if "type" not in words:
        if not kinds:
            return True
        if len(kinds) > 1:
            raise ValueError(f"{place} has keywords of {kinds[0]} and of {kinds[1]}; it needs a type")
    types = _types(words.get("type", kinds[0] if kinds else None), place)
    for word in _COUNTS:
        if word in words and (isinstance(words[word], bool) or not isinstance(words[word], int) or words[word] < 0):
            raise ValueError(f"{place}.{word} is {words[word]!r:.80}; it must be a whole number from 0")
    body: Schema = {"type": types[0] if len(types) == 1 else list(types)}
    if "string" in types:
        body |= _string(words, place)
    if "number" in types or "integer" in types:
        body |= _number(words, place, types)
    if "array" in types:
        body |= _array(words, place, depth)
    if "object" in types:
        body |= _object(words, place, depth)
    return body


def _string(words: Schema, place: str) -> Schema:
    found = {word: words[word] for word in _OF_KIND["string"] if word in words}
    if found.get("format") not in _FORMATS:
        found.pop("format", None)
    for word in ("pattern", "format"):
        if word in found and len(found) > 1:
            other = next(name for name in found if name != word)
            raise ValueError(f"{place} has {word!r} and {other!r}; an answer can be kept to one of them")
    if "pattern" in found:
        if not isinstance(found["pattern"], str):
            raise ValueError(f"{place}.pattern is {found['pattern']!r:.80}; it must be a regular expression")
        try:
            string_of_pattern(found["pattern"])
        except ValueError as error:
            raise ValueError(f"{place}.pattern {error}") from None
    return found


def _number(words: Schema, place: str, types: tuple[str, ...]) -> Schema:
    found = {word: words[word] for word in _OF_KIND["number"] if word in words}
    for word, value in found.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(f"{place}.{word} is {value!r:.80}; it must be a number")
    if "multipleOf" in found and ("number" in types or len(found) > 1 or not float(found["multipleOf"]).is_integer()):
        raise ValueError(f"{place} has 'multipleOf'; an answer can be kept to it only as a whole number, of integers without a range")
    return found


def _array(words: Schema, place: str, depth: int) -> Schema:
    if words.get("uniqueItems"):
        raise ValueError(f"{place} has 'uniqueItems', which an answer cannot be kept to; leave it out")
    found: Schema = {word: words[word] for word in ("minItems", "maxItems") if word in words}
    first = words.get("prefixItems")
    if first is not None:
        listed = _list(first, f"{place}.prefixItems")[: found.get("maxItems")]
        nodes = [_node(item, f"{place}.prefixItems[{index}]", depth + 1) for index, item in enumerate(listed)]
        found["prefixItems"] = [{} if node is True else node for node in nodes]
    if isinstance(words.get("items"), list):
        raise ValueError(f"{place}.items is a list, as schemas had it before 2020; it is called prefixItems now")
    if "items" in words:
        found["items"] = _node(words["items"], f"{place}.items", depth + 1)
    elif found.get("minItems", 1) > len(found.get("prefixItems", ())):
        found["items"] = True
    return found


def _object(words: Schema, place: str, depth: int) -> Schema:
    found: Schema = {word: words[word] for word in ("minProperties", "maxProperties") if word in words}
    if "patternProperties" in words or "propertyNames" in words:
        return found | _named(words, place, depth)
    properties = _nodes(words.get("properties", {}), f"{place}.properties", depth)
    others = words.get("additionalProperties", words.get("unevaluatedProperties"))
    required = words.get("required", [])
    if not isinstance(required, list) or not all(isinstance(name, str) for name in required):
        raise ValueError(f"{place}.required is {required!r:.80}; it must be a list of names")
    if others is None and found.get("minProperties", 0) > len(properties):
        others = True
    if others is None and not properties and not required:
        others = True
    for name in required:
        if name not in properties:
            if others is False:
                raise ValueError(f"{place}.required has {name!r:.80}, which additionalProperties excludes")
            properties[name] = True if others is None else _node(others, f"{place}.additionalProperties", depth + 1)
    if others not in (None, False) and found.get("minProperties", 0) > max(1, len(required)):
        raise ValueError(f"{place} has 'minProperties', and names that it does not list; an answer could have one of those twice")
    if properties:
        found["properties"] = properties
    if required:
        found["required"] = list(dict.fromkeys(required))
    if others is not None:
        found["additionalProperties"] = _node(others, f"{place}.additionalProperties", depth + 1)
    return found


def _named(words: Schema, place: str, depth: int) -> Schema:
    """An object whose names are only described."""
    patterns, names = words.get("patternProperties"), words.get("propertyNames")
    others = words.get("additionalProperties", True)
    beside = [name for name in ("properties", "required") if words.get(name)]
    if patterns is not None and names is not None:
        beside.append("propertyNames")
    if beside or words.get("minProperties", 0) > 1:
        first = "propertyNames" if patterns is None else "patternProperties"
        raise ValueError(f"{place} has {first!r} and {(*beside, 'minProperties')[0]!r}; an answer can be kept to one of them")
    if patterns is not None:
        if not isinstance(patterns, Mapping) or len(patterns) != 1 or others not in (True, False):
            raise ValueError(f"{place}.patternProperties must have one pattern; an answer cannot be kept to more")
        ((pattern, others),) = patterns.items()
        names = {"pattern": pattern}
    if isinstance(names, Mapping):
        names = {**names, "type": "string"}
    return {
        "propertyNames": _node(names, f"{place}.propertyNames", depth + 1),
        "additionalProperties": _node(others, f"{place}.additionalProperties", depth + 1),
    }
