"""What the text of an answer must look like: plain data for whoever asks, checked before anything expensive looks at it.

`form` is the constraint itself, `schema` says which JSON schemas can be kept to, `tools` makes a constraint of tools that must be
called, or may be. Nothing here compiles or matches; `pointsman.sampling.grammar` does, in a process of its own.
"""

from pointsman.grammar.form import MAX_NESTING, MAX_TEXT, Grammar
from pointsman.grammar.tools import call_or_answer, tool_call_grammar

__all__ = ["MAX_NESTING", "MAX_TEXT", "Grammar", "call_or_answer", "tool_call_grammar"]
