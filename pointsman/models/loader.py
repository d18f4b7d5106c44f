"""From a folder or hub id to a decoder that can run: all of a model, or what one of several ranks holds of it.

Tensors are copied one by one from the mapped files into their place in the stacked parameters, so that a second copy of the
model never exists. Before the first byte is copied the headers are compared with what the architecture calls for; all that is
missing, too much, misshapen or of the wrong type is one message. What the bytes themselves may have wrong (NaN, infinite scales)
is checked as they pass.
"""

from __future__ import annotations

import contextlib
import logging
import math
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor

from pointsman.distributed import Mesh
from pointsman.kernels.capability import describe
from pointsman.kernels.weight import FP8, FP8_MAX, num_blocks
from pointsman.layers.mailboxes import with_mailboxes
from pointsman.models import MODELS, architecture_of
from pointsman.models.architecture import Architecture
from pointsman.models.backends import DTYPES, take
from pointsman.models.checkpoint import Checkpoint, open_checkpoint
from pointsman.models.choices import choices_of, describe_scales
from pointsman.models.decoder import ALONE, Decoder
from pointsman.models.folder import locate, read_json
from pointsman.models.names import Kind, Place, Row, places, respelled, up_before_gate
from pointsman.models.parameters import Parameters, Storage
from pointsman.models.sharding import Shard, describe_split
from pointsman.moe.runner import AnyRunner, takes_up_first

logger = logging.getLogger(__name__)

FILE_DTYPES = {"BF16": torch.bfloat16, "F32": torch.float32, "F8_E4M3": FP8}
MOST_LISTED = 20
DUMMY_STD = 0.02
DUMMY_INPUT = 8.0  # the largest of a million normed numbers is below
DUMMY_ROUTER_STD = 0.05 * math.sqrt(3072)


def load_model(
    model_path: str | Path,
    *,
    revision: str | None = None,
    dtype: str = "auto",
    load_format: str = "auto",
    quantization: str | None = None,
    linear_backend: str = "auto",
    attention_backend: str = "auto",
    moe_backend: str = "auto",
    kv_dtype: str = "bfloat16",
    deterministic: bool = False,
    device: torch.device | str = "cpu",
    seed: int = 0,
    progress: bool | None = None,
    mesh: Mesh = ALONE,
) -> Decoder:
    """Load a checkpoint; parameters are named as the flags they come from.

    Args:
        dtype: what the model computes in; see `choices_of` for this and for the backends.
        load_format: "dummy" makes random weights from config.json alone.
        quantization: None takes the checkpoint's; "fp8" insists on it.
        kv_dtype: what keys and values will be stored as.
        deterministic: choose kernels that give a row the same bits whatever rows are beside it.
        seed: of dummy weights.
        progress: show a bar on stderr; None shows one on a terminal.
        mesh: the ranks among which the model is split; this one reads its own part and no other.

    Raises:
        ValueError: the checkpoint, the config or a choice cannot be served; the message says what would be right.
    """
    folder = locate(str(model_path), revision=revision, weights=load_format != "dummy")
    architecture = architecture_of(read_json(folder, "config.json"))
    if quantization == "fp8" and architecture.quantization_block is None:
        raise ValueError(f"quantization is 'fp8', but {folder} is a {architecture.dtype} checkpoint; leave it out, or quantize it first")
    on, shard = torch.device(device), Shard(architecture, mesh.tp, mesh.ep, mesh.rank)
    for line in () if shard.whole or mesh.rank else describe_split(architecture, mesh.tp, mesh.ep):
        logger.info("%s", line)
    choices = choices_of(
        shard,
        describe(on),
        dtype=dtype,
        linear_backend=linear_backend,
        attention_backend=attention_backend,
        moe_backend=moe_backend,
        kv_dtype=kv_dtype,
        deterministic=deterministic,
    )
    backends = take(choices, shard)
    for line in () if mesh.rank else describe_scales(architecture, backends.moe.name):
        logger.info("%s", line)
    if backends.glue.takes_mailbox:
        mesh = with_mailboxes(mesh, architecture.hidden_size)
    rows = rows_for(backends.moe, architecture)
    parameters = (
        make_parameters(shard, rows, seed=seed, device=on, progress=progress)
        if load_format == "dummy"
        else read_parameters(folder, shard, rows, device=on, progress=progress)
    )
    return Decoder(shard, parameters, backends, DTYPES[choices.dtype], mesh)


def rows_for(runner: AnyRunner, architecture: Architecture) -> tuple[Row, ...]:
    """The model's table of names, with the parts of its parameters as the runner of its experts takes them."""
    rows = MODELS[architecture.name].rows
    return up_before_gate(rows) if takes_up_first(runner) else rows


def read_parameters(folder: Path, shard: Shard, rows: tuple[Row, ...], *, device: torch.device, progress: bool | None = None) -> Parameters:
    """A shard of a checkpoint's weights; all its headers are checked against the architecture."""
    architecture = shard.architecture
    expected = places(rows, architecture)
    checkpoint = open_checkpoint(folder, partial(respelled, scalar=architecture.scalar_scales))
    check_headers(checkpoint, expected, architecture)
    storage = Storage(rows, shard, _plain_dtypes(expected, checkpoint), device)
    wanted = {name: (row, place) for name, (row, place) in expected.items() if storage.holds(row, place)}
    broken: dict[str, Tensor] = {}
    with loading_bar(progress, len(wanted)) as advance:

        def take(name: str, tensor: Any) -> None:
            row, place = wanted[name]
            view = storage.view(place)
            view.copy_(storage.cut(row, place, tensor))
            broken[name] = is_broken(view, positive=place.input)
            advance()

        checkpoint.slices(wanted, take, whole=shard.whole)
    _raise(folder, [broken_words(name, wanted[name][1]) for name, flag in zip(broken, _flags(broken), strict=True) if flag])
    return storage.parameters()


def _flags(broken: Mapping[str, Tensor]) -> list[bool]:
    flags: list[bool] = torch.stack(list(broken.values())).tolist()
    return flags


def check_headers(checkpoint: Checkpoint, expected: Mapping[str, tuple[Row, Place]], architecture: Architecture) -> None:
    """Raises ValueError where a checkpoint has not all the tensors that are expected, others, or some of another shape or type."""
    _raise(checkpoint.folder, [*checkpoint.problems, *_differences(expected, checkpoint, architecture)])


def _differences(expected: Mapping[str, tuple[Row, Place]], checkpoint: Checkpoint, architecture: Architecture) -> Iterator[str]:
    """What the headers lack, have too much, or have otherwise than the architecture calls for."""
    for name, (row, place) in expected.items():
        header = checkpoint.headers.get(name)
        if header is None:
            yield f"{name} is missing"
            continue
        shape, dtypes = form(row, place, architecture)
        if not fits(header.shape, shape):
            yield f"{name} is {list(header.shape)} where {shape_words(shape)} belongs"
        if header.dtype not in dtypes:
            yield f"{name} is {header.dtype} where {' or '.join(dtypes)} belongs"
    for name in checkpoint.headers.keys() - expected.keys():
        if not _is_draft_layer(name, architecture):
            yield f"{name} does not belong to this model"


def form(row: Row, place: Place, architecture: Architecture) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Shape and file types that a tensor may have; see `fits` for a scalar's."""
    shape, block = tuple(architecture.sizes[name] for name in row.shape), architecture.quantization_block
    if row.kind is not Kind.MATRIX or block is None:
        return shape, ("BF16", "F32")
    if place.input or (place.scale and architecture.scalar_scales):
        return (), ("F32", "BF16")
    if not place.scale:
        return shape, ("F8_E4M3",)
    return tuple(num_blocks(size, step) for size, step in zip(shape, block, strict=True)), ("F32", "BF16")


def fits(shape: tuple[int, ...], right: tuple[int, ...]) -> bool:
    """Whether a tensor of this shape may stand where that one belongs; one number may be a list of it."""
    return shape == right or (right == () and shape == (1,))


def shape_words(right: tuple[int, ...]) -> str:
    """What belongs there."""
    return str(list(right)) if right else "one number ([] or [1])"


def broken_words(name: str, place: Place) -> str:
    """What is wrong with a tensor that `is_broken`."""
    return f"{name} is no positive finite number" if place.input else f"{name} has numbers that are NaN or infinite"


def _is_draft_layer(name: str, architecture: Architecture) -> bool:
    """Whether a tensor belongs to a multi-token-prediction layer, numbered on from the model's last."""
    words = name.split(".")
    first = architecture.num_layers
    return words[:2] == ["model", "layers"] and words[2].isdecimal() and first <= int(words[2]) < first + architecture.num_draft_layers


def _plain_dtypes(expected: Mapping[str, tuple[Row, Place]], checkpoint: Checkpoint) -> dict[str, torch.dtype]:
    """For each parameter the widest type among its tensors: joined tensors share one, and none is narrowed."""
    widest: dict[str, torch.dtype] = {}
    for name, (row, _) in expected.items():
        dtype = FILE_DTYPES[checkpoint.headers[name].dtype]
        if row.parameter not in widest or dtype.itemsize > widest[row.parameter].itemsize:
            widest[row.parameter] = dtype
    return widest


def is_broken(tensor: Tensor, *, positive: bool = False) -> Tensor:
    """Whether it has NaN or infinite numbers (or some that are not positive), where it is, so that a device is not waited for.

    Found by the largest: these reductions are ten times as fast as a test of each number.
    """
    if tensor.dtype == FP8:
        # e4m3 has no infinity, and its NaN is all ones after the sign
        return (tensor.view(torch.uint8) & 0x7F).max() == 0x7F
    least, most = torch.aminmax(tensor)
    found = ~(least.isfinite() & most.isfinite())
    return found | (least <= 0) if positive else found


def _raise(folder: Path, problems: list[str]) -> None:
    if problems:
        listed = "".join(f"\n  {problem}" for problem in sorted(problems)[:MOST_LISTED])
        more = f"\n  and {len(problems) - MOST_LISTED} more" if len(problems) > MOST_LISTED else ""
        raise ValueError(f"the weights in {folder} do not fit config.json or are broken, {len(problems)} problems:{listed}{more}")


@contextlib.contextmanager
def loading_bar(progress: bool | None, total: int, what: str = "loading weights") -> Iterator[Callable[[], None]]:
    """A progress bar on stderr; yields what to call for each tensor."""
    shown = sys.stderr.isatty() if progress is None else progress
    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=console.is_terminal, disable=not shown) as bar:
        task = bar.add_task("weights", total=total)
        yield lambda: bar.advance(task)


def make_parameters(shard: Shard, rows: tuple[Row, ...], *, seed: int, device: torch.device, progress: bool | None = None) -> Parameters:
    """Random weights whose router spreads tokens evenly: norms 1, a wide router, no bias, matrices of standard deviation 0.02.

    Embeddings have standard deviation 1. With smaller ones what attention adds, which neighbours share, outweighs what tells
    tokens apart, and from the second layer on all of them choose the same experts. Each tensor has its own seed, made of the seed
    given and its name, so that it is the same whatever else is loaded, and a shard has its part of the same.
    """
    architecture = shard.architecture
    storage = Storage(rows, shard, {row.parameter: DTYPES[architecture.dtype] for row in rows}, device)
    generator = torch.Generator(device)
    named = places(rows, architecture)
    with loading_bar(progress, len(named)) as advance:
        for name, (row, place) in named.items():
            advance()
            if not storage.holds(row, place):
                continue
            view = storage.view(place)
            if place.scale:
                view.fill_(DUMMY_STD * 4 / FP8_MAX)
            elif place.input:
                view.fill_(DUMMY_INPUT / FP8_MAX)
            elif row.parameter == "bias":
                view.zero_()
            elif len(row.shape) == 1:
                view.fill_(1.0)
            else:
                std = {"gate": DUMMY_ROUTER_STD / math.sqrt(architecture.hidden_size), "embed": 1.0}.get(row.parameter, DUMMY_STD)
                generator.manual_seed(zlib.crc32(name.encode(), seed & 0xFFFFFFFF))
                shape, _ = form(row, place, architecture)
                noise = storage.cut(row, place, torch.randn(shape, generator=generator, device=device))
                # an e4m3 number of standard deviation 112 leaves four of them to its limit
                view.copy_(noise.mul_(FP8_MAX / 4).clamp_(-FP8_MAX, FP8_MAX) if view.dtype == FP8 else noise.mul_(std))
    return storage.parameters()
