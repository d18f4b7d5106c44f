"""Answers in HTTP however they are cut, and the client against servers that misbehave."""

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pointsman.bench.serving.http import AnswerReader, BrokenAnswer, HttpClient, Origin
from tests.bench.serving.cuts import PLACES, pieces
from tests.bench.serving.stub_server import json_answer, running, stream_answer

BODY = st.binary(max_size=60)
EARLY = st.sampled_from([b"", b"HTTP/1.1 100 Continue\r\n\r\n"])


def chunked(parts: list[bytes]) -> bytes:
    chunks = b"".join(b"%X;note=1\r\n%s\r\n" % (len(part), part) for part in parts if part)
    return chunks + b"0\r\nTrailer: x\r\n\r\n"


@st.composite
def answers(draw):
    """The bytes of an answer, its status and its body."""
    status, parts = draw(st.sampled_from([200, 404, 500])), draw(st.lists(BODY, max_size=4))
    body = b"".join(parts)
    head = b"HTTP/1.1 %d Some reason\r\nX-One:  a b \r\n" % status
    if draw(st.booleans()):
        data = head + b"Transfer-Encoding: chunked\r\n\r\n" + chunked(parts)
    else:
        data = head + b"content-length: %d\r\n\r\n" % len(body) + body
    return draw(EARLY) + data, status, body


@given(answers(), PLACES)
def test_an_answer_is_the_same_however_it_is_cut(answer, places):
    data, status, body = answer
    reader = AnswerReader()
    found = b""
    for piece in pieces(data, places):
        assert not reader.done or not piece
        found += reader.feed(piece)
    assert (reader.status, found, reader.headers["x-one"]) == (status, body, "a b")
    assert reader.done and reader.keeps_connection


@given(answers(), st.integers(0, 1 << 12))
def test_an_answer_that_is_cut_short_is_told(answer, place):
    data, _, _ = answer
    reader = AnswerReader()
    reader.feed(data[: place % len(data)])
    with pytest.raises(BrokenAnswer, match="in the middle of its answer"):
        reader.end()


@given(st.binary(max_size=200), PLACES)
def test_rubbish_is_refused_or_waited_on(data, places):
    reader = AnswerReader()
    try:
        for piece in pieces(data, places):
            reader.feed(piece)
    except BrokenAnswer as error:
        assert str(error)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"SSH-2.0-x\r\n\r\n", "'SSH-2.0-x' is no answer in HTTP/1.1"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n", "Content-Length of the answer is '-1'"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", "the size of a chunk is b'zz'"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n-2\r\n", "the size of a chunk is b'-2'"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nabc", "longer than it says"),
        (b"HTTP/1.1 200 OK\r\nX: " + b"y" * (1 << 17), "the head of the answer has more than"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + b"1" * (1 << 13), "a line of the answer has more than"),
    ],
)
def test_what_is_no_http_is_named(data, message):
    with pytest.raises(BrokenAnswer) as caught:
        AnswerReader().feed(data)
    assert message in str(caught.value)


def test_a_body_without_a_length_ends_with_the_connection():
    reader = AnswerReader()
    assert reader.feed(b"HTTP/1.0 200 OK\r\n\r\nabc") == b"abc"
    assert not reader.done
    reader.end()
    assert reader.done


@pytest.mark.parametrize(
    ("url", "origin"),
    [
        ("http://a:80", Origin("a", 80)),
        ("https://a.b/v/", Origin("a.b", 443, True, "/v")),
        ("http://[::1]:8/x", Origin("::1", 8, False, "/x")),
    ],
)
def test_addresses(url, origin):
    assert Origin.parse(url) == origin
    assert Origin.parse(str(origin)) == origin


@pytest.mark.parametrize("url", ["a:80", "ftp://a", "http://", "http://a:b", "http://u@a", "http://a?x", "http://a:99999"])
def test_what_is_no_address_is_refused(url):
    with pytest.raises(ValueError, match="is not an address"):
        Origin.parse(url)


def test_every_address_of_a_server_is_this_machine_for_a_client():
    assert Origin.of("0.0.0.0", 1).name == "127.0.0.1:1"
    assert Origin.of("::", 1).name == "[::1]:1"


def test_a_header_that_cannot_be_is_refused():
    with pytest.raises(ValueError, match="header 'X'"):
        HttpClient(Origin("a", 1), {"X": "a\r\nY: b"})


def ask(port, *paths, **headers):
    async def go():
        client = HttpClient(Origin("127.0.0.1", port), headers)
        taken = []
        try:
            return [await client.post(path, b"{}", taken.append) for path in paths], taken
        finally:
            client.close()

    return asyncio.run(go())


def test_pieces_of_a_success_are_handed_over_and_a_failure_is_kept():
    with running({"/a": stream_answer([b"one", b"two"], wait=0.01), "/b": json_answer({"x": 1}, "400 Bad Request")}) as stub:
        (first, second), taken = ask(stub.port, "/a", "/b", Authorization="Bearer k")
    assert (first.status, first.body, b"".join(taken)) == (200, b"", b"onetwo")
    assert (second.status, second.body) == (400, b'{"x": 1}')
    assert "Authorization: Bearer k" in stub.asked[0][2]


def test_a_connection_that_was_closed_while_idle_is_no_fault():
    with running({"/a": [*json_answer({}), (0, None)]}) as stub:
        (first, second), _ = ask(stub.port, "/a", "/a")
    assert (first.status, second.status) == (200, 200)


@pytest.mark.parametrize("answer", [[(0, None)], [(0, b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nab"), (0, None)]])
def test_a_server_that_hangs_up_is_told(answer):
    with running({"/a": answer}) as stub, pytest.raises(BrokenAnswer, match="closed the connection in the middle"):
        ask(stub.port, "/a")
