"""The choice of a device, and options that mean nothing there."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pointsman.config import engine_config
from pointsman.engine.device import choose_device
from pointsman.engine.device_options import check_options

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def test_auto_is_a_gpu_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto") == CPU == choose_device("cpu")
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(ValueError, match="device is 'cuda', but this torch is built without CUDA; use --device cpu"):
        choose_device("cuda")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    with pytest.raises(ValueError, match="torch sees no CUDA device"):
        choose_device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert choose_device("auto") == torch.device("cuda", 1) == choose_device("cuda")
    assert choose_device("cpu") == CPU


@pytest.mark.parametrize(
    ("device", "options", "message"),
    [
        (CPU, {"disable_cuda_graph": True}, "disable_cuda_graph is True; it is for a CUDA device, and the device is cpu: leave it out"),
        (CPU, {"cuda_graph_max_bs": 8}, "cuda_graph_max_bs is 8; it is for a CUDA device"),
        (CPU, {"enforce_piecewise_cuda_graph": True}, "enforce_piecewise_cuda_graph is True; it is for a CUDA device"),
        (CPU, {"enable_deterministic_inference": True}, "needs --cpu-step compiled"),
        (CUDA, {"cpu_step": "torch"}, "cpu_step is 'torch'; it is for a CPU, and the device is cuda: leave it out"),
        (CUDA, {"num_threads": 2}, "num_threads is 2; it is for a CPU"),
        (CUDA, {"disable_cuda_graph": True, "cuda_graph_max_bs": 8}, "disable_cuda_graph and cuda_graph_max_bs contradict"),
        (CUDA, {"disable_cuda_graph": True, "enforce_piecewise_cuda_graph": True}, "disable_cuda_graph and enforce_piecewise"),
        (CUDA, {"cuda_graph_max_bs": 8, "enforce_piecewise_cuda_graph": True}, "leave one out"),
    ],
)
def test_options_that_mean_nothing_are_refused(device: torch.device, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_options(engine_config(**options), device.type)


@pytest.mark.parametrize(
    ("device", "options"),
    [
        (CPU, {"enable_deterministic_inference": True, "cpu_step": "compiled", "num_threads": 2}),
        (CUDA, {"enforce_piecewise_cuda_graph": True, "enable_deterministic_inference": True}),
        (CUDA, {"cuda_graph_max_bs": 8}),
        (CUDA, {"disable_cuda_graph": True}),
    ],
)
def test_the_others_are_not(device: torch.device, options: dict[str, Any]) -> None:
    check_options(engine_config(**options), device.type)
