"""What each framework reads of a record, as its own reader is described, and the record that comes back."""

from __future__ import annotations

import base64
import dataclasses
import io
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pointsman.rl import adapters
from pointsman.routed_experts import RoutedExperts, decode_int32, encode
from tests.test_routed_experts import records, same

SETTINGS = settings(deadline=None, max_examples=60)


@st.composite
def whole_records(draw, start=None):
    """Records in which every row is known (0, 1, ... are experts like others), with the number of tokens and layers of the model."""
    experts = draw(records())
    experts = dataclasses.replace(experts, missing=(), start=experts.start if start is None else start)
    return experts, experts.start + experts.num_rows + 1, experts.layers[-1] + 1 + draw(st.integers(0, 2))


def slime_reads(text, tokens, start, num_layers, top_k, num_experts):
    """slime's and miles' rollout and the padding of their Megatron actor."""
    numbers = np.frombuffer(base64.b64decode(text.encode("ascii")), dtype=np.int32)
    assert numbers.size == (len(tokens) - 1 - start) * num_layers * top_k
    rows = numbers.reshape(len(tokens) - 1 - start, num_layers, top_k)
    last = np.arange(num_layers * top_k, dtype=rows.dtype).reshape(1, num_layers, top_k) % num_experts
    return np.concatenate([rows, last])


def verl_reads(rows, prompt_length, prompt_width, response_width):
    """verl's agent loop: behind the left padding of the prompt, into zeros."""
    length, num_layers, top_k = rows.shape
    total = prompt_width + response_width
    padded = np.zeros((1, total, num_layers, top_k), rows.dtype)
    begin = prompt_width - prompt_length
    end = min(begin + length, total)
    assert begin >= 0
    assert end == begin + length
    padded[:, begin:end] = rows[None]
    return padded


def nemo_rl_accepts(rows, num_experts):
    """Its validation: a row is the sentinel throughout, or experts in range, each once, and never zeros alone."""
    for row in rows.reshape(-1, rows.shape[-1]):
        if (row == -1).all():
            continue
        if row.min() < 0 or row.max() >= num_experts or len(set(row.tolist())) != len(row):
            return False
    return True


def prime_rl_reads(payload):
    rows = np.frombuffer(base64.b64decode(payload["data"]), dtype=payload["dtype"]).reshape(payload["shape"])
    assert payload["dtype"] in ("uint8", "uint16")
    return rows, payload["start"]


def vllm_client_reads(text):
    return np.load(io.BytesIO(base64.b64decode(text)), allow_pickle=False)


@SETTINGS
@given(whole_records())
def test_slime_and_miles(case):
    experts, num_tokens, num_layers = case
    top_k, chosen = experts.rows_RLK.shape[2], list(experts.layers)
    text = adapters.to_slime(experts, num_tokens=num_tokens, num_layers=num_layers)
    rows = slime_reads(text, range(num_tokens), experts.start, num_layers, top_k, experts.num_experts)
    assert np.array_equal(rows[:-1][:, chosen], experts.rows_RLK)
    assert not np.delete(rows[:-1], chosen, axis=1).any()
    told = {"num_experts": experts.num_experts, "start": experts.start}
    back = adapters.from_slime(text, num_tokens=num_tokens, num_layers=num_layers, top_k=top_k, layers=experts.layers, **told)
    same(back, experts, versions=False)


@SETTINGS
@given(whole_records(start=0), st.integers(1, 12), st.integers(0, 4), st.integers(0, 4))
def test_verl(case, prompt_length, left, right):
    experts, num_tokens, num_layers = case
    prompt_length = min(prompt_length, num_tokens)
    rows = adapters.to_verl(experts, num_tokens=num_tokens, num_layers=num_layers)
    assert rows.dtype == np.int16
    assert rows.flags.writeable
    room = {"prompt_width": prompt_length + left, "response_width": num_tokens - prompt_length + right}
    batch = adapters.pad_verl([rows, rows], [prompt_length, prompt_length], **room)
    assert batch.dtype == np.int16
    wanted = verl_reads(rows, prompt_length, *room.values())
    assert np.array_equal(batch, np.concatenate([wanted, wanted]))
    mine = batch[1, left:][: num_tokens - 1]
    same(adapters.from_verl(mine, num_experts=experts.num_experts, layers=experts.layers), experts, versions=False)


@SETTINGS
@given(records())
def test_nemo_rl(experts):
    num_tokens = experts.start + experts.num_rows + 1
    rows = adapters.to_nemo_rl(experts, num_tokens=num_tokens)
    assert rows.dtype == np.int32
    assert rows.shape == (num_tokens, *experts.rows_RLK.shape[1:])
    assert nemo_rl_accepts(rows, experts.num_experts)
    for position, row in enumerate(rows):
        index = position - experts.start
        known = 0 <= index < experts.num_rows and not any(first <= index < last for first, last in experts.missing)
        assert np.array_equal(row, experts.rows_RLK[index]) if known else (row == -1).all()
    back = adapters.from_nemo_rl(rows, num_experts=experts.num_experts, layers=experts.layers)
    assert back.start == 0
    assert back.num_rows == num_tokens - 1
    assert np.array_equal(back.rows_RLK[back.known_R], experts.rows_RLK[experts.known_R])
    assert np.array_equal(np.flatnonzero(back.known_R), experts.start + np.flatnonzero(experts.known_R))


@SETTINGS
@given(whole_records(), st.booleans())
def test_prime_rl(case, sample):
    experts, num_tokens, num_layers = case
    if sample:
        experts, num_tokens = dataclasses.replace(experts, start=0), experts.num_rows + 1
    payload = adapters.to_prime_rl(experts, num_tokens=num_tokens, num_layers=num_layers, sample=sample)
    rows, start = prime_rl_reads(payload)
    assert start == experts.start
    if sample:
        assert payload["shape"][0] == num_tokens
        assert not rows[-1].any()
        rows = rows[:-1]
    assert np.array_equal(rows[:, list(experts.layers)], experts.rows_RLK)
    back = adapters.from_prime_rl(payload, num_tokens=num_tokens, num_experts=experts.num_experts, layers=experts.layers)
    same(back, experts, versions=False)


@SETTINGS
@given(whole_records())
def test_vllm(case):
    experts, _, num_layers = case
    text = adapters.to_vllm(experts, num_layers=num_layers)
    rows = vllm_client_reads(text)
    assert rows.dtype == (np.uint8 if experts.num_experts <= 256 else np.uint16)
    assert np.array_equal(rows[:, list(experts.layers)], experts.rows_RLK)
    told = {"num_experts": experts.num_experts, "start": experts.start, "layers": experts.layers}
    same(adapters.from_vllm(text, **told), experts, versions=False)


def example(**changes):
    rows = np.random.default_rng(0).random((5, 3, 16)).argsort(axis=-1)[..., :4].astype(np.uint8)
    return RoutedExperts(rows_RLK=rows, num_experts=16, **({"layers": (0, 1, 2)} | changes))


REFUSED = {
    "slime, missing": (lambda: adapters.to_slime(example(missing=((1, 3),)), num_tokens=6), r"missing \(1 to 3\), and slime"),
    "verl, missing": (lambda: adapters.to_verl(example(missing=((0, 1),)), num_tokens=6), "missing"),
    "prime-rl, missing": (lambda: adapters.to_prime_rl(example(missing=((4, 5),)), num_tokens=6), "missing"),
    "vLLM, missing": (lambda: adapters.to_vllm(example(missing=((4, 5),))), "missing"),
    "too few tokens": (lambda: adapters.to_slime(example(), num_tokens=5), "rows 0 to 5; for slime, 5 tokens must have rows up to 4"),
    "too many tokens": (lambda: adapters.to_nemo_rl(example(start=2), num_tokens=7), "rows 2 to 7"),
    "dense layers not told": (lambda: adapters.to_vllm(example(layers=(1, 2, 3))), "num_layers"),
    "too few layers": (lambda: adapters.to_slime(example(), num_tokens=6, num_layers=2), "layer 2"),
    "verl, from the middle": (lambda: adapters.to_verl(example(start=2), num_tokens=8), "starts at 2"),
    "prime-rl, a sample from the middle": (lambda: adapters.to_prime_rl(example(start=2), num_tokens=8, sample=True), "starts at 2"),
    "verl, no room": (lambda: pad([7]), "room for 6"),
    "verl, no prompt": (lambda: pad([0]), "prompt of 0"),
    "verl, not as many": (lambda: pad([1, 2]), "1 samples and 2"),
    "slime, a number too many": (lambda: slime(encode(example(), "int32"), num_tokens=7), "bytes"),
    "slime, not base64": (lambda: slime("?", num_tokens=6), "base64"),
    "slime, not text": (lambda: slime(None, num_tokens=6), "None"),
    "verl, padding taken for rows": (lambda: adapters.from_verl(np.zeros((2, 3, 4), np.int16), num_experts=16), "twice"),
    "verl, fractions": (lambda: adapters.from_verl(np.zeros((2, 3, 4)), num_experts=16), "float64"),
    "verl, flat": (lambda: adapters.from_verl(np.zeros((2, 12), np.int16), num_experts=16), "shape"),
    "verl, no such layer": (lambda: adapters.from_verl(example().rows_RLK, num_experts=16, layers=(0, 3)), "layers"),
    "NeMo-RL, half a sentinel": (lambda: adapters.from_nemo_rl(np.array([[[-1, 2]]]), num_experts=4), "-1"),
    "prime-rl, no dtype": (lambda: prime(dtype=None), "dtype"),
    "prime-rl, other dtype": (lambda: prime(dtype="int32"), "int32"),
    "prime-rl, flat shape": (lambda: prime(shape=[60]), "shape"),
    "prime-rl, other shape": (lambda: prime(shape=[5, 4, 4]), "bytes"),
    "prime-rl, negative start": (lambda: prime(start=-1), "start"),
    "prime-rl, other length": (lambda: prime(start=3), "rows from 3"),
    "vLLM, no npy": (lambda: adapters.from_vllm(base64.b64encode(b"PK").decode(), num_experts=16), "npy"),
}


def pad(prompt_lengths):
    return adapters.pad_verl([adapters.to_verl(example(), num_tokens=6)], prompt_lengths, prompt_width=6, response_width=4)


def slime(text, num_tokens):
    return adapters.from_slime(text, num_tokens=num_tokens, num_layers=3, top_k=4, num_experts=16)


def prime(**changes):
    payload = adapters.to_prime_rl(example(), num_tokens=6) | changes
    return adapters.from_prime_rl({name: value for name, value in payload.items() if value is not None}, num_tokens=6, num_experts=16)


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_refused(name):
    call, match = REFUSED[name]
    with pytest.raises(ValueError, match=match):
        call()


def test_int16_has_its_limits():
    wide = RoutedExperts(rows_RLK=np.zeros((1, 1, 1), np.uint16), num_experts=1 << 16, layers=(0,))
    with pytest.raises(ValueError, match="int16"):
        adapters.to_verl(wide, num_tokens=2)


def test_what_this_server_sends_as_int32_is_read():
    """Rows that it marks -1 come back as missing, and are then refused by those who have no mark."""
    experts = example(missing=((3, 5),))
    back = slime(encode(experts, "int32"), num_tokens=6)
    same(back, decode_int32(encode(experts, "int32"), num_layers=3, top_k=4, num_experts=16))
    assert back.missing == ((3, 5),)


def test_numpy_is_enough():
    program = "import sys; import pointsman.rl.adapters; assert not {'torch', 'msgspec', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)
