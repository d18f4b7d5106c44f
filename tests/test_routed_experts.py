"""The routing record: what is encoded comes back, and what is wrong is named."""

from __future__ import annotations

import base64
import io
import json
import subprocess
import sys
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pointsman.routed_experts import RoutedExperts, decode_int32, decode_npy, decode_record, encode, fill_missing


@st.composite
def ranges(draw, num_rows):
    """Half-open ranges that ascend and do not touch."""
    bounds = sorted(draw(st.sets(st.integers(0, num_rows), max_size=6)))
    return tuple(zip(bounds[::2], bounds[1::2], strict=False))


@st.composite
def records(draw):
    num_experts = draw(st.sampled_from([1, 4, 16, 256, 257, 1000]))
    top_k = draw(st.integers(1, min(num_experts, 8)))
    num_rows, num_layers = draw(st.integers(0, 9)), draw(st.integers(1, 4))
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    rows = random.random((num_rows, num_layers, num_experts)).argsort(axis=-1)[..., :top_k]
    rows = rows.astype(np.uint8 if num_experts <= 256 else np.uint16)
    missing = draw(ranges(num_rows))
    fill_missing(rows, missing)
    layers = tuple(sorted(draw(st.sets(st.integers(0, 99), min_size=num_layers, max_size=num_layers))))
    versions = tuple((*part, draw(st.text(max_size=5))) for part in draw(ranges(num_rows)))
    return RoutedExperts(
        rows_RLK=rows,
        num_experts=num_experts,
        start=draw(st.integers(0, 1000)),
        layers=layers,
        missing=missing,
        weight_versions=versions,
    )


def same(left, right, *, versions=True):
    assert left.rows_RLK.dtype == right.rows_RLK.dtype and np.array_equal(left.rows_RLK, right.rows_RLK)
    names = ["num_experts", "start", "layers", "missing"] + ["weight_versions"] * versions
    assert [getattr(left, name) for name in names] == [getattr(right, name) for name in names]


SETTINGS = settings(deadline=None, max_examples=100)


@SETTINGS
@given(records())
def test_a_record_comes_back_through_json(experts):
    same(decode_record(json.loads(json.dumps(encode(experts)))), experts)


@SETTINGS
@given(records())
def test_the_other_forms_come_back_with_what_they_do_not_tell(experts):
    _, num_layers, top_k = experts.rows_RLK.shape
    told = {"num_experts": experts.num_experts, "start": experts.start, "layers": experts.layers}
    same(decode_npy(encode(experts, "npy"), **told), experts, versions=False)
    same(decode_int32(encode(experts, "int32"), num_layers=num_layers, top_k=top_k, **told), experts, versions=False)


def example(num_experts=16, rows=5, **changes):
    random = np.random.default_rng(0)
    chosen = random.random((rows, 3, num_experts)).argsort(axis=-1)[..., :4]
    values = {"num_experts": num_experts, "layers": (0, 1, 2), "weight_versions": ((0, rows, "0"),)} | changes
    return RoutedExperts(rows_RLK=chosen.astype(np.uint8 if num_experts <= 256 else np.uint16), **values)


@pytest.mark.parametrize("num_experts", [16, 300])
def test_a_record_is_what_the_contract_says(num_experts):
    """Read by hand, without this package."""
    experts = example(num_experts, start=7, missing=((1, 2),))
    record = encode(experts)
    data = base64.b64decode(record.pop("data"))
    assert record == {
        "version": 1,
        "dtype": "uint8" if num_experts == 16 else "uint16",
        "shape": [5, 3, 4],
        "start": 7,
        "num_experts": num_experts,
        "layers": [0, 1, 2],
        "missing": [[1, 2]],
        "weight_versions": [[0, 5, "0"]],
        "crc32": zlib.crc32(data),
    }
    little_endian = "<u1" if num_experts == 16 else "<u2"
    assert np.array_equal(np.frombuffer(data, little_endian).reshape(5, 3, 4), experts.rows_RLK)


def test_int32_is_flat_and_little_endian_and_npy_is_a_file(tmp_path):
    experts = example(missing=((4, 5),))
    expected = experts.rows_RLK.astype(np.int32)
    expected[4] = -1
    assert np.array_equal(np.frombuffer(base64.b64decode(encode(experts, "int32")), "<i4").reshape(5, 3, 4), expected)
    for name, each, dtype in (("whole", example(), np.uint8), ("holes", experts, np.int16)):
        path = tmp_path / f"{name}.npy"
        path.write_bytes(base64.b64decode(encode(each, "npy")))
        rows = np.load(path, allow_pickle=False)
        assert rows.dtype == dtype
        assert np.array_equal(rows, each.rows_RLK if name == "whole" else expected)


def test_every_damaged_byte_is_noticed():
    experts = example(256)
    record, data = encode(experts), experts.rows_RLK.tobytes()
    for place in range(len(data)):
        for flipped in (1, 128, 255):
            damaged = bytearray(data)
            damaged[place] ^= flipped
            with pytest.raises(ValueError, match="crc32"):
                decode_record(record | {"data": base64.b64encode(damaged).decode()})


@SETTINGS
@given(records(), st.data())
def test_every_damaged_character_is_noticed(experts, data):
    record = encode(experts)
    text = record["data"]
    if not text:
        return
    place = data.draw(st.integers(0, len(text) - 1))
    character = data.draw(st.characters(max_codepoint=127).filter(lambda drawn: drawn != text[place]))
    with pytest.raises(ValueError, match=r"crc32|data"):
        decode_record(record | {"data": text[:place] + character + text[place + 1 :]})


def with_crc(data):
    return {"data": base64.b64encode(data).decode(), "crc32": zlib.crc32(data)}


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("version", {"version": 2}),
        ("version", {"version": None}),
        ("version", {"version": True}),
        ("dtype", {"dtype": "uint16"}),
        ("dtype", {"dtype": "object"}),
        ("dtype", {"num_experts": 300}),
        ("shape", {"shape": [5, 3]}),
        ("shape", {"shape": "5,3,4"}),
        ("shape", {"shape": [-5, 3, 4]}),
        ("shape", {"shape": [5, 3, True]}),
        ("shape", {"shape": [5.0, 3, 4]}),
        ("shape", {"shape": [5, 3, 17]}),
        ("shape", {"shape": [1 << 40, 3, 4]}),
        ("data", {"shape": [1 << 22, 1 << 10, 4]}),
        ("data", {"shape": [4, 3, 4]}),
        ("start", {"start": -1}),
        ("start", {"start": "0"}),
        ("num_experts", {"num_experts": 0}),
        ("num_experts", {"num_experts": 1 << 17}),
        ("num_experts", {"num_experts": True}),
        ("layers", {"layers": [0, 1]}),
        ("layers", {"layers": [0, 2, 1]}),
        ("layers", {"layers": [0, 1, 1]}),
        ("layers", {"layers": None}),
        ("missing", {"missing": [[1]]}),
        ("missing", {"missing": [[2, 2]]}),
        ("missing", {"missing": [[0, 2], [1, 3]]}),
        ("missing", {"missing": [[4, 6]]}),
        ("missing", {"missing": [3]}),
        ("missing", {"missing": [[False, True]]}),
        ("weight_versions", {"weight_versions": [[0, 5]]}),
        ("weight_versions", {"weight_versions": [[0, 5, 1]]}),
        ("weight_versions", {"weight_versions": [[0, 6, "a"]]}),
        ("weight_versions", {"weight_versions": [[0, 5, "a" * 300]]}),
        ("crc32", {"crc32": 1}),
        ("crc32", {"crc32": "1"}),
        ("crc32", {"crc32": 1 << 32}),
        ("data", {"data": None}),
        ("data", {"data": "????"}),
        ("data", {"data": "AAAA"}),
        ("data", {"data": "A" * 100000}),
        ("data", {"data": "ä" * 80}),
        ("data", with_crc(bytes(60))),
        ("data", with_crc(bytes(range(60)))),
        ("surprise", {"surprise": 1}),
    ],
)
def test_what_is_wrong_is_named(name, changes):
    with pytest.raises(ValueError, match=name):
        decode_record(encode(example()) | changes)


@pytest.mark.parametrize("name", encode(example()))
def test_what_is_missing_is_named(name):
    record = encode(example())
    del record[name]
    with pytest.raises(ValueError, match=name):
        decode_record(record)


@pytest.mark.parametrize("record", [None, [], "record", 1])
def test_a_record_is_an_object(record):
    with pytest.raises(ValueError, match="object"):
        decode_record(record)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 1 << 40) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)


@settings(deadline=None, max_examples=300)
@given(st.data())
def test_no_value_of_a_field_does_more_than_raise(data):
    record = encode(example())
    record[data.draw(st.sampled_from(sorted(record)))] = data.draw(JSON)
    try:
        decode_record(record).check_ids()
    except ValueError:
        pass


def test_a_twice_chosen_expert_is_found_where_it_is():
    experts = example(start=10, missing=((0, 1),))
    experts.rows_RLK[2, 1] = [3, 9, 3, 0]
    with pytest.raises(ValueError, match="expert 3 twice in layer 1 of position 12"):
        experts.check_ids()
    experts.rows_RLK[2, 1] = [3, 9, 16, 0]
    with pytest.raises(ValueError, match="expert 16; ids go from 0 to 15"):
        experts.check_ids()


def test_what_stands_in_missing_rows_does_not_matter():
    rows = np.full((2, 1, 2), 99, np.uint8)
    rows[1] = [0, 1]
    RoutedExperts(rows_RLK=rows, num_experts=4, layers=(0,), missing=((0, 1),)).check_ids()


def npy(array):
    return encode_bytes(lambda file: np.save(file, array, allow_pickle=array.dtype == object))


def encode_bytes(write):
    file = io.BytesIO()
    write(file)
    return base64.b64encode(file.getvalue()).decode()


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("dtype", npy(np.zeros((2, 3, 4), object))),
        ("dtype", npy(np.zeros((2, 3, 4), np.int64))),
        ("dtype", npy(np.zeros((2, 3, 4), ">u2"))),
        ("shape", npy(np.zeros((2, 12), np.uint8))),
        ("Fortran", npy(np.asfortranarray(np.zeros((2, 3, 4), np.uint8)))),
        ("npy", base64.b64encode(b"PK\3\4" + bytes(40)).decode()),
        ("npy", base64.b64encode(b"\x93NUMPY\1\0\5\0abcde").decode()),
        ("npy", encode_bytes(lambda file: np.savez(file, a=np.zeros(3)))),
        ("npy", "AAA"),
        ("data", npy(np.zeros((2, 3, 4), np.uint8))),
        ("data", npy(np.full((2, 3, 4), 99, np.uint8))),
        ("data", npy(np.full((2, 3, 4), -2, np.int16))),
        ("bytes", base64.b64encode(base64.b64decode(npy(np.zeros((2, 3, 4), np.uint8)))[:-1]).decode()),
    ],
)
def test_a_bad_npy_is_refused(name, text):
    with pytest.raises(ValueError, match=name):
        decode_npy(text, num_experts=16)


def test_a_huge_npy_takes_no_memory():
    header = str({"descr": "|u1", "fortran_order": False, "shape": (4000000, 1000, 4)}).encode()
    with pytest.raises(ValueError, match="bytes"):
        decode_npy(base64.b64encode(b"\x93NUMPY\1\0" + len(header).to_bytes(2, "little") + header).decode(), num_experts=16)


@pytest.mark.parametrize(("name", "numbers"), [("bytes", [0] * 11), ("expert -1", [-1] * 11 + [0]), ("expert 16", [16] * 12)])
def test_a_bad_int32_is_refused(name, numbers):
    text = base64.b64encode(np.array(numbers, "<i4").tobytes()).decode()
    with pytest.raises(ValueError, match=name):
        decode_int32(text, num_layers=3, top_k=4, num_experts=16)


def test_a_format_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match="record, npy, int32"):
        encode(example(), "parquet")


def test_a_long_record_is_one_text_in_base64():
    experts = RoutedExperts(rows_RLK=np.zeros((1 << 21, 1, 1), np.uint8), num_experts=256, layers=(0,))
    assert encode(experts)["data"] == base64.b64encode(bytes(1 << 21)).decode()


def test_it_needs_numpy_and_nothing_else():
    source = "import sys, pointsman.routed_experts; print([name for name in ('torch', 'msgspec', 'numba') if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=True).stdout.strip() == "[]"
