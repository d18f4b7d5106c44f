"""The benchmarks run and count what is there; what they say of this machine is not tested."""

import json
from types import SimpleNamespace

import pytest

from benchmarks import load_client, streaming, structured

STREAMS, STEPS = 3, 40


def test_streams_are_counted_to_the_last_token(monkeypatch):
    """`read_all` checks the events and the end of each stream itself."""
    monkeypatch.setattr(streaming, "WARM_STEPS", STEPS)
    run = streaming.served(0.005, STREAMS, STEPS, busy=False)
    assert 0 < run.rate <= STREAMS / 0.005
    assert set(run.cores) == {"server", "engine", "client"}


@pytest.mark.parametrize("busy", [False, True])
def test_the_stub_alone_is_as_fast_as_its_steps(busy):
    assert 0 < streaming.alone(0.002, STREAMS, STEPS, busy=busy) <= STREAMS / 0.002


def test_time_is_told_by_part(tmp_path):
    path = tmp_path / "parts.json"
    prelude = f"from benchmarks.sampled import sample_into; sample_into({str(path)!r}, {streaming.PARTS!r}); "
    with streaming.server(streaming.program(0.002, busy=False), STREAMS, prelude) as (process, port):
        streaming.read_all(port, STREAMS, 200, {"server": process.pid})
    shares = json.loads(path.read_text())
    assert set(shares) <= {*streaming.PARTS.values(), "other"}
    assert sum(shares.values()) == pytest.approx(1)


def test_a_large_vocabulary_has_no_token_twice():
    tokens, total, eos_ids = structured.vocabulary(5000)
    small, _, _ = structured.vocabulary(None)
    assert total == len(tokens) == 5000 and tokens[: len(small)] == small
    added = tokens[len(small) :]
    assert len(set(added)) == len(added) and not set(added) & set(small) and eos_ids


def test_the_stub_of_the_load_client_sees_a_request_behind_the_body_of_the_one_before(monkeypatch):
    monkeypatch.setattr(load_client.Stub, "streams", [], raising=False)
    written = []
    stub = load_client.Stub()
    stub.connection_made(SimpleNamespace(write=written.append))
    for data in (b"POST /v1/completions HTTP/1.1\r\n\r\n", b'{"prompt":"x"}POST /v1/completions HTTP/1.1\r\n\r\n', b'{"prompt":"x"}'):
        stub.data_received(data)
    assert written == [load_client.HEAD] * 2 and len(load_client.Stub.streams) == 2
