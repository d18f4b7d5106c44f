"""Kernels of a library that are timed at start-up, once for a shape, a card and a version; then a file has the result.

They are timed on what the model does: rows that its own router spreads over its experts. The first rank times, and the others take what it
found, by its file's bytes: ranks that ran other kernels would round otherwise, and their sums would no longer be one computation.
"""

from __future__ import annotations

import logging
import re
import time
from pathlib import Path

import torch

from pointsman.config import EngineConfig
from pointsman.distributed import Mesh
from pointsman.engine.device_options import reason_against_untuned
from pointsman.kernels.library import FLASHINFER, installed
from pointsman.kernels.tiles import own_file
from pointsman.layers.moe import MoE
from pointsman.models.decoder import Decoder
from pointsman.moe import flashinfer
from pointsman.moe.candidates import TUNED_RUNNERS
from pointsman.moe.router import RouterInput

logger = logging.getLogger(__name__)


def tune_experts(config: EngineConfig, mesh: Mesh, decoder: Decoder) -> None:
    """Time the kernels of the experts for steps of up to the most tokens that one has, where their runner is one that is timed.

    Raises:
        ValueError: timing is not wanted, and there is none.
    """
    name, skip = decoder.backends.moe.name, config.kernel.disable_flashinfer_autotune
    if (why := reason_against_untuned(config.kernel, name)) is not None:
        raise ValueError(why)
    if name not in TUNED_RUNNERS:
        return
    if skip:
        logger.info("FlashInfer's kernels for the experts: not tuned (asked for)")
        return
    layer = next(layer.moe for layer in decoder.layers if layer.moe is not None)
    max_tokens = config.scheduler.chunked_prefill_size
    file, begin = tactics_file(layer, decoder.device, mesh.rank), time.perf_counter()

    @torch.inference_mode()
    def work() -> None:
        layer.run(drawn_rows(layer, max_tokens, decoder))

    if mesh.rank == 0:
        flashinfer.tune(work, file)
    if mesh.size > 1:
        _share(mesh, file)
        if mesh.rank > 0:
            flashinfer.adopt(work, file)
    logger.info("FlashInfer's kernels for the experts: up to %d tokens in %.1f s, %s", max_tokens, time.perf_counter() - begin, file)


def drawn_rows(layer: MoE, num_tokens: int, decoder: Decoder) -> RouterInput:
    """Normed rows as a model has them, which the layer's router routes; they are recorded nowhere."""
    device, hidden = decoder.device, decoder.architecture.hidden_size
    generator = torch.Generator(device).manual_seed(0)
    x_TD = torch.randn(num_tokens, hidden, generator=generator, device=device).to(decoder.dtype)
    slots_T = torch.arange(num_tokens, device=device)
    return RouterInput(x_TD, layer.gate_ED, layer.bias_E, layer.layer, slots_T, None, None, layer.own)


def tactics_file(layer: MoE, device: torch.device, rank: int) -> Path:
    """Where the result is kept: by version, card and shape; those of ranks past the first are copies of the first one's."""
    num_experts, hidden, width = layer.weights.down.data.shape
    card = re.sub(r"\W+", "-", torch.cuda.get_device_name(device)) if device.type == "cuda" else device.type
    name = f"{installed(FLASHINFER)}-{card}-{num_experts}x{hidden}x{width}-top{layer.spec.top_k}"
    return own_file().parent / "flashinfer" / f"{name}{f'-rank{rank}' if rank else ''}.json"


def _share(mesh: Mesh, file: Path) -> None:
    """Give every rank the file of the first."""
    content = file.read_bytes() if mesh.rank == 0 else b""
    size = int(mesh.broadcast(torch.tensor([len(content)], device=mesh.device)))
    buffer = torch.zeros(size, dtype=torch.uint8)
    if mesh.rank == 0:
        buffer = torch.frombuffer(bytearray(content), dtype=torch.uint8)
    content = mesh.broadcast(buffer.to(mesh.device)).cpu().numpy().tobytes()
    if mesh.rank > 0:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
