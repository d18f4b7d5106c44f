"""Messages between the two processes: what is sent is what arrives, and nothing else gets in."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import msgspec
import numpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pointsman.config import engine_config
from pointsman.request import ChoiceDelta, FinishReason, Logprob, Request, SamplingParams
from pointsman.server import wire
from pointsman.server.launch import EngineProcess

TOKENS = st.integers(0, 200_063)
LOGPROBS = st.dictionaries(TOKENS, st.builds(Logprob, st.floats(-1e4, 0), st.integers(1, 99), st.none() | st.text()), max_size=3)
SAMPLING = st.builds(
    SamplingParams,
    n=st.integers(1, 128),
    seed=st.none() | st.integers(-(2**63), 2**64 - 1),
    temperature=st.floats(0, 100),
    logit_bias=st.dictionaries(TOKENS, st.floats(-100, 100), max_size=3),
    stop=st.lists(st.text(min_size=1), max_size=3).map(tuple),
    stop_token_ids=st.lists(TOKENS, max_size=3).map(tuple),
)
DELTAS = st.builds(
    ChoiceDelta,
    rid=st.text(),
    index=st.integers(0, 127),
    text=st.text(),
    token_ids=st.lists(TOKENS, max_size=3),
    logprobs=st.none() | st.lists(LOGPROBS, max_size=3),
    prompt_logprobs=st.none() | st.lists(st.none() | LOGPROBS, max_size=3),
    finish_reason=st.none() | st.sampled_from(FinishReason),
    stop_reason=st.none() | TOKENS | st.text(),
    error=st.none() | st.text(),
)


@settings(deadline=None, max_examples=100)
@given(rid=st.text(), tokens=st.lists(TOKENS, min_size=1).map(tuple), sampling=SAMPLING, salt=st.text())
def test_requests_arrive_unchanged(rid: str, tokens: tuple[int, ...], sampling: SamplingParams, salt: str) -> None:
    message = wire.Submit(Request(rid=rid, prompt_token_ids=tokens, sampling=sampling, cache_salt=salt))
    assert wire.decode_to_engine(wire.encode(message)) == message


@settings(deadline=None, max_examples=100)
@given(deltas=st.lists(DELTAS, max_size=3))
def test_deltas_arrive_unchanged(deltas: list[ChoiceDelta]) -> None:
    message = wire.Deltas(deltas)
    assert wire.decode_from_engine(wire.encode(message)) == message


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int32"])
def test_arrays_arrive_as_bytes(dtype: str) -> None:
    rows = numpy.arange(24, dtype=dtype).reshape(2, 3, 4).transpose(1, 0, 2)
    message = wire.decode_from_engine(wire.encode(wire.Deltas([ChoiceDelta(rid="a", index=0, routed_experts=rows)])))
    assert isinstance(message, wire.Deltas)
    array = message.deltas[0].routed_experts
    assert isinstance(array, wire.Array)
    assert numpy.array_equal(numpy.frombuffer(array.data, array.dtype).reshape(array.shape), rows)


def test_what_is_no_message_is_refused() -> None:
    for data in (b"", b"\xc1", msgspec.msgpack.encode({"type": "Exec"}), wire.encode(wire.Failed("x"))):
        with pytest.raises(msgspec.MsgspecError):
            wire.decode_to_engine(data)
    with pytest.raises(NotImplementedError):
        wire.encode(wire.Deltas([ChoiceDelta(rid="a", index=0, routed_experts=object())]))


def test_the_engine_side_reads_what_is_there_and_ends_with_its_parent(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    engine, server = wire.EngineEnd(str(tmp_path), reading), wire.ServerEnd(str(tmp_path))
    try:
        assert engine.receive(wait=False) == []
        for number in range(2000):
            server.send(wire.Abort(str(number)))
        messages: list[wire.ToEngine] = []
        while len(messages) < 2000:
            messages += engine.receive(wait=True)
        assert messages == [wire.Abort(str(number)) for number in range(2000)]
        os.close(writing)
        with pytest.raises(EOFError):
            engine.receive(wait=True)
    finally:
        engine.close()
        server.close()
        os.close(reading)


def test_sockets_are_in_a_directory_of_this_user_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    process = EngineProcess(engine_config(), log_level="info", program="sys.stdin.read()")
    [directory] = tmp_path.iterdir()
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    process.stop()
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / ("x" * 100)))
    (tmp_path / ("x" * 100)).mkdir()
    with pytest.raises(ValueError, match="TMPDIR"):
        EngineProcess(engine_config(), log_level="info")
    assert list((tmp_path / ("x" * 100)).iterdir()) == []


def test_the_engine_looks_for_modules_where_the_server_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "json.py").write_text("raise SystemExit('the working directory was searched')")
    process = EngineProcess(engine_config(), log_level="info", program="import json; sys.exit(3)")
    assert process.wait() == 3
    process.stop()
