"""FlashInfer's kernels are timed once, on what the model's own router does, and all ranks take what the first one found."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pointsman import LLM, SamplingParams, tiny
from pointsman.config import engine_config
from pointsman.engine.device_options import check_options
from pointsman.engine.tuning import tune_experts
from pointsman.models import backends
from pointsman.models.decoder import Decoder
from pointsman.models.loader import load_model
from pointsman.moe.flashinfer import RoutedTrtllmRunner, TrtllmRunner
from tests.moe.libraries.flashinfer import VERSIONS, Emulation

pytestmark = pytest.mark.skipif(not list(tiny.path().glob("*.safetensors")), reason="the bundled checkpoint is not there")
CONFIG = engine_config(chunked_prefill_size=48)


class Line:
    """A mesh whose ranks are asked one after the other: what the first broadcasts, the others find."""

    def __init__(self, rank: int, size: int, sent: list[torch.Tensor]) -> None:
        self.rank, self.size, self.device = rank, size, torch.device("cpu")
        self._sent, self._next = sent, 0

    def broadcast(self, tensor: torch.Tensor) -> torch.Tensor:
        if self.rank == 0:
            self._sent.append(tensor.clone())
            return tensor
        self._next += 1
        assert tensor.shape == self._sent[self._next - 1].shape and tensor.dtype == self._sent[self._next - 1].dtype
        return tensor.copy_(self._sent[self._next - 1])


def model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, runner: type, version: str) -> tuple[Emulation, Decoder]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    emulation = Emulation(version).install(monkeypatch)
    monkeypatch.setattr(backends, "make_runner", lambda name, **options: runner())
    return emulation, load_model(str(tiny.path()), progress=False)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("runner", [TrtllmRunner, RoutedTrtllmRunner])
def test_the_first_rank_times_and_others_take_its_file(runner: type, version: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    emulation, decoder = model(monkeypatch, tmp_path, runner, version)
    sent: list[torch.Tensor] = []
    for rank in range(3):
        tune_experts(CONFIG, Line(rank, 3, sent), decoder)  # type: ignore[arg-type]
    assert [tuning["tune_mode"] for tuning in emulation.tunings] == [True, False, False]
    assert [tuning["calls"] for tuning in emulation.tunings] == [1, 1, 1]
    files = [Path(tuning["cache"]) for tuning in emulation.tunings]
    assert len(set(files)) == 3 and len({file.read_bytes() for file in files}) == 1
    assert all(file.parent == tmp_path / "pointsman" / "flashinfer" and " " not in file.name for file in files)
    _, given = emulation.calls[0]
    assert len(given["hidden_states"]) == 48 and given["tune_max_num_tokens"] == 64
    if runner is RoutedTrtllmRunner:  # the router spreads rows: all experts have some, and none has all
        counts = torch.bincount((given["topk_ids"] >> 16).flatten(), minlength=16)
        assert (counts > 0).all() and (counts < 48).all()


def test_one_rank_asks_nobody(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    emulation, decoder = model(monkeypatch, tmp_path, TrtllmRunner, VERSIONS[0])
    tune_experts(CONFIG, Line(0, 1, []), decoder)  # type: ignore[arg-type]
    assert len(emulation.tunings) == 1


def test_it_is_left_out_where_asked_and_refused_where_there_is_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    emulation, decoder = model(monkeypatch, tmp_path, TrtllmRunner, VERSIONS[0])
    skip = dataclasses.replace(CONFIG, kernel=dataclasses.replace(CONFIG.kernel, disable_flashinfer_autotune=True))
    alone: Any = Line(0, 1, [])
    tune_experts(skip, alone, decoder)
    assert not emulation.tunings
    monkeypatch.undo()
    plain = load_model(str(tiny.path()), progress=False)
    tune_experts(CONFIG, alone, plain)
    with pytest.raises(ValueError, match="the MoE runner is 'cpu', which is not tuned: leave it out"):
        tune_experts(skip, alone, plain)
    with pytest.raises(ValueError, match="disable_flashinfer_autotune is True; it is for a CUDA device"):
        LLM(disable_flashinfer_autotune=True)
    with pytest.raises(ValueError, match="the MoE runner is 'routed', which is not tuned: leave it out"):
        check_options(engine_config(disable_flashinfer_autotune=True, moe_runner_backend="routed"), "cuda")


@pytest.mark.parametrize("runner", [TrtllmRunner, RoutedTrtllmRunner])
def test_an_engine_answers_and_records_over_it(runner: type, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole way, the bundled checkpoint and all: what the reference runner answers, and its record."""
    params = SamplingParams(temperature=0.0, max_tokens=6, return_routed_experts=True)
    prompt = "Tom has 3 apples and buys 4 more."

    def answer(**config: Any) -> tuple[list[int], np.ndarray]:
        llm = LLM(progress=False, cpu_step="torch", **config)
        try:
            output = llm.generate(prompt, params)[0].outputs[0]
            return list(output.token_ids), np.sort(output.routed_experts, -1)
        finally:
            llm.close()

    tokens, rows = answer(moe_runner_backend="reference")
    emulation = Emulation(VERSIONS[-1], exact=True).install(monkeypatch)
    monkeypatch.setattr(backends, "make_runner", lambda name, **options: runner())
    got_tokens, got_rows = answer()
    assert emulation.calls and got_tokens == tokens
    # the weights of choices are rounded to bfloat16 where they are packed, which may tip a choice that is all but even
    assert got_rows.shape == rows.shape and (got_rows == rows).mean() > 0.98
