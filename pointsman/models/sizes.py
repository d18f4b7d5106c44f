"""How much memory a model's weights take, by kind, told from the table of names: no weight is read for it."""

from __future__ import annotations

import math
from typing import NamedTuple

from pointsman.kernels.dtypes import NUM_BYTES
from pointsman.models import MODELS
from pointsman.models.names import Kind, Row
from pointsman.models.sharding import Shard
from pointsman.moe.candidates import STATIC_RUNNERS

# what a layer's parameters are for
KINDS = {"qkv": "attention", "o": "attention", "qkv_bias": "attention", "gate": "router", "bias": "router", "embed": "embedding"}
KINDS |= {"gate_up": "experts", "down": "experts", "head": "head"}
KINDS |= {
    "shared_gate_up": "shared experts",
    "shared_down": "shared experts",
    "dense_gate_up": "dense layers",
    "dense_down": "dense layers",
}
KINDS |= {"attention_norm": "norms", "expert_norm": "norms", "q_norm": "norms", "k_norm": "norms", "norm": "norms"}
PLAIN_KINDS = frozenset({"router", "head", "norms", "embedding"})


class Size(NamedTuple):
    """What there is of one kind of weights: bytes with their scales, and numbers without."""

    num_bytes: int
    num_elements: int


def described(shard: Shard) -> dict[str, Size]:
    """The sizes of what a rank holds, by kind; plain weights have the dtype that config.json names.

    Scales are counted for whole blocks. Where a rank's columns begin within one it has some more of them.
    """
    architecture = shard.architecture
    sizes: dict[str, Size] = {}
    for row in MODELS[architecture.name].rows:
        count = len(architecture.layers_with(row.where)) if row.per_layer else 1
        count *= len(shard.experts) if row.per_expert else 1
        if not count:
            continue
        lengths = [shard.sizes[name] for name in row.shape]
        add_size(sizes, row.parameter, count * _num_bytes(row, lengths, shard), count * math.prod(lengths))
    return sizes


def forms(shard: Shard, *, step: str | None, linear: str | None, runner: str | None, dtype: str) -> dict[str, int]:
    """Bytes of weights that stand once more beside the checkpoint's, as what was chosen multiplies with them.

    The compiled step packs all, with a scale for each output and block of columns. A CPU's torch step has matrices in the dtype that is
    computed in, made when they are first used. Plain ones of another dtype are converted by all but the reference. A kernel of FlashInfer's
    has rows in an order of its own.
    """
    sizes, block = described(shard), shard.architecture.quantization_block
    if step == "compiled":
        byte = 1.0 if block is None else 1 + 4 / block[1]
        plain = PLAIN_KINDS if block is not None else sizes.keys()
        return {"packed": sum(size.num_bytes if kind in plain else int(size.num_elements * byte) for kind, size in sizes.items())}
    ordered = shard.architecture.input_scales and runner in STATIC_RUNNERS
    again = {f"experts as {runner} reads them": sizes["experts"].num_elements} if ordered else {}
    converts, found = shard.architecture.dtype != dtype, 0
    for kind, size in sizes.items():
        how = runner if kind == "experts" else linear
        quantized = block is not None and kind not in PLAIN_KINDS
        made = how == "cpu" if quantized else converts and how not in (None, "reference")
        if made and kind not in ("router", "norms", "embedding"):
            found += size.num_elements * NUM_BYTES[dtype]
    return again | ({f"in {dtype}": found} if found else {})


def _num_bytes(row: Row, lengths: list[int], shard: Shard) -> int:
    architecture, numbers = shard.architecture, math.prod(lengths)
    if row.kind is Kind.FLOAT32:
        return 4 * numbers
    block = architecture.quantization_block
    if row.kind is Kind.PLAIN or block is None:
        return numbers * NUM_BYTES[architecture.dtype]
    scales = math.prod(-(-length // step) for length, step in zip(lengths, block, strict=True))
    return numbers + 4 * (scales + architecture.input_scales)


def add_size(sizes: dict[str, Size], parameter: str, num_bytes: int, num_elements: int) -> None:
    """Count what there is of a parameter."""
    before = sizes.get(KINDS[parameter], Size(0, 0))
    sizes[KINDS[parameter]] = Size(before.num_bytes + num_bytes, before.num_elements + num_elements)
