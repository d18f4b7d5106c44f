"""Against `tokenizers` itself, and folders with each file present, absent or broken."""

import re
import threading
import time

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models

from pointsman.text import Tokenizer, TooManyTokens
from pointsman.text.tokenizer import CHARACTERS_PER_TOKEN, LONG
from tests.text.small_vocabulary import MARKS, ODD_MARK, ODD_SPECIAL, SPECIAL, backend, write_folder

TOKENIZER = Tokenizer(backend())


@settings(deadline=None, max_examples=200)
@given(st.text())
def test_text_comes_back(text: str) -> None:
    assert TOKENIZER.decode(TOKENIZER.encode(text), skip_special_tokens=False) == text


@settings(deadline=None, max_examples=200)
@given(st.lists(st.integers(0, TOKENIZER.vocab_size + 5)))
def test_token_bytes_are_what_decode_joins(ids: list[int]) -> None:
    joined = b"".join(TOKENIZER.token_bytes(token) for token in ids)
    assert joined.decode(errors="replace") == TOKENIZER.decode(ids, skip_special_tokens=False)


def test_special_tokens() -> None:
    ids = [TOKENIZER.token_id(text) for text in (*SPECIAL, ODD_SPECIAL)]
    assert TOKENIZER.special_ids == set(ids)
    prompt = "]~!b[]~b]user\nhello[e~[\n"
    assert TOKENIZER.decode(TOKENIZER.encode(prompt)) == "user\nhello\n"
    for mark in MARKS:
        token = TOKENIZER.token_id(mark)
        assert token is not None and TOKENIZER.encode(mark) == [token]
        assert TOKENIZER.decode([token]) == TOKENIZER.token_text(token) == mark
    assert TOKENIZER.token_text(TOKENIZER.token_id("]~b]") or -1) == "]~b]"
    assert TOKENIZER.token_id("no such token") is None


def test_ids_without_a_token_are_empty_and_impossible_ids_are_refused() -> None:
    assert TOKENIZER.token_bytes(TOKENIZER.vocab_size) == b"" and TOKENIZER.decode([TOKENIZER.vocab_size]) == ""
    for token in (-1, 1 << 32):
        with pytest.raises(ValueError, match=f"token id {token} is out of range"):
            TOKENIZER.decode([token])


def test_lone_surrogate_is_refused() -> None:
    with pytest.raises(ValueError, match="lone surrogate at 1"):
        TOKENIZER.encode("a\ud800")


@settings(deadline=None, max_examples=20)
@given(st.text(min_size=1, max_size=40), st.booleans())
def test_long_texts_have_the_same_tokens(text: str, special: bool) -> None:
    long = text * (LONG // len(text) + 1)
    ids = TOKENIZER.encode(long, add_special_tokens=special)
    assert ids == backend().encode(long, add_special_tokens=special).ids
    assert TOKENIZER.decode(ids, skip_special_tokens=False) == long
    assert len(ids) < LONG or TOKENIZER.decode(ids) == backend().decode(ids)


def test_a_long_text_lets_other_threads_run() -> None:
    """The library's own call keeps the interpreter to itself, and then the count stays where it is."""
    ticks, done = [0], threading.Event()

    def tick() -> None:
        while not done.is_set():
            time.sleep(0.001)
            ticks[0] += 1

    thread = threading.Thread(target=tick)
    thread.start()
    try:
        before = ticks[0]
        ids = TOKENIZER.encode("x " * 300_000)
        between = ticks[0]
        TOKENIZER.decode(ids)
        after = ticks[0]
    finally:
        done.set()
        thread.join()
    assert between - before > 5 and after - between > 5


@pytest.mark.parametrize("encode", [TOKENIZER.encode, TOKENIZER.encode_plain])
def test_a_text_that_is_far_too_long_is_not_encoded_whole(encode) -> None:
    """One that may fit, or nearly does, is encoded: its number of tokens is exact."""
    word = "x " * LONG
    room = len(encode(word))
    for most in (room, room // 2, None):
        assert len(encode(word, most=most)) == room
    long = "hello " * LONG
    most = len(long) // CHARACTERS_PER_TOKEN // 4
    with pytest.raises(TooManyTokens, match=f"more than {2 * most} tokens; there is room for {most}"):
        encode(long, most=most)


def test_truncation_of_the_file_is_switched_off() -> None:
    made = tokenizers.Tokenizer.from_str(backend().to_str())
    made.enable_truncation(3)
    made.enable_padding(length=100)
    assert len(Tokenizer(made).encode("the cat saw the other cat" * 10)) == len(TOKENIZER.encode("the cat saw the other cat" * 10))


def test_other_decoders_are_refused() -> None:
    made = tokenizers.Tokenizer(models.BPE())
    made.decoder = decoders.ByteFallback()
    with pytest.raises(ValueError, match="decoder is ByteFallback; only byte-level"):
        Tokenizer(made)


def test_load(tmp_path) -> None:
    folder = write_folder(
        tmp_path,
        generation_config_json={"eos_token_id": [7, 2]},
        config_json={"eos_token_id": 1},
        tokenizer_config_json={"eos_token": {"content": "[e~["}, "bos_token": "]~!b[", "pad_token": None, "add_bos_token": True},
        chat_template_jinja="{{ bos_token }}{{ messages[0].content }}{{ eos_token }}",
    )
    loaded = Tokenizer.load(folder)
    assert loaded.folder == folder
    assert loaded.eos_ids == (7, 2)
    assert loaded.special_tokens == {"eos_token": "[e~[", "bos_token": "]~!b["}
    assert loaded.vocab_size == TOKENIZER.vocab_size == backend().get_vocab_size()
    assert loaded.chat_template is not None
    assert loaded.chat_template.render([{"role": "user", "content": "hi"}]) == "]~!b[hi[e~["
    assert loaded.decode(loaded.encode(f"hi {ODD_MARK}")) == TOKENIZER.decode(TOKENIZER.encode(f"hi {ODD_MARK}"))


@pytest.mark.parametrize(
    ("files", "eos_ids"),
    [
        ({"generation_config_json": {"eos_token_id": 9}, "config_json": {"eos_token_id": 1}}, (9,)),
        ({"generation_config_json": {"temperature": 1.0}, "config_json": {"eos_token_id": [1, 3]}}, (1, 3)),
        ({"tokenizer_config_json": {"eos_token": "[e~["}}, (2,)),
        ({"tokenizer_config_json": {"eos_token": "not a token"}}, ()),
        ({}, ()),
    ],
)
def test_where_the_end_of_text_comes_from(tmp_path, files, eos_ids) -> None:
    assert Tokenizer.load(write_folder(tmp_path, **files)).eos_ids == eos_ids


@pytest.mark.parametrize(
    ("chat_template", "rendered"),
    [("one", "one"), ([{"name": "tool_use", "template": "two"}, {"name": "default", "template": "three"}], "three"), (None, None)],
)
def test_template_of_the_tokenizer_config(tmp_path, chat_template, rendered) -> None:
    loaded = Tokenizer.load(write_folder(tmp_path, tokenizer_config_json={"chat_template": chat_template}))
    assert (loaded.chat_template and loaded.chat_template.render([])) == rendered


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"config_json": "{"}, "config.json in {} is not JSON"),
        ({"config_json": "[1]"}, "config.json in {} is not a JSON object"),
        ({"config_json": '{"a":' * 100_000}, "config.json in {} is not JSON"),
        ({"generation_config_json": {"eos_token_id": "2"}}, "eos_token_id in generation_config.json in {} is ['2']"),
        ({"generation_config_json": {"eos_token_id": [True]}}, "must be a token id or a list of them"),
        ({"tokenizer_json": "{}"}, "tokenizer.json in {} cannot be read"),
        ({"tokenizer_config_json": {"chat_template": [{"name": "a"}]}}, "in {} has 'a'; one must be named 'default'"),
        ({"tokenizer_config_json": {"chat_template": 3}}, "chat_template in tokenizer_config.json in {} must be a text"),
        ({"chat_template_jinja": "{% if %}"}, "the chat template cannot be compiled"),
    ],
)
def test_broken_files_are_named(tmp_path, files, message) -> None:
    write_folder(tmp_path, **files)
    with pytest.raises(ValueError, match=re.escape(message.format(tmp_path))):
        Tokenizer.load(tmp_path)


def test_missing_files_are_named(tmp_path) -> None:
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path} has no tokenizer.json")):
        Tokenizer.load(tmp_path)
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path / 'none'} is not a folder")):
        Tokenizer.load(tmp_path / "none")
