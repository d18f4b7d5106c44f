"""Which options mean something on which device."""

from __future__ import annotations

from pointsman.config import EngineConfig, KernelConfig
from pointsman.moe.candidates import TUNED_RUNNERS

CPU_OPTIONS = {"cpu_step": "auto", "num_threads": None}
CUDA_OPTIONS = {
    "disable_flashinfer_autotune": False,
    "disable_cuda_graph": False,
    "cuda_graph_max_bs": None,
    "enforce_piecewise_cuda_graph": False,
}


def check_options(config: EngineConfig, device_type: str) -> None:
    """Refuse what has no meaning on a device of this type, or contradicts itself, with a ValueError."""
    foreign = CUDA_OPTIONS if device_type == "cpu" else CPU_OPTIONS
    for name, default in foreign.items():
        if (value := getattr(config.kernel, name)) != default:
            other = "a CUDA device" if device_type == "cpu" else "a CPU"
            raise ValueError(f"{name} is {value!r}; it is for {other}, and the device is {device_type}: leave it out")
    kernel = config.kernel
    if kernel.moe_runner_backend != "auto" and (why := reason_against_untuned(kernel, kernel.moe_runner_backend)) is not None:
        raise ValueError(why)
    if kernel.disable_cuda_graph and (kernel.enforce_piecewise_cuda_graph or kernel.cuda_graph_max_bs is not None):
        other = "enforce_piecewise_cuda_graph" if kernel.enforce_piecewise_cuda_graph else "cuda_graph_max_bs"
        raise ValueError(f"disable_cuda_graph and {other} contradict each other; leave one out")
    if kernel.enforce_piecewise_cuda_graph and kernel.cuda_graph_max_bs is not None:
        raise ValueError("enforce_piecewise_cuda_graph asks for graphs of every size, cuda_graph_max_bs for a largest; leave one out")
    if kernel.enable_deterministic_inference and device_type == "cpu" and kernel.cpu_step != "compiled":
        raise ValueError(
            "enable_deterministic_inference needs --cpu-step compiled on a CPU: torch chooses its kernels by shape, so that a row "
            "may differ with its company"
        )


def reason_against_untuned(kernel: KernelConfig, runner: str | None) -> str | None:
    """Why tuning cannot be left out where this runs the experts, or None."""
    if runner is None or runner in TUNED_RUNNERS or not kernel.disable_flashinfer_autotune:
        return None
    return f"disable_flashinfer_autotune is given, but the MoE runner is {runner!r}, which is not tuned: leave it out"
