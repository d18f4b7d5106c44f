"""Messages between ranks: what is sent is what arrives, and nothing else gets in."""

from __future__ import annotations

import random
import socket
import threading

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pointsman.config import engine_config
from pointsman.engine import orders
from pointsman.engine.channel import Channel
from pointsman.engine.orders import SIZE, Run, decode_order, decode_reply, encode
from pointsman.request import Replay, SamplingParams
from pointsman.step import LaneStart, Segment, StepPlan
from pointsman.update import Update

IDS = st.integers(0, 2**31 - 1)
TOKENS = st.lists(st.integers(0, 200_063), max_size=6).map(tuple)
SAMPLING = st.builds(
    SamplingParams,
    seed=st.none() | st.integers(-(2**63), 2**64 - 1),
    temperature=st.floats(0, 100),
    logit_bias=st.dictionaries(st.integers(0, 200_063), st.floats(-100, 100), max_size=3),
    stop=st.lists(st.text(min_size=1), max_size=3).map(tuple),
    prompt_logprobs=st.none() | st.integers(0, 64),
)
REPLAYS = st.binary(min_size=6, max_size=6).map(lambda data: Replay(start=3, shape=(1, 3, 2), data=data))
STARTS = st.builds(LaneStart, IDS, IDS, TOKENS, TOKENS, SAMPLING, st.integers(0, 2**64 - 1), st.lists(REPLAYS, max_size=2).map(tuple))
SEGMENTS = st.builds(Segment, IDS, IDS, IDS, TOKENS, TOKENS, st.booleans(), st.booleans())
GROWTHS = st.lists(st.tuples(IDS, IDS), max_size=3).map(tuple)
PLANS = st.builds(StepPlan, IDS, st.lists(STARTS, max_size=2).map(tuple), TOKENS, GROWTHS, st.lists(SEGMENTS, max_size=4).map(tuple))
TAGS = st.lists(st.sampled_from(["weights", "kv_cache"]), max_size=2)
UPDATES = st.builds(Update, begin=st.booleans(), quantize=st.booleans(), weight_version=st.none() | st.text(min_size=1, max_size=256))
WORK = st.one_of(
    st.builds(orders.FromDisk, st.text()),
    st.builds(orders.FromFiles, st.lists(st.binary(), max_size=2), UPDATES),
    st.builds(
        orders.FromGroup,
        st.text(),
        st.lists(st.tuples(st.text(), st.text(), st.lists(st.integers(0, 1 << 40), max_size=3).map(tuple)), max_size=2),
        UPDATES,
    ),
    st.builds(orders.FromBefore, TAGS),
    st.builds(orders.JoinGroup, st.text(), st.integers(1, 65535), IDS, IDS, st.text(), st.text(), st.floats(0, 1e6)),
    st.builds(orders.LeaveGroup, st.text()),
)
ORDERS = st.one_of(
    st.builds(Run, PLANS),
    st.builds(orders.Stage, IDS, WORK),
    st.builds(orders.Complete, IDS),
    st.builds(orders.Enter, st.text()),
    st.just(orders.Forget()),
    st.builds(orders.Release, IDS, TAGS),
    st.just(orders.Leave()),
)
REPLIES = st.one_of(
    st.just(orders.Here()),
    st.just(orders.Joined()),
    st.just(orders.Sign()),
    st.builds(orders.Answer, IDS, st.none() | st.text(), st.booleans()),
    st.builds(orders.Fault, st.text(), st.booleans(), st.booleans()),
)
JOIN = orders.Join(
    engine=engine_config(model_path="x", tp=2, dtype="float32"),
    rank=1,
    address="127.0.0.1",
    port=5000,
    token="secret",
    device="cuda:1",
    timeout=9.5,
    log_level="INFO",
)


@settings(deadline=None, max_examples=200)
@given(order=ORDERS, reply=REPLIES)
def test_what_is_sent_arrives(order: orders.Order, reply: orders.Reply) -> None:
    assert decode_order(encode(order)[SIZE.size :]) == order
    assert decode_reply(encode(reply)[SIZE.size :]) == reply


def test_the_configuration_arrives() -> None:
    assert decode_order(encode(JOIN)[SIZE.size :]) == JOIN


@settings(deadline=None, max_examples=200)
@given(data=st.binary(max_size=64))
def test_what_is_no_message_is_refused(data: bytes) -> None:
    """Random bytes are, now and then, a message without fields; those say what they are again when they are written anew."""
    for decode in (decode_order, decode_reply):
        try:
            message = decode(data)
        except ValueError as error:
            assert "no message" in str(error)
        else:
            assert decode(encode(message)[SIZE.size :]) == message


@pytest.mark.parametrize(
    "change",
    [{"rank": 0}, {"rank": 1024}, {"port": 0}, {"port": 70000}, {"device": "/dev/null"}, {"timeout": 0.0}, {"timeout": float("inf")}],
)
def test_values_out_of_bounds_are_refused(change: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="no message"):
        decode_order(encode(msgspec.structs.replace(JOIN, **change))[SIZE.size :])


def test_a_cut_message_is_refused() -> None:
    data = encode(Run(StepPlan(1, (), (5,), ((5, 6),), (Segment(0, 1, 2, (3, 4), (4,), True),))))[SIZE.size :]
    for end in range(len(data)):
        with pytest.raises(ValueError, match="no message"):
            decode_order(data[:end])
    with pytest.raises(ValueError, match="no message"):
        decode_order(data + b"\x00")


def test_messages_arrive_however_they_are_cut() -> None:
    near, far = socket.socketpair()
    channel, rng = Channel(far, most=1 << 20), random.Random(1)
    messages = [orders.Stage(number, orders.FromFiles([rng.randbytes(number * 977 % 200_000)], Update())) for number in range(64)]
    data = b"".join(map(encode, messages))

    def write() -> None:
        at = 0
        while at < len(data):
            at += near.send(data[at : at + rng.choice([1, 3, 4, 5, 4096, 1 << 17])])
        near.close()

    writer = threading.Thread(target=write)
    writer.start()
    assert [decode_order(channel.receive()) for _ in messages] == messages
    writer.join()
    with pytest.raises(EOFError):
        channel.receive()
    channel.close()


def test_a_message_that_is_too_long_is_not_read() -> None:
    near, far = socket.socketpair()
    with near:
        channel = Channel(far, most=100)
        near.sendall(SIZE.pack(101))
        with pytest.raises(ValueError, match="a message of 101 bytes; the longest is 100"):
            channel.receive()
        channel.close()
