"""Against decoding all ids at once, for any ids: parts of characters, bytes that are no UTF-8, special tokens, ids without a token."""

import re

from hypothesis import given, settings
from hypothesis import strategies as st

from pointsman.text import Detokenizer, Tokenizer
from tests.text.small_vocabulary import ODD_MARK, ODD_SPECIAL, backend

TOKENIZER = Tokenizer(backend())
BYTES = [token for token in range(TOKENIZER.vocab_size) if len(TOKENIZER.token_bytes(token)) == 1]
LEADS = [token for token in BYTES if TOKENIZER.token_bytes(token)[0] >= 0x80]

any_ids = st.lists(
    st.one_of(st.integers(0, TOKENIZER.vocab_size + 2), st.sampled_from(LEADS), st.sampled_from(sorted(TOKENIZER.special_ids)))
)
text_ids = st.text(max_size=20).map(lambda text: [BYTES_OF[byte] for byte in text.encode()])
BYTES_OF = {TOKENIZER.token_bytes(token)[0]: token for token in BYTES}


def streamed(ids: list[int], prompt: list[int], skip: bool) -> list[str]:
    detokenizer = Detokenizer(TOKENIZER, prompt, skip)
    return [*map(detokenizer.push, ids), detokenizer.flush()]


@settings(deadline=None, max_examples=500)
@given(st.one_of(any_ids, text_ids), st.booleans())
def test_the_same_as_decoding_at_once(ids: list[int], skip: bool) -> None:
    texts = streamed(ids, [], skip)
    assert "".join(texts) == TOKENIZER.decode(ids, skip)
    # Nothing but an unfinished character is ever held back, and nothing of it is emitted.
    for count in range(len(ids) + 1):
        so_far, now = "".join(texts[:count]), TOKENIZER.decode(ids[:count], skip)
        assert so_far + held_back(ids[:count], skip) == now


def held_back(ids: list[int], skip: bool) -> str:
    """What decoding at once makes of an unfinished character at the end, by the table of well-formed sequences in the Unicode standard."""
    data = b"".join(TOKENIZER.token_bytes(token) for token in ids if not (skip and token in TOKENIZER.special_ids))
    if re.search(rb"[\xc2-\xf4]\Z|(\xe0[\xa0-\xbf]|[\xe1-\xec\xee\xef][\x80-\xbf])\Z", data) or re.search(
        rb"(\xf0[\x90-\xbf]|[\xf1-\xf3][\x80-\xbf]|\xf4[\x80-\x8f])[\x80-\xbf]?\Z|\xed[\x80-\x9f]\Z", data
    ):
        return "\ufffd"
    return "\ufffd\ufffd" if re.search(rb"\xed[\xa0-\xbf]\Z", data) else ""


@settings(deadline=None, max_examples=500)
@given(any_ids, any_ids, st.booleans())
def test_a_prompt_that_ends_inside_a_character(prompt: list[int], ids: list[int], skip: bool) -> None:
    text, whole = "".join(streamed(ids, prompt, skip)), TOKENIZER.decode(prompt + ids, skip)
    before = whole[: len(whole) - len(text)]
    assert before + text == whole
    assert before + held_back(prompt, skip) == TOKENIZER.decode(prompt, skip)


@settings(deadline=None, max_examples=100)
@given(st.text(max_size=20), st.integers(0, 3))
def test_a_character_cut_by_the_end_of_the_prompt_is_whole(text: str, cut: int) -> None:
    ids = [BYTES_OF[byte] for byte in (text + "😀").encode()]
    split = len(ids) - 4 + cut
    assert "".join(streamed(ids[split:], ids[:split], True)) == "😀"


def test_a_character_over_several_tokens_comes_at_once() -> None:
    ids = [BYTES_OF[byte] for byte in "€😀".encode()]
    assert streamed(ids, [], True) == ["", "", "€", "", "", "", "😀", ""]


def test_a_true_replacement_character_does_not_wait() -> None:
    (token,) = [token for token in range(TOKENIZER.vocab_size) if TOKENIZER.token_bytes(token) == "\ufffd".encode()]
    assert streamed([token] * 3, [], True) == ["\ufffd"] * 3 + [""]


def test_many_undecodable_bytes_do_not_wait() -> None:
    ids = [BYTES_OF[0x80]] * 1000 + [BYTES_OF[0xE2]] * 1000
    texts = streamed(ids, [], True)
    assert texts == ["\ufffd"] * 1000 + [""] + ["\ufffd"] * 1000
    assert "".join(texts) == TOKENIZER.decode(ids)


def test_added_tokens_outside_and_inside_the_byte_alphabet() -> None:
    odd_special, odd_mark = TOKENIZER.token_id(ODD_SPECIAL), TOKENIZER.token_id(ODD_MARK)
    assert odd_special is not None and odd_mark is not None
    assert "".join(streamed([odd_special, odd_mark], [], False)) == TOKENIZER.decode([odd_special, odd_mark], False)
    assert "".join(streamed([odd_special, odd_mark], [], True)) == TOKENIZER.decode([odd_mark], True)


def test_a_skipped_special_token_leaves_a_character_whole() -> None:
    special = min(TOKENIZER.special_ids)
    first, second, third = (BYTES_OF[byte] for byte in "€".encode())
    assert "".join(streamed([first, special, second, third], [], True)) == "€"
    assert "".join(streamed([first, special, second, third], [], False)) == "\ufffd]!p~[\ufffd\ufffd"
