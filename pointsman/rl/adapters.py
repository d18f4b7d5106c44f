"""Routing records in the forms that RL frameworks eat, and back.

Each framework has its own idea of the type, the shape, the token that was sampled last, and rows that are not known. None of them can
tell a made-up row from a recorded one, so no row is made up here: one that is missing becomes the framework's own mark for "not
known" where there is one (NeMo-RL's -1), and everywhere else a record with missing rows is refused.

    framework     takes                                             the last token        missing rows
    slime, miles  base64 of flat int32, tokens - 1 - start rows     the trainer pads it   refused
    verl          int16 [R, L, K], padded to [B, S, L, K]           0, as padding is      refused
    NeMo-RL       int32 [S, layers with experts, K]                 -1                    -1, and the trainer routes freely
    prime-rl      {data, shape, start, dtype} of uint8 or uint16    0, in a sample        refused
    vLLM          base64 of a `.npy` of uint8 or uint16             has no row            refused

`num_tokens` counts prompt and output. A record fits it that has the rows from its start to the token before the last, which was
sampled and never fed. All but NeMo-RL count the dense layers too: `num_layers` is how many layers the model has, and entries of dense
ones are 0, as the engines send them, for nobody reads them. Where it is not told, the record's layers must be all there are.

Shape suffixes: R rows, S positions, B sequences, L layers, K experts a token.
"""

from __future__ import annotations

import base64
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from pointsman.routed_experts import RoutedExperts, encode, from_numbers, read_npy

PRIME_RL_FIELDS = ("data", "shape", "start", "dtype")

Array = npt.NDArray[Any]


def to_slime(experts: RoutedExperts, *, num_tokens: int, num_layers: int | None = None) -> str:
    """For slime and miles: base64 as SGLang gives it in `meta_info.routed_experts`.

    Source: their SGLang rollout demands (tokens - 1 - start) * num_layers * top_k numbers; `fill_routing_replay` of their Megatron
    actor then appends a row of its own for the last token, on which no loss depends.

    Raises:
        ValueError: rows are missing, or the record does not fit the tokens or the layers.
    """
    rows_RLK = _complete("slime", experts, num_tokens, num_layers)
    return base64.b64encode(rows_RLK.astype("<i4").tobytes()).decode()


def from_slime(
    text: str, *, num_tokens: int, num_layers: int, top_k: int, num_experts: int, start: int = 0, layers: Sequence[int] | None = None
) -> RoutedExperts:
    """The record of what SGLang gave to slime or miles.

    Args:
        layers: which of the `num_layers` have experts; None is all.

    Raises:
        ValueError: it is not base64, has not as many numbers as slime demands, or numbers that are no experts.
    """
    data = _unbase64("slime", text)
    expected = 4 * max(num_tokens - 1 - start, 0) * num_layers * top_k
    if len(data) != expected:
        raise ValueError(f"slime has {len(data)} bytes; {num_tokens} tokens from {start} by {num_layers} layers by {top_k} have {expected}")
    numbers_RLK = np.frombuffer(data, "<i4").reshape(-1, num_layers, top_k)
    return _record("slime", numbers_RLK, num_experts, start, layers)


def to_verl(experts: RoutedExperts, *, num_tokens: int, num_layers: int | None = None) -> npt.NDArray[np.int16]:
    """For verl: `routed_experts` of one agent loop's output, int16 [tokens - 1, L, K]; it can be written to, as torch wants it.

    Source: verl's agent loop copies it behind the padding of the prompt into zeros; `pad_verl` is that batch.

    Raises:
        ValueError: rows are missing or left out at the start, or the record does not fit.
    """
    _from_the_start("verl", experts)
    if experts.num_experts > 1 << 15:
        raise ValueError(f"verl keeps int16, which has no room for {experts.num_experts} experts")
    return _complete("verl", experts, num_tokens, num_layers).astype(np.int16)


def pad_verl(
    samples: Sequence[npt.NDArray[np.int16]], prompt_lengths: Sequence[int], *, prompt_width: int, response_width: int
) -> npt.NDArray[np.int16]:
    """A batch as verl has it, int16 [B, prompt_width + response_width, L, K]: prompts end at `prompt_width`, zeros around.

    Raises:
        ValueError: a prompt or a response is wider than its room, or the samples differ in layers or experts.
    """
    if len(samples) != len(prompt_lengths) or not samples:
        raise ValueError(f"{len(samples)} samples and {len(prompt_lengths)} prompt lengths; there must be as many, and one at least")
    width = prompt_width + response_width
    padded_BSLK = np.zeros((len(samples), width, *samples[0].shape[1:]), np.int16)
    for index, (rows_RLK, length) in enumerate(zip(samples, prompt_lengths, strict=True)):
        if rows_RLK.shape[1:] != padded_BSLK.shape[2:]:
            raise ValueError(f"sample {index} has the shape {rows_RLK.shape}; the first has {samples[0].shape}")
        if not 0 < length <= min(prompt_width, len(rows_RLK) + 1) or len(rows_RLK) - length > response_width:
            raise ValueError(
                f"sample {index} has {len(rows_RLK)} rows and a prompt of {length}; there is room for {prompt_width} + {response_width}"
            )
        first = prompt_width - length
        padded_BSLK[index, first : first + len(rows_RLK)] = rows_RLK
    return padded_BSLK


def from_verl(rows_RLK: Array, *, num_experts: int, layers: Sequence[int] | None = None) -> RoutedExperts:
    """The record of one sample without its padding: of a batch, `batch[i, prompt_width - prompt_length :][: tokens - 1]`.

    Raises:
        ValueError: a row is no choice of experts, as rows of the padding are not.
    """
    return _record("verl", rows_RLK, num_experts, 0, layers)


def to_nemo_rl(experts: RoutedExperts, *, num_tokens: int) -> npt.NDArray[np.int32]:
    """For NeMo-RL: int32 [tokens, L, K] of the layers with experts; -1 where a row is missing, before the start, and for the last token.

    Source: `ROUTED_EXPERTS_MISSING_ROUTE_SENTINEL` of its generation interface; Megatron routes such a token itself.

    Raises:
        ValueError: the record does not fit the tokens.
    """
    _check_rows("NeMo-RL", experts, num_tokens)
    numbers_SLK = np.full((num_tokens, *experts.rows_RLK.shape[1:]), -1, np.int32)
    numbers_SLK[experts.start + np.flatnonzero(experts.known_R)] = experts.rows_RLK[experts.known_R]
    return numbers_SLK


def from_nemo_rl(numbers_SLK: Array, *, num_experts: int, layers: Sequence[int] | None = None) -> RoutedExperts:
    """The record of a sample; rows of -1 are missing, and that of the last token is left out where it is -1.

    Raises:
        ValueError: a row is neither -1 throughout nor a choice of experts.
    """
    numbers = _numbers("NeMo-RL", numbers_SLK)
    last_is_open = len(numbers) > 0 and bool((numbers[-1] == -1).all())
    return from_numbers(numbers[:-1] if last_is_open else numbers, num_experts=num_experts, layers=layers)


def to_prime_rl(
    experts: RoutedExperts, *, num_tokens: int, num_layers: int | None = None, sample: bool = False
) -> dict[str, str | int | list[int]]:
    """For prime-rl: the object that its patched vLLM answers with, or with `sample` that of a training sample.

    Source: `serialize_routed_experts` (data in base64, C order; shape, start, dtype). A sample has as many rows as tokens: prime-rl
    demands it, and what stands for the last token is zeros, on which no loss depends.

    Raises:
        ValueError: rows are missing, a sample's are left out at the start, or the record does not fit.
    """
    rows_RLK = _complete("prime-rl", experts, num_tokens, num_layers)
    if sample:
        _from_the_start("prime-rl", experts)
        rows_RLK = np.concatenate([rows_RLK, np.zeros_like(rows_RLK[:1], shape=(1, *rows_RLK.shape[1:]))])
    data = base64.b64encode(rows_RLK.astype(rows_RLK.dtype.newbyteorder("<")).tobytes()).decode()
    return {"data": data, "shape": list(rows_RLK.shape), "start": experts.start, "dtype": rows_RLK.dtype.name}


def from_prime_rl(payload: Mapping[str, Any], *, num_tokens: int, num_experts: int, layers: Sequence[int] | None = None) -> RoutedExperts:
    """The record of prime-rl's object, as it answers or of a sample, whose row for the last token is left out.

    Raises:
        ValueError: a field is missing or does not fit the others or the tokens.
    """
    if absent := [name for name in PRIME_RL_FIELDS if name not in payload]:
        raise ValueError(f"prime-rl has no {', '.join(absent)}")
    shape, start, dtype = payload["shape"], payload["start"], payload["dtype"]
    if dtype not in ("uint8", "uint16"):
        raise ValueError(f"prime-rl has the dtype {dtype!r:.80}; it must be uint8 or uint16")
    if not isinstance(shape, list) or len(shape) != 3 or not all(type(size) is int and size >= 0 for size in shape):
        raise ValueError(f"prime-rl has the shape {shape!r:.80}; it must be [rows, layers, top_k]")
    if type(start) is not int or start < 0:
        raise ValueError(f"prime-rl has the start {start!r:.80}; it must be a whole number from 0")
    data = _unbase64("prime-rl", payload["data"])
    if len(data) != (expected := shape[0] * shape[1] * shape[2] * np.dtype(dtype).itemsize):
        raise ValueError(f"prime-rl has {len(data)} bytes; shape {shape} of {dtype} has {expected}")
    if shape[0] not in (num_tokens - start, num_tokens - 1 - start):
        raise ValueError(f"prime-rl has {shape[0]} rows from {start}; {num_tokens} tokens have {num_tokens - 1 - start}, a sample one more")
    numbers_RLK = np.frombuffer(data, np.dtype(dtype).newbyteorder("<")).reshape(shape)
    return _record("prime-rl", numbers_RLK[: num_tokens - 1 - start], num_experts, start, layers)


def to_vllm(experts: RoutedExperts, *, num_layers: int | None = None) -> str:
    """As vLLM's server answers: base64 of a `.npy`, of uint8 up to 256 experts and uint16 beyond.

    Source: its completion and chat routes, `np.save(..., allow_pickle=False)`.

    Raises:
        ValueError: rows are missing, for which vLLM has no mark, or the record does not have all layers.
    """
    _refuse_missing("vLLM", experts)
    rows_RLK = _all_layers("vLLM", experts, num_layers)
    return str(encode(dataclasses.replace(experts, rows_RLK=rows_RLK, layers=tuple(range(rows_RLK.shape[1]))), "npy"))


def from_vllm(text: str, *, num_experts: int, start: int = 0, layers: Sequence[int] | None = None) -> RoutedExperts:
    """The record of an answer of vLLM; `start` is the `routed_experts_prompt_start` that was asked for. Raises ValueError."""
    return _record("vLLM", read_npy(_unbase64("vLLM", text)), num_experts, start, layers)


def _complete(framework: str, experts: RoutedExperts, num_tokens: int, num_layers: int | None) -> Array:
    """All rows of all layers, each known. Raises ValueError."""
    _check_rows(framework, experts, num_tokens)
    _refuse_missing(framework, experts)
    return _all_layers(framework, experts, num_layers)


def _check_rows(framework: str, experts: RoutedExperts, num_tokens: int) -> None:
    if experts.start + experts.num_rows != num_tokens - 1:
        where = f"rows {experts.start} to {experts.start + experts.num_rows}"
        raise ValueError(f"the record has {where}; for {framework}, {num_tokens} tokens must have rows up to {num_tokens - 1}")


def _refuse_missing(framework: str, experts: RoutedExperts) -> None:
    if experts.missing:
        ranges = ", ".join(f"{first} to {last}" for first, last in experts.missing)
        raise ValueError(f"rows are missing ({ranges}), and {framework} has no mark for that; leave this sample out")


def _from_the_start(framework: str, experts: RoutedExperts) -> None:
    if experts.start:
        raise ValueError(f"the record starts at {experts.start}; {framework} needs the rows of all tokens")


def _all_layers(framework: str, experts: RoutedExperts, num_layers: int | None) -> Array:
    """The rows with every layer of the model in its place, dense ones 0."""
    wanted = len(experts.layers) if num_layers is None else num_layers
    if experts.layers[-1] >= wanted:
        raise ValueError(f"the record has layer {experts.layers[-1]} and {framework} counts all; num_layers is {num_layers}: say how many")
    if len(experts.layers) == wanted:
        return experts.rows_RLK
    rows_RLK = np.zeros((experts.num_rows, wanted, experts.rows_RLK.shape[2]), experts.rows_RLK.dtype)
    rows_RLK[:, list(experts.layers)] = experts.rows_RLK
    return rows_RLK


def _record(framework: str, numbers: Array, num_experts: int, start: int, layers: Sequence[int] | None) -> RoutedExperts:
    """The record of numbers of all layers, of which `layers` have experts."""
    numbers_RLK = _numbers(framework, numbers)
    if layers is not None:
        if any(not 0 <= layer < numbers_RLK.shape[1] for layer in layers):
            raise ValueError(f"layers is {list(layers)!r:.80}; {framework} has {numbers_RLK.shape[1]}")
        numbers_RLK = numbers_RLK[:, list(layers)]
    return from_numbers(numbers_RLK, num_experts=num_experts, start=start, layers=layers)


def _numbers(framework: str, numbers: Array) -> Array:
    array = np.asarray(numbers)
    if array.ndim != 3:
        raise ValueError(f"{framework} has the shape {list(array.shape)}; it must be [rows, layers, top_k]")
    return array


def _unbase64(framework: str, text: object) -> bytes:
    if not isinstance(text, str):
        raise ValueError(f"{framework} has {text!r:.80} where base64 must be")
    try:
        return base64.b64decode(text, validate=True)
    except ValueError as error:
        raise ValueError(f"{framework} has no base64: {error}") from None
