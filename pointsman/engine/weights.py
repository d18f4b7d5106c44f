"""The weights in force, and how others take their place.

New weights are read, checked and brought into the form of the step beside those that serve, by whichever thread asks for it, and become
one object, `Fresh`. Putting that in place is a change of references between two steps. So an update that fails has
changed nothing, one that succeeds is what a fresh start would have made, by the same calls, and no step waits for a file. The price
is memory: for as long as an update takes there are two models.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from pointsman.config import EngineConfig
from pointsman.engine.model_runner import Step
from pointsman.models import architecture_of
from pointsman.models.architecture import Architecture
from pointsman.models.checkpoint import locate, read_json
from pointsman.models.decoder import Decoder
from pointsman.models.loader import load_model
from pointsman.request import MAX_VERSION_LENGTH

logger = logging.getLogger(__name__)

# what a checkpoint may say otherwise than the one before it: how its files are written, and layers that are not loaded
FREE_FIELDS = frozenset({"dtype", "num_draft_layers"})


@dataclass(frozen=True, eq=False)
class Fresh:
    """Weights that are ready to serve.

    Attributes:
        folder: the checkpoint they were read from; None where they came otherwise.
        version: what they are to be called; None counts on.
    """

    decoder: Decoder
    step: Step
    folder: Path | None
    version: str | None


class Weights:
    """The weights of an engine.

    Args:
        decoder: the model as it was loaded at the start, from this folder.
        make_step: the step over a model's weights, as at the start.
    """

    def __init__(self, config: EngineConfig, decoder: Decoder, folder: Path, make_step: Callable[[Decoder], Step]) -> None:
        self._config = config
        self._decoder = decoder
        self._folder = folder
        self._make_step = make_step

    @property
    def architecture(self) -> Architecture:
        return self._decoder.architecture

    def from_disk(self, model_path: str, *, version: str | None = None) -> Fresh:
        """Read a checkpoint of the same architecture; any thread may.

        Raises:
            ValueError: it cannot be read, is another model's, or is broken; the message says what is wrong.
        """
        check_version(version)
        folder = locate(model_path)
        self._check_same(folder, architecture_of(read_json(folder, "config.json")))
        decoder = load_decoder(self._config, folder, self._decoder.device, load_format="auto", progress=False)
        return Fresh(decoder, self._make_step(decoder), folder, version)

    def _check_same(self, folder: Path, found: Architecture) -> None:
        names = [field.name for field in dataclasses.fields(Architecture) if field.name not in FREE_FIELDS]
        pairs = [(name, getattr(found, name), getattr(self.architecture, name)) for name in names]
        if others := [f"{name} is {new!r} where the model that serves has {old!r}" for name, new, old in pairs if new != old]:
            raise ValueError(f"{folder} is another model's checkpoint: {'; '.join(others)}")

    def enter(self, fresh: Fresh) -> None:
        """These are in force now."""
        self._decoder = fresh.decoder
        self._folder = fresh.folder or self._folder


def load_decoder(config: EngineConfig, folder: Path, device: torch.device, *, load_format: str, progress: bool | None) -> Decoder:
    """A model from a folder, as the configuration wants it. Raises ValueError."""
    return load_model(
        folder,
        dtype=config.model.dtype,
        load_format=load_format,
        quantization=config.model.quantization,
        linear_backend=config.kernel.fp8_gemm_backend,
        attention_backend=config.kernel.attention_backend,
        moe_backend=config.kernel.moe_runner_backend,
        deterministic=config.kernel.enable_deterministic_inference,
        device=device,
        seed=config.model.random_seed,
        progress=progress,
    )


def check_version(version: str | None) -> None:
    """Raises ValueError where it cannot be the name of weights."""
    if version is not None and not (isinstance(version, str) and 0 < len(version) <= MAX_VERSION_LENGTH):
        raise ValueError(f"weight_version is {version!r:.80}; it must be a string of 1 to {MAX_VERSION_LENGTH} characters")
