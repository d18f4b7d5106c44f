"""A checkpoint's tokenizer, read from its folder: `tokenizer.json` through `tokenizers`, and the few facts the engine needs of the rest.

Only byte-level tokenizers are read (MiniMax, Qwen, DeepSeek, GLM, Llama 3 all are). There every token is a string of bytes and a
text is their concatenation, so that text can be streamed exactly, one token at a time. Other decoders can change characters
that are long past (a byte fallback turns a whole run into replacement characters), which no stream can take back; they are refused.

The end-of-text ids come from `generation_config.json` before `config.json`: in MiniMax-M2's `config.json` they are not the end of a turn.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers.decoders import ByteLevel

from pointsman.text.template import ChatTemplate

MAX_TOKEN_ID = (1 << 32) - 1
LONG = 1 << 14
CHARACTERS_PER_TOKEN = 8


class TooManyTokens(ValueError):
    """A text has more tokens than there is room for."""


class Tokenizer:
    """Text to token ids and back.

    Attributes:
        vocab_size: tokens with a text, added ones included. The model may have more rows, as padding; those decode to nothing.
        eos_ids: ids that end the text; empty where the checkpoint names none.
        special_ids: ids that `skip_special_tokens` leaves out.
        special_texts: the texts of those.
        whole_texts: what tokens spell that are whole characters, as far as that was asked for: special ones spelt out, and skipped.
        special_tokens: names as in tokenizer_config.json (`bos_token`, ...) to texts, which chat templates see as variables.
        chat_template: None where the checkpoint has none.
        folder: where it was read from, None where it was made in memory.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        eos_ids: tuple[int, ...] = (),
        special_tokens: dict[str, str] | None = None,
        chat_template: ChatTemplate | None = None,
        folder: Path | None = None,
    ) -> None:
        if not isinstance(backend.decoder, ByteLevel):
            kind = type(backend.decoder).__name__
            raise ValueError(f"the tokenizer's decoder is {kind}; only byte-level tokenizers (decoder ByteLevel) are supported")
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self._bytes: dict[int, bytes] = {}
        self.whole_texts: tuple[dict[int, str], dict[int, str]] = ({}, {})
        self.vocab_size: int = backend.get_vocab_size(with_added_tokens=True)
        self.eos_ids = eos_ids
        special = {added.content: token for token, added in backend.get_added_tokens_decoder().items() if added.special}
        self._special = special
        self.special_ids = frozenset(special.values())
        self.special_texts = frozenset(special)
        self.special_tokens = special_tokens or {}
        self.chat_template = chat_template
        self.folder = folder

    @classmethod
    def load(cls, folder: str | Path) -> Tokenizer:
        """Read a checkpoint's folder.

        Raises:
            ValueError: a file is missing or is not what it should be; the message names it and the folder.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise ValueError(f"{folder} is not a folder; it should be one with a tokenizer.json")
        config = _read_json(folder, "tokenizer_config.json")
        special_tokens = _special_tokens(config)
        source = _template_source(folder, config)
        backend = _read_backend(folder)
        eos_ids = _eos_ids(folder)
        if eos_ids is None:
            eos = backend.token_to_id(special_tokens.get("eos_token", ""))
            eos_ids = () if eos is None else (eos,)
        template = None if source is None else ChatTemplate(source, special_tokens)
        return cls(backend, eos_ids=eos_ids, special_tokens=special_tokens, chat_template=template, folder=folder)

    def encode(self, text: str, add_special_tokens: bool = True, *, most: int | None = None) -> list[int]:
        """Token ids of a text. A rendered chat already has its special tokens: encode it without adding any.

        Args:
            most: how many the caller has room for. The answer may have more, but a text that is far too long is not encoded as a whole.

        Raises:
            TooManyTokens: the text has more than twice that.
            ValueError: the text has what is no character.
        """
        _check_text(self._backend, text, most)
        return _encode(self._backend, text, add_special_tokens)

    def encode_plain(self, text: str, *, most: int | None = None) -> list[int]:
        """Token ids of a text in which nothing is special: what looks like a special token is spelt out. Raises ValueError as `encode`."""
        _check_text(self._plain, text, most)
        ids = _encode(self._plain, text, False)
        if not self.special_ids.isdisjoint(ids):
            raise ValueError("the text has the name of a special token, which this tokenizer cannot spell out")
        return ids

    @functools.cached_property
    def _plain(self) -> tokenizers.Tokenizer:
        """A copy for `encode_plain`: the setting belongs to a tokenizer, and other threads may be using this one."""
        copy = tokenizers.Tokenizer.from_str(self._backend.to_str())
        copy.encode_special_tokens = True
        return copy

    def special_id(self, text: str) -> int:
        """The id of a special token."""
        return self._special[text]

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of token ids; bytes that are not UTF-8 become U+FFFD, ids without a token become nothing."""
        for token in ids:
            if not 0 <= token <= MAX_TOKEN_ID:
                raise ValueError(f"token id {token} is out of range; the vocabulary has {self.vocab_size} tokens")
        if len(ids) < LONG:
            text: str = self._backend.decode(ids, skip_special_tokens=skip_special_tokens)
        else:  # lets other threads run meanwhile
            [text] = self._backend.decode_batch([ids], skip_special_tokens=skip_special_tokens)
        return text

    def token_bytes(self, token: int) -> bytes:
        """The bytes a token adds to a text; none for an id without a token."""
        found = self._bytes.get(token)
        if found is None:
            text = self._backend.id_to_token(token) or ""
            try:
                found = bytes(map(_BYTES.__getitem__, text))
            except KeyError:  # an added token may have characters outside the byte alphabet, and then stands for itself
                found = text.encode()
            self._bytes[token] = found
        return found

    def token_text(self, token: int) -> str:
        """One token as text, special ones too, for people to read: a part of a character becomes U+FFFD."""
        return self.token_bytes(token).decode(errors="replace")

    def token_id(self, text: str) -> int | None:
        """The id of the token with exactly this text (of an added token, such as `</think>`), or None."""
        found: int | None = self._backend.token_to_id(text)
        return found


def _encode(backend: tokenizers.Tokenizer, text: str, add_special_tokens: bool) -> list[int]:
    """A long text lets other threads run meanwhile, which `Tokenizer.encode` of the library does not."""
    if len(text) < LONG:
        encoding = backend.encode(text, add_special_tokens=add_special_tokens)
    else:
        [encoding] = backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)
    ids: list[int] = encoding.ids
    return ids


def _check_text(backend: tokenizers.Tokenizer, text: str, most: int | None) -> None:
    """Raises as `Tokenizer.encode`. An encoded text takes some 300 bytes a token, so one that is much too long is counted in pieces.

    A cut changes the tokens next to it and no others: twice the number is beyond doubt.
    """
    _check_characters(text)
    if most is None or len(text) <= most * CHARACTERS_PER_TOKEN:
        return
    count = 0
    for start in range(0, len(text), LONG):
        count += len(backend.encode_batch_fast([text[start : start + LONG]], add_special_tokens=False)[0])
        if count > 2 * most:
            raise TooManyTokens(f"the text has more than {2 * most} tokens; there is room for {most}")


def _check_characters(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"the text has a lone surrogate at {error.start}, which is no character") from error


def _byte_alphabet() -> dict[str, int]:
    """The characters that stand for bytes in a byte-level vocabulary: printable ones for themselves, the others from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + index): byte for index, byte in enumerate(others)}


_BYTES = _byte_alphabet()


def _read_json(folder: Path, name: str) -> dict[str, Any]:
    """A JSON object from a file, empty where there is no file."""
    path = folder / name
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name} in {folder} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{name} in {folder} is not a JSON object")
    return content


def _read_backend(folder: Path) -> tokenizers.Tokenizer:
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise ValueError(f"{folder} has no tokenizer.json")
    try:
        return tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises no narrower class
        raise ValueError(f"tokenizer.json in {folder} cannot be read: {error}") from error


def _special_tokens(config: dict[str, Any]) -> dict[str, str]:
    """`bos_token` and the like; transformers writes each as a text or as an object with its text as `content`."""
    named = {name: value for name, value in config.items() if name.endswith("_token")}
    texts = {name: value.get("content") if isinstance(value, dict) else value for name, value in named.items()}
    return {name: text for name, text in texts.items() if isinstance(text, str)}


def _eos_ids(folder: Path) -> tuple[int, ...] | None:
    for name in ("generation_config.json", "config.json"):
        ids = _read_json(folder, name).get("eos_token_id")
        if ids is None:
            continue
        ids = ids if isinstance(ids, list) else [ids]
        for token in ids:
            if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token <= MAX_TOKEN_ID:
                raise ValueError(f"eos_token_id in {name} in {folder} is {ids!r}; it must be a token id or a list of them")
        return tuple(ids)
    return None


def _template_source(folder: Path, config: dict[str, Any]) -> str | None:
    """The chat template: its own file first, then tokenizer_config.json, there as one text or as several with names."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    found = config.get("chat_template")
    if isinstance(found, list):
        named = {entry.get("name"): entry.get("template") for entry in found if isinstance(entry, dict)}
        if "default" not in named:
            names = ", ".join(map(repr, named)) or "nothing"
            raise ValueError(f"chat_template in tokenizer_config.json in {folder} has {names}; one must be named 'default'")
        found = named["default"]
    if found is not None and not isinstance(found, str):
        raise ValueError(f"chat_template in tokenizer_config.json in {folder} must be a text, or a list of texts with names")
    return found
