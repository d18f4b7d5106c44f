"""The arguments of a tool call, written as JSON while the model writes the call.

Every piece that is written is a piece of one JSON object: whoever joins the pieces has, at any time, the beginning of that object. A
string is written as it comes; any other value must be complete before it is known what it is (parameter_types).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from pointsman.server.parameter_types import TEXT, Parameters, ValueType, json_string, json_value


class Toolbox:
    """The tools that a request offers.

    Args:
        tools: as OpenAI has them, `{"type": "function", "function": {...}}`, or the functions alone.
    """

    def __init__(self, tools: Iterable[Mapping[str, Any]]) -> None:
        functions = [tool.get("function", tool) for tool in tools]
        self._parameters = {
            function["name"]: Parameters(function.get("parameters"))
            for function in functions
            if isinstance(function, Mapping) and isinstance(function.get("name"), str)
        }
        self._unknown = Parameters(None)

    def parameters(self, name: str) -> Parameters:
        """The parameters of a tool; one that is not offered has none, so that all of its values are strings."""
        return self._parameters.get(name, self._unknown)


class Arguments:
    """The JSON object of one call. Each method returns the piece that it adds."""

    def __init__(self, parameters: Parameters) -> None:
        self._parameters = parameters
        self._empty = True
        self._open = False
        self._quoted = False
        self._type: ValueType = TEXT
        self._held: list[str] = []

    def open(self, name: str) -> str:
        """The next value begins. The same name again gives the same key again, of which readers of JSON take the last."""
        assert not self._open
        piece = ("{" if self._empty else ", ") + json_string(name) + ": "
        self._empty, self._open = False, True
        self._type = self._parameters.type_of(name)
        self._quoted = self._type.streams and "null" not in self._type.kinds
        return piece + '"' if self._quoted else piece

    def add(self, text: str) -> str:
        """More of the value."""
        assert self._open
        if self._quoted:
            return json_string(text)[1:-1]
        self._held.append(text)
        if not self._type.streams or "null".startswith("".join(self._held)):
            return ""
        self._quoted = True
        return json_string(self._taken())[:-1]

    def close(self) -> str:
        """The value is complete."""
        assert self._open
        self._open = False
        return '"' if self._quoted else json_value(self._taken(), self._type)

    def end(self) -> str:
        """The object is complete. A value that is still open was cut off: what there is of it is a string, whatever it was to be."""
        piece = ""
        if self._open:
            piece = '"' if self._quoted else json_string(self._taken())
            self._open = False
        return piece + ("{}" if self._empty else "}")

    def _taken(self) -> str:
        text = "".join(self._held)
        self._held.clear()
        return text
