"""A plain checkpoint becomes one in block FP8, as Hugging Face and MiniMax publish it: `weight` in e4m3, `weight_scale_inv` beside it.
Or one with a single scale a matrix, as AutoFP8 and llm-compressor do, which is `weight_scale` then.

Tensors pass one by one from the old files into new ones of a bounded size, so that a model of any size needs the memory of one file.
Matrices are quantized, by `kernels.reference.quantize_weight`; norms, routers, biases, embedding and head stay as they are, but
that float16 becomes bfloat16, the narrow type that models compute in. config.json is written last: a folder that was left half done
does not load.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from pointsman.kernels.reference import quantize_weight
from pointsman.kernels.weight import Weight, num_blocks
from pointsman.models import MODELS, architecture_of
from pointsman.models.checkpoint import INDEX, SINGLE, Checkpoint, Header, open_checkpoint
from pointsman.models.folder import inside, read_json
from pointsman.models.loader import check_headers, is_broken, loading_bar
from pointsman.models.names import Kind, Place, Row, places, scale_suffix

BLOCK = (128, 128)
MOST_BYTES = 4 << 30  # of a file
BYTES = {"BF16": 2, "F16": 2, "F32": 4}  # of a number, by safetensors' names
UNQUANTIZED = ("gate", "e_score_correction_bias", "lm_head")
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".onnx", ".h5", ".msgpack")


@dataclass(frozen=True, kw_only=True)
class LayerError:
    """What quantizing did to the matrices of a layer.

    Attributes:
        relative: root of the summed squares of the differences over that of the numbers.
        largest: largest difference of a number.
        worst: the matrix that has the largest relative difference.
    """

    layer: int
    num_matrices: int
    relative: float
    largest: float
    worst: str


@dataclass(frozen=True, kw_only=True)
class Quantized:
    """What was written: differences by layer and of all, and bytes of the weights before and after."""

    layers: tuple[LayerError, ...]
    relative: float
    largest: float
    num_matrices: int
    bytes_before: int
    bytes_after: int


def quantize_checkpoint(
    source: Path,
    target: Path,
    *,
    block: tuple[int, int] | None = BLOCK,
    force: bool = False,
    most_bytes: int = MOST_BYTES,
    progress: bool | None = None,
) -> Quantized:
    """Write the checkpoint in `source` to `target`, in FP8.

    Args:
        block: rows and columns of a block; None: a matrix has one scale.
        force: write into a folder that has files; weights that are there go.
        most_bytes: of a new file, unless one tensor is larger.
        progress: show a bar on stderr; None shows one on a terminal.

    Raises:
        ValueError: the source is quantized already, is no checkpoint of a model here, or is broken; or the target is in use, or too small.
        OSError: a file cannot be written; those that were are gone.
    """
    config = read_json(source, "config.json")
    if config.get("quantization_config") is not None:
        method = config["quantization_config"].get("quant_method") if isinstance(config["quantization_config"], dict) else "?"
        raise ValueError(f"{source} is quantized already (quant_method {method!r:.40}); give the checkpoint that it was made of")
    told = {key: "bfloat16" if value == "float16" else value for key, value in config.items() if key in ("dtype", "torch_dtype")}
    architecture = architecture_of(config | told)
    checkpoint = open_checkpoint(source)
    if (fp8 := next((name for name, header in checkpoint.headers.items() if header.dtype.startswith("F8")), None)) is not None:
        raise ValueError(
            f"{source} is quantized already ({fp8} is {checkpoint.headers[fp8].dtype}); give the checkpoint that it was made of"
        )
    expected = places(MODELS[architecture.name].rows, architecture)
    check_headers(_as_bfloat16(checkpoint), expected, architecture)
    _prepare(source, target, force, sum(_bytes_after(header, expected.get(name), block) for name, header in checkpoint.headers.items()))
    tally = _Tally(block)
    with contextlib.ExitStack() as stack:
        files = stack.enter_context(_Files(target, most_bytes))
        advance = stack.enter_context(loading_bar(progress, len(checkpoint.headers), "quantizing"))
        for name, tensor in checkpoint.tensors(checkpoint.headers):
            for new, value in _quantized(name, tensor, expected.get(name), tally):
                files.add(new, value)
            advance()
        num_bytes = files.finish()
    _copy_others(source, target)
    quantization = {
        "activation_scheme": "dynamic",
        "fmt": "float8_e4m3fn",
        "modules_to_not_convert": list(UNQUANTIZED),
        "quant_method": "fp8",
        "weight_block_size": block and list(block),
    }
    (target / "config.json").write_text(json.dumps(config | told | {"quantization_config": quantization}, indent=2) + "\n")
    return tally.result(num_bytes)


def _as_bfloat16(checkpoint: Checkpoint) -> Checkpoint:
    """As if what is float16 were bfloat16, which it becomes."""
    headers = {
        name: header._replace(dtype="BF16" if header.dtype == "F16" else header.dtype) for name, header in checkpoint.headers.items()
    }
    return dataclasses.replace(checkpoint, headers=headers)


def _bytes_after(header: Header, known: tuple[Row, Place] | None, block: tuple[int, int] | None) -> int:
    """What a tensor will take."""
    numbers = math.prod(header.shape)
    if known is None or known[0].kind is not Kind.MATRIX:
        return numbers * BYTES[header.dtype]
    if block is None:
        return numbers + 4
    return numbers + 4 * math.prod(num_blocks(length, step) for length, step in zip(header.shape, block, strict=True))


def _prepare(source: Path, target: Path, force: bool, num_bytes: int) -> None:
    """An empty folder for so many bytes, or with `force` one without weights. Raises ValueError."""
    if target.resolve() == source.resolve():
        raise ValueError(f"{target} is the checkpoint itself; name another folder")
    if target.exists() and not target.is_dir():
        raise ValueError(f"{target} is a file; name a folder")
    if target.is_dir() and any(target.iterdir()) and not force:
        raise ValueError(f"{target} is not empty; name a new folder, or --force replaces the weights in it")
    old = [path for path in (*target.glob("*.safetensors"), target / INDEX, target / "config.json") if path.exists()]
    there = next(path for path in (target, *target.resolve().parents) if path.is_dir())
    free = shutil.disk_usage(there).free + sum(path.stat().st_size for path in old)
    if free < num_bytes:
        raise ValueError(f"{target} will take {num_bytes / 2**30:.3g} GiB, and {free / 2**30:.3g} GiB are free there")
    for path in old:
        path.unlink()
    target.mkdir(parents=True, exist_ok=True)


def _quantized(name: str, tensor: Tensor, known: tuple[Row, Place] | None, tally: _Tally) -> Iterator[tuple[str, Tensor]]:
    """A tensor as it is written; layers for multi-token prediction, which are not loaded, stay as they are."""
    tally.bytes_before += tensor.nbytes
    if bool(is_broken(tensor)):
        raise ValueError(f"{name} has numbers that are NaN or infinite")
    if known is not None and known[0].kind is Kind.MATRIX:
        weight = quantize_weight(tensor, tally.block or (tensor.shape[0], tensor.shape[1]))
        assert weight.scale is not None
        tally.add(name, known[1].layer or 0, tensor, weight)
        scale = weight.scale if tally.block else weight.scale.reshape(())
        yield from ((name, weight.data), (name + scale_suffix(scalar=tally.block is None), scale))
    else:
        yield name, tensor.to(torch.bfloat16) if tensor.dtype == torch.float16 else tensor


class _Tally:
    """Differences that are being summed."""

    def __init__(self, block: tuple[int, int] | None) -> None:
        self.block = block
        self.bytes_before = 0
        self._matrices: dict[int, list[tuple[str, float, float, float]]] = {}

    def add(self, name: str, layer: int, tensor: Tensor, weight: Weight) -> None:
        exact = tensor.float()
        difference = weight.dequantize(torch.float32) - exact
        squares = float(difference.square().sum(dtype=torch.float64)), float(exact.square().sum(dtype=torch.float64))
        self._matrices.setdefault(layer, []).append((name, *squares, float(difference.abs().max())))

    def result(self, bytes_after: int) -> Quantized:
        layers = []
        for layer, matrices in sorted(self._matrices.items()):
            worst = max(matrices, key=lambda matrix: _relative([matrix]))
            largest = max(matrix[3] for matrix in matrices)
            layers.append(
                LayerError(layer=layer, num_matrices=len(matrices), relative=_relative(matrices), largest=largest, worst=worst[0])
            )
        every = [matrix for matrices in self._matrices.values() for matrix in matrices]
        return Quantized(
            layers=tuple(layers),
            relative=_relative(every),
            largest=max(matrix[3] for matrix in every),
            num_matrices=len(every),
            bytes_before=self.bytes_before,
            bytes_after=bytes_after,
        )


def _relative(matrices: list[tuple[str, float, float, float]]) -> float:
    wrong, whole = sum(matrix[1] for matrix in matrices), sum(matrix[2] for matrix in matrices)
    return float((wrong / whole) ** 0.5) if whole else 0.0


class _Files:
    """New files of a bounded size; where writing them does not end well, there are none."""

    def __init__(self, folder: Path, most_bytes: int) -> None:
        self._folder, self._most = folder, most_bytes
        self._pending: dict[str, Tensor] = {}
        self._written: list[tuple[Path, list[str]]] = []
        self._num_pending = self._num_bytes = 0

    def __enter__(self) -> _Files:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            for path, _names in self._written:
                path.unlink(missing_ok=True)

    def add(self, name: str, tensor: Tensor) -> None:
        if self._pending and self._num_pending + tensor.nbytes > self._most:
            self._flush()
        self._pending[name] = tensor.contiguous()
        self._num_pending += tensor.nbytes

    def _flush(self) -> None:
        path = self._folder / f"part-{len(self._written):05d}.safetensors"
        self._written.append((path, list(self._pending)))
        try:
            save_file(self._pending, path, metadata={"format": "pt"})
        except SafetensorError as error:
            raise OSError(f"cannot write {path}: {error}") from None
        self._num_bytes += self._num_pending
        self._pending, self._num_pending = {}, 0

    def finish(self) -> int:
        """Give the files their names and write the index; bytes of all tensors."""
        self._flush()
        count = len(self._written)
        index: dict[str, str] = {}
        for number, (path, names) in enumerate(self._written, 1):
            file = SINGLE if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"
            self._written[number - 1] = (path.rename(self._folder / file), names)
            index |= dict.fromkeys(names, file)
        if count > 1:
            text = json.dumps({"metadata": {"total_size": self._num_bytes}, "weight_map": index}, indent=2)
            (self._folder / INDEX).write_text(text + "\n")
        return self._num_bytes


def _copy_others(source: Path, target: Path) -> None:
    """Tokenizer, templates, and whatever else lies beside the weights."""
    for path in sorted(source.iterdir()):
        if path.is_file() and path.suffix not in WEIGHTS and path.name not in ("config.json", INDEX) and not path.name.startswith("."):
            shutil.copyfile(inside(source, path.name), target / path.name)
