"""Which step runs on a CPU."""

from __future__ import annotations

from pointsman.config import EngineConfig
from pointsman.engine.model_runner import Step, TorchStep
from pointsman.layers.paged_kv import PagedKV
from pointsman.models.decoder import Decoder
from pointsman.moe.capture import RouteStore


def choose_step(config: EngineConfig, decoder: Decoder, kv: PagedKV, routes: RouteStore) -> Step:
    """The step that the configuration asks for."""
    return TorchStep(decoder, kv, routes)
