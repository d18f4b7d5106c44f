"""A conversation as the tokens of a prompt, in which only the template writes control tokens.

An ordinary conversation is encoded as it is rendered, and its tokens are those that any other program makes of that text. Where a
client's text holds what a control token looks like, or could at its border, the conversation is rendered with marks in those
places (`marks`): if the control tokens of the rendered text are then found to be the template's, it is still encoded as it is; if not,
the pieces between the template's own are encoded one by one, by a tokenizer that takes control tokens for text.

Control tokens are those that the tokenizer calls special. `<think>` and the tags of tool calls are tokens too, but not special: in a
client's text they mean what they mean to other programs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from pointsman.text.marks import Marks
from pointsman.text.template import prepare
from pointsman.text.tokenizer import Tokenizer, TooManyTokens


class ChatPrompt(NamedTuple):
    """The rendered text, and its tokens."""

    text: str
    ids: list[int]


def chat_prompt(
    tokenizer: Tokenizer,
    /,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None = None,
    *,
    add_generation_prompt: bool = True,
    continue_final_message: bool = False,
    most: int | None = None,
    **variables: Any,
) -> ChatPrompt:
    """The prompt of a conversation; the arguments are those of `ChatTemplate.render`, and `most` is that of `Tokenizer.encode`.

    Raises:
        TooManyTokens: as `Tokenizer.encode`.
        ValueError: there is no template, or it refuses; or a text cannot be encoded.
    """
    template = tokenizer.chat_template
    if template is None:
        raise ValueError("the checkpoint has no chat template")
    marks = Marks(tokenizer.special_texts)
    rendered = template.render(
        marks.marked([prepare(index, message) for index, message in enumerate(messages)]),
        None if tools is None else marks.marked(list(tools)),
        add_generation_prompt,
        continue_final_message,
        **marks.marked(variables),
    )
    text = marks.plain(rendered)
    if not marks.used or marks.places(text) == marks.places(rendered):
        return ChatPrompt(text, tokenizer.encode(text, add_special_tokens=False, most=most))
    ids: list[int] = []
    for index, piece in enumerate(marks.split(rendered)):
        ids += tokenizer.encode_plain(marks.plain(piece), most=most) if index % 2 == 0 else [tokenizer.special_id(piece)]
        if most is not None and len(ids) > 2 * most:
            raise TooManyTokens(f"the text has more than {2 * most} tokens; there is room for {most}")
    return ChatPrompt(text, ids)
