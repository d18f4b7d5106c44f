"""Which step runs on a CPU, and the change from one to the other while serving.

The compiled step is several times faster and has to be compiled once for each machine, which takes seconds. Where that has been
done it serves from the start. Where not, the torch step serves while another process compiles, and the first step after that
is compiled: the answers agree within rounding, so nothing else changes. `--cpu-step compiled` waits instead.
"""

from __future__ import annotations

import logging
import os
import subprocess
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pointsman.config import EngineConfig
from pointsman.engine.batch import Batch, Lanes
from pointsman.engine.candidates import cpu_step_choice
from pointsman.engine.device import return_memory
from pointsman.engine.model_runner import Step, TorchStep
from pointsman.kernels import reference
from pointsman.kernels.cpu_pack import Matrix
from pointsman.kernels.cpu_step import (
    CpuCache,
    CpuStep,
    CpuWeights,
    LayerWeights,
    ModelShape,
    is_cached,
    kinds_of,
    pack_weights,
    pieces,
    start_compiling,
)
from pointsman.kernels.operations import LINEARS
from pointsman.kernels.weight import Weight
from pointsman.layers.paged_kv import PagedKV
from pointsman.models.architecture import Architecture
from pointsman.models.decoder import Decoder
from pointsman.models.parameters import LayerParameters
from pointsman.moe.capture import RouteStore

logger = logging.getLogger(__name__)


def choose_step(config: EngineConfig, decoder: Decoder, kv: PagedKV, routes: RouteStore, lanes: Lanes) -> Step:
    """The step that the configuration asks for.

    Raises:
        ValueError: the compiled step is asked for and cannot serve; the message says why.
    """
    backends, wanted = decoder.backends, config.kernel.cpu_step
    linear = next(name for name, entry in LINEARS.items() if entry is backends.linear)
    dtype = str(decoder.dtype).removeprefix("torch.")
    choice = cpu_step_choice(wanted, decoder.shard, runner=backends.moe.name, linear=linear, dtype=dtype)
    torch_step = TorchStep(decoder, kv, routes)
    if choice.take() == "torch":
        return torch_step
    weights = _pack(decoder, len_positions=lanes.max_pages * lanes.page_size)
    cache = CpuCache(_array(kv.k), _array(kv.v), _array(routes.rows_SLK), _array(routes.alike_S), lanes.page_table_LP)
    kinds = kinds_of(weights, cache)
    max_rows = config.scheduler.chunked_prefill_size
    num_threads = config.kernel.num_threads or len(os.sched_getaffinity(0))
    shape = _shape(decoder.architecture)

    def make() -> CompiledStep:
        step = CompiledStep(CpuStep(shape, weights, cache, max_rows=max_rows, num_threads=num_threads), cache.routes)
        decoder.release()  # what the torch step multiplied with
        return_memory(decoder.device)
        return step

    if wanted == "compiled" or is_cached(kinds):
        logger.info("CPU step: compiled, %d threads", num_threads)
        return make()
    logger.info("CPU step: torch until the compiled one is ready, once for this machine")
    return ChangingStep(torch_step, start_compiling(kinds), make)


class CompiledStep:
    """One call into compiled code a step. A row's numbers are the same bits whatever shares the step, in any chunks, on any threads."""

    name = "compiled"
    final = True

    def __init__(self, step: CpuStep, routes: npt.NDArray[Any]) -> None:
        self._step, self._routes = step, routes

    def __call__(self, batch: Batch, lanes: Lanes) -> Tensor:
        forced_T = None
        if batch.forced is not None:
            forced_T = np.zeros(len(batch.tokens_T), np.int64)
            forced_T[batch.forced.rows_F] = 1
            self._routes[batch.slots_T[batch.forced.rows_F]] = batch.forced.ids_FNK
        return torch.from_numpy(self._step.run(batch.tokens_T, batch.positions_T, batch.lanes_T, batch.rows_R, forced_T))


class ChangingStep:
    """The torch step until the compiler is done, then the compiled one."""

    def __init__(self, now: TorchStep, compiler: subprocess.Popen[str], make: Callable[[], CompiledStep]) -> None:
        self._now: Step = now
        self._compiled: Future[str | None] | None = _wait_aside(compiler)
        self._make = make

    @property
    def name(self) -> str:
        return self._now.name

    @property
    def final(self) -> bool:
        """Whether `name` will stay what it is."""
        return self._compiled is None

    def __call__(self, batch: Batch, lanes: Lanes) -> Tensor:
        if self._compiled is not None and self._compiled.done():
            errors, self._compiled = self._compiled.result(), None
            if errors is None:
                try:
                    self._now = self._make()
                    logger.info("CPU step: compiled from here on")
                except RuntimeError as error:  # what was compiled is gone again, or cannot be read
                    errors = str(error)
            if errors is not None:
                logger.warning("compiling the CPU step failed; the torch step, several times slower, goes on serving: %s", errors[-2000:])
        return self._now(batch, lanes)


def _wait_aside(compiler: subprocess.Popen[str]) -> Future[str | None]:
    """The compiler's complaint, or None. A thread waits: an engine may end first, and the step is stored all the same."""
    done: Future[str | None] = Future()

    def wait() -> None:
        _, errors = compiler.communicate()
        done.set_result(errors if compiler.returncode else None)

    threading.Thread(target=wait, name="compiler", daemon=True).start()
    return done


def _shape(architecture: Architecture) -> ModelShape:
    return ModelShape(
        vocab=architecture.vocab_size,
        hidden=architecture.hidden_size,
        layers=architecture.num_layers,
        heads=architecture.num_heads,
        kv_heads=architecture.num_kv_heads,
        head_dim=architecture.head_dim,
        rotary_dim=architecture.rotary_dim,
        experts=architecture.num_experts,
        top_k=architecture.top_k,
        width=architecture.expert_width,
        epsilon=architecture.norm_epsilon,
        qk_norm=architecture.qk_norm,
        score=architecture.routing.score,
        renormalize=architecture.routing.renormalize,
        routing_scale=architecture.routing.scale,
        biased=architecture.qkv_bias,
        shared=-(-architecture.shared_width // architecture.expert_width),
        dense_layers=architecture.dense_layers,
        dense=-(-architecture.dense_width // architecture.expert_width),
    )


def _pack(decoder: Decoder, *, len_positions: int) -> CpuWeights:
    architecture, parameters = decoder.architecture, decoder.parameters
    cos, sin = reference.rotary_angles(torch.arange(len_positions), architecture.rotary_dim, architecture.rope_theta)
    return pack_weights(
        _shape(architecture),
        embed=_array(parameters.embed_VD),
        layers=_layers(parameters.layers, architecture.expert_width),
        final_norm=_array(parameters.norm_D),
        head=_matrix(parameters.head),
        cos=cos.numpy(),
        sin=sin.numpy(),
    )


def _layers(layers: tuple[LayerParameters, ...], width: int) -> Iterator[LayerWeights]:
    for layer in layers:
        yield LayerWeights(
            input_norm=_array(layer.attention_norm_D),
            qkv=_matrix(layer.qkv),
            qkv_bias=_maybe(layer.qkv_bias_N),
            q_norm=_maybe(layer.q_norm_Q),
            k_norm=_maybe(layer.k_norm_W),
            o=_matrix(layer.o),
            post_norm=_array(layer.expert_norm_D),
            gate=_maybe(layer.gate_ED),
            bias=_maybe(layer.bias_E),
            experts=_pairs(layer, width),
        )


def _pairs(layer: LayerParameters, width: int) -> list[tuple[Matrix, Matrix]]:
    """The matrices of the experts, and those that all tokens take in pieces of an expert's width."""
    found: list[tuple[Matrix, Matrix]] = []
    if (experts := layer.experts) is not None:
        found = [(_matrix(experts.gate_up[number]), _matrix(experts.down[number])) for number in range(experts.num_experts)]
    for pair in (layer.shared, layer.dense):
        if pair is not None:
            found += pieces(_matrix(pair.gate_up), _matrix(pair.down), width)
    return found


def _maybe(tensor: Tensor | None) -> npt.NDArray[Any] | None:
    return None if tensor is None else _array(tensor)


def _matrix(weight: Weight) -> Matrix:
    return Matrix(_array(weight.data), None if weight.scale is None else _array(weight.scale), weight.block, weight.parts)


def _array(tensor: Tensor) -> npt.NDArray[Any]:
    """The same memory as numpy sees it; bfloat16 as its bits in uint16, e4m3 in uint8."""
    bits = {torch.bfloat16: torch.uint16, torch.float8_e4m3fn: torch.uint8}
    array: npt.NDArray[Any] = tensor.detach().view(bits.get(tensor.dtype, tensor.dtype)).numpy()
    return array
