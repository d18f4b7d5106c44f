"""How steps can run, tokens be drawn and ranks work together: choices of the engine, with reasons, and without tensors or a device."""

from __future__ import annotations

from pointsman.config import KernelConfig
from pointsman.kernels.choice import Choice
from pointsman.kernels.library import reason_against_library
from pointsman.models.sharding import Shard

# as `distributed.peer_memory` has it, which a test compares
MOST_MAILBOX_RANKS = 8


def cpu_step_choice(wanted: str, shard: Shard, *, runner: str, linear: str, dtype: str) -> Choice:
    """The choice of the step on a CPU."""
    return Choice(
        "cpu_step", wanted, {"compiled": reason_against_compiled(shard, runner=runner, linear=linear, dtype=dtype), "torch": None}
    )


def reason_against_compiled(shard: Shard, *, runner: str, linear: str, dtype: str) -> str | None:
    """Why the compiled step cannot stand in for one of these parts, or None."""
    if not shard.whole:
        return f"tensor_parallel_size is {shard.tp}, and it exchanges nothing with other ranks"
    if runner != "cpu":
        return f"the MoE runner is {runner!r}, and it runs experts as 'cpu' does"
    if linear != "cpu":
        return f"the FP8 linear backend is {linear!r}, and it multiplies as 'cpu' does"
    if dtype != "float32":
        return f"the dtype is {dtype}, and it computes in float32"
    architecture = shard.architecture
    spec, block, width = architecture.routing, architecture.quantization_block, architecture.expert_width
    if spec.top_groups < spec.num_groups:
        return f"a token's experts come from {spec.top_groups} of {spec.num_groups} groups, and it chooses among all"
    for what, other in (("shared expert", architecture.shared_width), ("dense layers", architecture.dense_width)):
        if other > width and block is not None and any(width % size for size in block):
            return f"it cuts the {what} ({other} wide) at multiples of the experts' width, and {width} is none of the FP8 blocks' {block}"
    return None


def graph_choice(kernel: KernelConfig, reason: str | None) -> Choice:
    """The choice whether steps are CUDA graphs, against which there may be a reason."""
    asked = kernel.enforce_piecewise_cuda_graph or kernel.cuda_graph_max_bs is not None
    wanted = "eager" if kernel.disable_cuda_graph else "graphs" if asked else "auto"
    return Choice("step on a GPU", wanted, {"graphs": reason, "eager": None})


def sampler_choice(device_type: str) -> Choice:
    """The choice of what draws tokens that need no look of the host's."""
    return Choice("sampler", "auto", {"kernels": None if device_type == "cuda" else f"the device is {device_type}", "torch": None})


def executor_choice(*, overlap: bool, on_device: bool) -> Choice:
    """The choice of where a rank's steps run."""
    reasons: dict[str, str | None] = {
        "launching": None if on_device else "steps do not run on a device of their own",
        "threaded": "steps run on a device, where launching overlaps them" if on_device else None,
        "inline": None,
    }
    return Choice("executor", "auto" if overlap else "inline", reasons)


def ranks_choice(wanted: str, num_ranks: int, *, num_replicas: int = 1) -> Choice:
    """The choice of what runs the ranks past the first, of each replica where there are several."""
    several = f"it is one rank, and tensor_parallel_size is {num_ranks}; 'mp' runs several" if num_ranks > 1 else None
    alone = None if num_ranks > 1 else "there is one rank, which runs in the engine's own process"
    host = None if num_replicas == 1 else "the ranks of a replica are processes of its host"
    ray = alone or host or reason_against_library("ray", ("ray",), "ray")
    return Choice("distributed_executor_backend", wanted, {"uni": several, "mp": None, "ray": ray})


def sums_choice(device_type: str, num_ranks: int, *, glue: str) -> Choice:
    """The choice of what carries sums over ranks: for few rows mailboxes, which ranks have where their GPUs reach each other's memory."""
    on_gpus = device_type == "cuda"
    against = None if on_gpus else f"the device is {device_type}"
    if against is None and glue != "triton":
        against = f"they are read by the glue 'triton', and it is {glue!r}"
    if against is None and num_ranks > MOST_MAILBOX_RANKS:
        against = f"there are {num_ranks} ranks, and at most {MOST_MAILBOX_RANKS} write to each other"
    reasons = {"mailboxes": against, "nccl": None if on_gpus else "it connects GPUs", "gloo": "it connects CPUs" if on_gpus else None}
    return Choice("sums over ranks", "auto", reasons)
