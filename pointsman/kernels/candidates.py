"""Which implementations each operation has, and why one cannot serve on a device of some description: no tensors, and no device is asked.

A candidate is a name and a function that says why it cannot serve, or None; `operations` has what runs under that name. The choice is made
once, at start-up, before any weight is touched. Who names an implementation gets that one or a ValueError with every reason; "auto" takes
the first that can serve and logs it. Types of numbers are told by their names (`dtypes`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from pointsman.kernels import triton_support
from pointsman.kernels.choice import Choice
from pointsman.kernels.device import Device
from pointsman.kernels.library import reason_against_flashinfer

TRITON_CAPABILITY = (8, 0)  # bfloat16 on tensor cores; before 8.9 e4m3 goes as bytes (`e4m3`)
TRITON_HEAD_DIMS = (16, 32, 64, 128, 256)
TRITON_MOST_HEADS = 16
FLASHINFER_CAPABILITY = (8, 0)
FLASHINFER_HEAD_DIMS = (64, 128, 256)
FLASHINFER_KV_DTYPES = ("bfloat16", "fp8_e4m3")

Block = tuple[int, int] | None


class AttentionShape(NamedTuple):
    """The sizes that an implementation of attention may depend on, of what one device holds."""

    num_heads: int
    num_kv_heads: int
    head_dim: int


class StepBounds(NamedTuple):
    """How large steps and sequences become.

    Attributes:
        sizes: the numbers of rows that steps are padded to, ascending.
        max_pages: of a lane.
        page_size: tokens of a page.
    """

    sizes: tuple[int, ...]
    num_lanes: int
    max_pages: int
    page_size: int


def _anywhere(*what: Any) -> str | None:
    return None


def _needs_cpu(device: Device, dtype: str, block: Block) -> str | None:
    return None if device.type == "cpu" else f"it is made for CPUs; the device is {device.type}"


def _triton(device: Device, dtype: str) -> str | None:
    reason = triton_support.reason_against(device, needs=TRITON_CAPABILITY)
    if reason is None and dtype != "bfloat16":
        return f"it computes in bfloat16; the model computes in {dtype}"
    return reason


def _triton_linear(device: Device, dtype: str, block: Block) -> str | None:
    if block not in (None, (128, 128)):
        return f"it takes FP8 weights in blocks of 128 x 128; this model has {block[0]} x {block[1]}"
    return _triton(device, dtype)


def _triton_attention(device: Device, dtype: str, shape: AttentionShape, kv_dtype: str) -> str | None:
    if shape.head_dim not in TRITON_HEAD_DIMS:
        return f"it takes heads of {', '.join(map(str, TRITON_HEAD_DIMS))} channels; this model has {shape.head_dim}"
    if (group := shape.num_heads // shape.num_kv_heads) > TRITON_MOST_HEADS:
        return f"it takes up to {TRITON_MOST_HEADS} query heads per key/value head; this model has {group}"
    return _triton(device, dtype)


def _flashinfer_attention(device: Device, dtype: str, shape: AttentionShape, kv_dtype: str) -> str | None:
    needs = "it needs a CUDA device of compute capability {}.{} or later".format(*FLASHINFER_CAPABILITY)
    if device.type != "cuda":
        return f"{needs}; the device is {device.type}"
    if (have := device.capability) is None or have < FLASHINFER_CAPABILITY:
        return f"{needs}; {'torch sees none' if have is None else 'this one has {}.{}'.format(*have)}"
    if dtype != "bfloat16":
        return f"it computes in bfloat16; the model computes in {dtype}"
    if kv_dtype not in FLASHINFER_KV_DTYPES:
        return f"it reads keys and values in {' or '.join(FLASHINFER_KV_DTYPES)}; --kv-cache-dtype is {kv_dtype}"
    if shape.head_dim not in FLASHINFER_HEAD_DIMS:
        return f"it takes heads of {', '.join(map(str, FLASHINFER_HEAD_DIMS))} channels; this model has {shape.head_dim}"
    if shape.num_heads % shape.num_kv_heads:
        return f"it takes as many query heads for each key/value head; here are {shape.num_heads} and {shape.num_kv_heads}"
    return reason_against_flashinfer()


# rows that go by mailbox between two ranks; between more, so many that each sends as much
MAILBOX_ROWS = 2048

# in the order in which "auto" asks them
LINEARS: dict[str, Callable[[Device, str, Block], str | None]] = {"triton": _triton_linear, "cpu": _needs_cpu, "reference": _anywhere}
ATTENTIONS: dict[str, Callable[[Device, str, AttentionShape, str], str | None]] = {
    "triton": _triton_attention,
    "flashinfer": _flashinfer_attention,
    "reference": _anywhere,
}
GLUES: dict[str, Callable[[Device, str], str | None]] = {"triton": _triton, "reference": _anywhere}

# what a row gets does not depend there on the rows beside it, not even in the last bit
INVARIANT = frozenset({"triton"})
VARIES = "on a GPU a row's bits depend there on the rows beside it"
# these read their plan from the host, so a step that has them cannot be captured in a CUDA graph
UNCAPTURED_ATTENTIONS = frozenset({"reference"})


def linear_choice(wanted: str, *, device: Device, dtype: str, block: Block = None, invariant: bool = False) -> Choice:
    """The choice of what multiplies with weight matrices; `block` is that of FP8 weights."""
    reasons = {name: why(device, dtype, block) if name in INVARIANT or not invariant else VARIES for name, why in LINEARS.items()}
    return Choice("FP8 linear backend", wanted, reasons)


def attention_choice(
    wanted: str, *, device: Device, dtype: str, shape: AttentionShape, kv_dtype: str = "bfloat16", invariant: bool = False
) -> Choice:
    """The choice of what attends, over keys and values that are stored as `kv_dtype`."""
    reasons = {
        name: why(device, dtype, shape, kv_dtype) if name in INVARIANT or not invariant else VARIES for name, why in ATTENTIONS.items()
    }
    return Choice("attention backend", wanted, reasons)


def glue_choice(*, device: Device, dtype: str) -> Choice:
    """The choice of glue; a row's bits never depend there on the rows beside it."""
    return Choice("layer glue", "auto", {name: why(device, dtype) for name, why in GLUES.items()})
