"""What FlashInfer's kernels cannot do, told without the library and without tensors: reasons against each of its runners.

Which versions were read for it, and what no machine here could check, `docs/backends.md` says.
"""

from __future__ import annotations

from pointsman.kernels.device import Device
from pointsman.kernels.library import FLASHINFER, installed, numbers, reason_against_device, reason_against_flashinfer
from pointsman.moe.spec import ExpertForm, RoutingSpec

BLOCK = 128
MORE_EXPERTS = "0.6.16"  # before, a choice among more than 256 experts could read where it must not
SCALAR_MINIMUM = "0.6.9"  # before, the function for one scale a matrix gives its kernel an argument too few
BLACKWELL = ((10, 0), (10, 3))
HOPPER = ((9, 0),)
MOST_ROUTED_TOP_K = 32


def method_of(spec: RoutingSpec) -> tuple[str, int, int]:
    """The kernel's name for how a model routes, and the most experts and experts per token that it was compiled for.

    Raises:
        ValueError: no method of the kernel routes so; the message says what does not fit.
    """
    if spec.score == "softmax":
        if spec.top_groups < spec.num_groups:
            raise ValueError("it limits tokens to groups of experts by sigmoid scores alone; this model's scores are a softmax")
        if spec.scale != 1.0:
            raise ValueError(f"it does not scale the weights of a softmax; this model scales them by {spec.scale:g}")
        return ("RenormalizeNaive", 2048, 32) if spec.renormalize else ("Default", 256, 8)
    if not spec.renormalize:
        raise ValueError("it divides the weights of sigmoid scores by their sum; this model does not")
    if spec.top_groups == spec.num_groups and spec.scale == 1.0:
        return "MiniMax2", 1024, 32
    return "DeepSeekV3", 1024 if spec.top_groups == spec.num_groups else 512, 8 if spec.num_experts <= 384 else 22


def reason_against_trtllm_form(spec: RoutingSpec, form: ExpertForm) -> str | None:
    """What the kernels of Blackwell cannot hold of a model, or None."""
    if form.block != (BLOCK, BLOCK):
        stored = "are not FP8" if form.block is None else f"have blocks of {form.block[0]}x{form.block[1]}"
        return f"it multiplies FP8 in blocks of {BLOCK}x{BLOCK}; the checkpoint's experts {stored}"
    if form.hidden % BLOCK or form.width % BLOCK:
        return f"hidden size and expert width must be multiples of {BLOCK}; they are {form.hidden} and {form.width}"
    if spec.num_experts % 4:
        return f"the number of experts must be a multiple of 4; the model has {spec.num_experts}"
    if spec.num_experts <= spec.top_k:
        return f"a token must not use all experts; the model has {spec.num_experts} and a token uses {spec.top_k}"
    return None


def reason_against_routing(spec: RoutingSpec) -> str | None:
    """Why the kernel cannot choose experts as the model does, or None."""
    try:
        method, most_experts, most_top_k = method_of(spec)
    except ValueError as error:
        return str(error)
    if spec.num_experts > most_experts:
        return f"it routes among at most {most_experts} experts so; the model has {spec.num_experts}"
    if spec.top_k > most_top_k:
        return f"it chooses at most {most_top_k} experts of {spec.num_experts} so; the model uses {spec.top_k}"
    if method == "DeepSeekV3" and spec.top_groups < spec.num_groups:
        size = spec.num_experts // spec.num_groups
        if spec.num_groups > 8 or spec.top_groups > 4 or size > 32:
            return (
                f"it chooses up to 4 of up to 8 groups of up to 32 experts; the model has {spec.top_groups} of {spec.num_groups} of {size}"
            )
        if spec.top_k >= spec.top_groups * size:
            return f"a token must not use all experts of its groups; they have {spec.top_groups * size}, and it uses {spec.top_k}"
    return None


def reason_against_experts(spec: RoutingSpec) -> str | None:
    """Why this version cannot hold so many experts, or None."""
    version = installed(FLASHINFER)
    if spec.num_experts > 256 and version is not None and numbers(version) < numbers(MORE_EXPERTS):
        return f"with more than 256 experts it needs flashinfer {MORE_EXPERTS} or later; {version} is installed"
    return None


def reason_against_input_scales(form: ExpertForm) -> str | None:
    """Why this version cannot multiply by a checkpoint's scales of activations, or None."""
    version = installed(FLASHINFER)
    if form.input_scales and version is not None and numbers(version) < numbers(SCALAR_MINIMUM):
        return (
            f"with a checkpoint's scales of activations it needs flashinfer {SCALAR_MINIMUM} or later; {version} is installed. "
            "flashinfer_trtllm_routed makes its own"
        )
    return None


def reason_against_trtllm(spec: RoutingSpec, form: ExpertForm, device: Device, dtype: str) -> str | None:
    return (
        reason_against_device(device, BLACKWELL)
        or reason_against_trtllm_form(spec, form)
        or reason_against_routing(spec)
        or reason_against_flashinfer()
        or reason_against_experts(spec)
        or reason_against_input_scales(form)
    )


def reason_against_trtllm_routed(spec: RoutingSpec, form: ExpertForm, device: Device, dtype: str) -> str | None:
    if (why := reason_against_device(device, BLACKWELL) or reason_against_trtllm_form(spec, form)) is not None:
        return why
    if spec.top_k > MOST_ROUTED_TOP_K:
        return f"it takes at most {MOST_ROUTED_TOP_K} experts a token; the model uses {spec.top_k}"
    if spec.num_experts > 2048:
        return f"it sorts by at most 2048 experts; the model has {spec.num_experts}"
    return reason_against_flashinfer() or reason_against_experts(spec)


def reason_against_cutlass(spec: RoutingSpec, form: ExpertForm, device: Device, dtype: str) -> str | None:
    if (why := reason_against_device(device, HOPPER)) is not None:
        return why
    if dtype != "bfloat16":
        return f"it takes bfloat16; the dtype is {dtype}"
    if form.block != (BLOCK, BLOCK):
        return f"it multiplies FP8 in blocks of {BLOCK}x{BLOCK}; the checkpoint's experts have none such"
    if form.hidden % BLOCK or form.width % BLOCK:
        return f"hidden size and expert width must be multiples of {BLOCK}; they are {form.hidden} and {form.width}"
    if (why := reason_against_flashinfer()) is not None:
        return why
    if device.cuda is None or device.cuda < (12, 8):
        have = "none" if device.cuda is None else ".".join(map(str, device.cuda))
        return f"it needs CUDA 12.8 or later; torch is built for {have}"
    return None
