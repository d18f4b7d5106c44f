"""What form an answer must have: JSON of a schema, a regular expression, a grammar.

OpenAI's `response_format` and the short names of SGLang say the same things; a request may say one.
"""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
from msgspec import Meta

from pointsman.grammar import MAX_TEXT
from pointsman.server.bounds import Name

GrammarText = Annotated[str, Meta(min_length=1, max_length=MAX_TEXT)]


class TextFormat(msgspec.Struct, kw_only=True, tag_field="type", tag="text", forbid_unknown_fields=True):
    """Any text."""


class JsonObjectFormat(msgspec.Struct, kw_only=True, tag_field="type", tag="json_object", forbid_unknown_fields=True):
    """A JSON object."""


class JsonSchema(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """`name` and `description` are for people; a schema is always kept to, so `strict` changes nothing."""

    schema: dict[str, Any]
    name: Name | None = None
    description: str | None = None
    strict: bool | None = None


class JsonSchemaFormat(msgspec.Struct, kw_only=True, tag_field="type", tag="json_schema", forbid_unknown_fields=True):
    """JSON of a schema."""

    json_schema: JsonSchema


ResponseFormat = TextFormat | JsonObjectFormat | JsonSchemaFormat
