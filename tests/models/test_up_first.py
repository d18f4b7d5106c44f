"""Experts whose runner wants up before gate are loaded so: nothing is held twice, and updates find their places."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pointsman.models.decoder import Decoder
from pointsman.models.loader import load_model, rows_for
from pointsman.models.revision import Revision
from pointsman.moe.candidates import RUNNERS
from pointsman.moe.flashinfer import RoutedTrtllmRunner
from tests.models.checkpoints import Harness, Shape, write
from tests.moe.libraries.flashinfer import VERSIONS, Emulation

SHAPE = Shape(heads=4, kv_heads=2, head_dim=32, rotary_dim=16, hidden=256, width=128, experts=8, block=(128, 128))
CPU = torch.device("cpu")


@pytest.fixture(params=["flashinfer_trtllm_routed", "flashinfer_trtllm", "flashinfer_cutlass"])
def runner(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    Emulation(VERSIONS[-1], exact=True).install(monkeypatch)
    monkeypatch.setitem(RUNNERS, request.param, lambda *what: None)
    name: str = request.param
    return name


def load(folder: Path, runner: str, **options: str) -> Decoder:
    return load_model(folder, moe_backend=runner, dtype="bfloat16", linear_backend="reference", progress=False, **options)


def logits(decoder: Decoder) -> Tensor:
    return Harness(decoder).step({0: [5, 9, 33, 21, 60, 2]})[0]


@pytest.mark.parametrize("options", [{}, {"load_format": "dummy"}], ids=["files", "dummy"])
def test_nothing_is_copied_and_nothing_changes(runner: str, options: dict[str, str], tmp_path: Path) -> None:
    folder = SHAPE.write(tmp_path)
    decoder = load(folder, runner, **options)
    plain = load_model(folder, dtype="bfloat16", moe_backend="reference", linear_backend="reference", progress=False, **options)
    # the same runner over weights in the usual order, of which it makes its own
    copying = type(decoder.backends.moe)()
    other = Decoder(plain.shard, plain.parameters, dataclasses.replace(decoder.backends, moe=copying), decoder.dtype)
    assert torch.equal(logits(decoder), logits(other))
    for mine, theirs in zip(decoder.layers, other.layers, strict=True):
        assert mine.moe is not None and theirs.moe is not None
        numbers = [ready.up_gate if hasattr(ready := layer.moe.prepare(), "up_gate") else ready.gate_up.data for layer in (mine, theirs)]
        assert numbers[0].data_ptr() == mine.moe.weights.gate_up.data.data_ptr()
        assert numbers[1].data_ptr() != theirs.moe.weights.gate_up.data.data_ptr()
        assert torch.equal(*(part.view(torch.uint8) for part in numbers))


def test_an_update_of_some_finds_their_places(runner: str, tmp_path: Path) -> None:
    decoder, tensors = load(SHAPE.write(tmp_path / "old"), runner), SHAPE.tensors(seed=7)
    some = {name: tensor for name, tensor in tensors.items() if ".experts.3.w1" in name or ".experts.5." in name}
    revision = Revision(decoder.shard, rows_for(decoder.backends.moe, decoder.architecture))
    revision.add(some)
    updated = Decoder(decoder.shard, revision.apply(decoder.parameters, CPU), decoder.backends, decoder.dtype)
    write(tmp_path / "new", SHAPE.config(), SHAPE.tensors() | some)
    assert torch.equal(logits(updated), logits(load(tmp_path / "new", runner)))
    assert not torch.equal(logits(updated), logits(decoder))


def test_a_runner_made_by_hand_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    Emulation(VERSIONS[-1]).install(monkeypatch)
    assert not RoutedTrtllmRunner().up_first and RoutedTrtllmRunner(up_first=True).up_first
