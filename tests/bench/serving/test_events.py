"""Server-sent events against the standard's own words, however the bytes are cut."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pointsman.bench.serving import events
from pointsman.bench.serving.events import EventReader
from tests.bench.serving.cuts import PLACES, pieces

LINE = st.sampled_from(
    [
        b"data: a",
        b"data:b",
        b"data:  two",
        b"data",
        b"data:",
        b": comment",
        b"event: x",
        b"id: 1",
        b"",
        b"",
        "data: é".encode(),
        b"datax: 1",
    ]
)
STREAM = st.lists(st.tuples(LINE, st.sampled_from([b"\n", b"\r\n", b"\r"])), max_size=20).map(
    lambda lines: b"".join(line + end for line, end in lines)
)


def specified(stream: bytes) -> list[bytes]:
    """All data of a whole stream, written down from the standard: split into lines, collect data, dispatch at empty lines."""
    found, data = [], []
    for line in re.split(rb"\r\n|\n|\r", stream)[:-1]:
        if not line:
            if data:
                found.append(b"\n".join(data))
            data = []
        elif line.startswith(b"data:"):
            value = line[len(b"data:") :]
            data.append(value[1:] if value.startswith(b" ") else value)
        elif line == b"data":
            data.append(b"")
    return found


@given(STREAM, PLACES)
def test_the_events_are_the_same_however_the_bytes_are_cut(stream, places):
    reader = EventReader()
    found = [event for piece in pieces(stream, places) for event in reader.feed(piece)]
    assert found == specified(stream)


def test_an_event_is_there_with_its_last_byte():
    reader = EventReader()
    assert reader.feed(b"data: 1\r\n\r") == [b"1"]
    assert reader.feed(b"\ndata: 2\n") == []
    assert reader.feed(b"\n") == [b"2"]


def test_a_byte_order_mark_is_no_content():
    assert EventReader().feed(b"\xef\xbb\xbfdata: 1\n\n") == [b"1"]


def test_an_event_without_end_is_refused(monkeypatch):
    monkeypatch.setattr(events, "MAX_EVENT", 100)
    reader = EventReader()
    with pytest.raises(ValueError, match="more than 100 bytes"):
        for _ in range(20):
            reader.feed(b"data: aaaa"[:10])
