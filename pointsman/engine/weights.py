"""The weights in force, and how others take their place.

New weights are read, checked and brought into the form of the step beside those that serve, by whichever thread asks for it, and become
one object, `Fresh`. Putting that in place is a change of references between two steps. So an update that fails has
changed nothing, one that succeeds is what a fresh start would have made, by the same calls, and no step waits for a file. The price
is memory: for as long as an update takes there are two models.

On a device one thing cannot be done beside the steps: what launches of another thread would fall into a graph that is being captured. There
the step of the new weights is made by the thread that steps, when none is under way (`complete`), and before the old one is let go.

Weights and cache can be released, to leave their memory to others for a time. There is no step then. Weights come back from the folder
that was read last, under the name that they had then, or as a full update; the step is made anew when all is there.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from pointsman.config import EngineConfig
from pointsman.distributed import Group, Mesh
from pointsman.engine.device import return_memory
from pointsman.engine.memory import kv_dtype_of
from pointsman.engine.model_runner import Step
from pointsman.engine.storage import CacheStorage
from pointsman.models import architecture_of
from pointsman.models.architecture import Architecture
from pointsman.models.decoder import Decoder
from pointsman.models.folder import locate, read_json
from pointsman.models.loader import load_model, rows_for
from pointsman.models.revision import Revision
from pointsman.request import FIRST_VERSION, MemoryTag
from pointsman.update import WHOLE, Update

logger = logging.getLogger(__name__)

# what a checkpoint may say otherwise than the one before it: how its files are written, and layers that are not loaded
_DTYPES = {"bfloat16": "BF16", "float32": "F32", "float8_e4m3fn": "F8_E4M3"}
FREE_FIELDS = frozenset({"dtype", "num_draft_layers"})
Announced = tuple[str, str, tuple[int, ...]]
"""Name, type (as safetensors or torch call it) and shape of a tensor that is to be broadcast."""


@dataclass(frozen=True)
class Source:
    """A folder, how it is read, and what its files were like then: size and time of each."""

    folder: Path
    load_format: str
    files: frozenset[tuple[str, int, int]]

    @staticmethod
    def of(folder: Path, load_format: str) -> Source:
        found = [(path.name, path.stat()) for path in folder.glob("*.safetensors")]
        return Source(folder, load_format, frozenset((name, status.st_size, status.st_mtime_ns) for name, status in found))

    def check(self) -> None:
        """Raises ValueError where it would not be the same weights that are read now."""
        if not self.folder.is_dir() or Source.of(self.folder, self.load_format) != self:
            raise ValueError(f"{self.folder} is not what it was when its weights were read; bring new ones by an update")


@dataclass(frozen=True, eq=False)
class Fresh:
    """Weights that are ready to serve.

    Attributes:
        decoder: None where they are released, and only the cache has come back.
        step: None while something is released that it needs, and where only `Weights.complete` can make it.
        source: where they were read; None where they came otherwise.
        update: what becomes of what the weights before have computed, and what these are called.
        same: these have been in force before, and nothing has changed.
        restored: the cache has come back with them.
    """

    decoder: Decoder | None
    step: Step | None
    source: Source | None = None
    update: Update = WHOLE
    same: bool = False
    restored: bool = False


class Weights:
    """The weights of an engine.

    Args:
        decoder: the model as it was loaded at the start, from this folder.
        storage: of the cache.
        make_step: the step over a model's weights and the cache, as at the start.
        aside: a step may be made while another one runs.

    Attributes:
        released: what is not there.
    """

    def __init__(
        self,
        config: EngineConfig,
        decoder: Decoder,
        folder: Path,
        storage: CacheStorage,
        make_step: Callable[[Decoder], Step],
        *,
        aside: bool,
    ) -> None:
        self._config = config
        self._decoder: Decoder | None = decoder
        self._device, self._backends, self._dtype = decoder.device, decoder.backends, decoder.dtype
        self._source, self._source_version = Source.of(folder, config.model.load_format), FIRST_VERSION
        self._is_source = True
        self._storage = storage
        self._make_step, self._aside = make_step, aside
        self._shard, self._mesh = decoder.shard, decoder.mesh
        self.architecture = decoder.architecture
        self.released: tuple[MemoryTag, ...] = ()
        self._revision: Revision | None = None
        self._group: Group | None = None

    def _gone(self) -> tuple[MemoryTag, ...]:
        gone: dict[MemoryTag, bool] = {"weights": self._decoder is None, "kv_cache": self._storage.released}
        return tuple(tag for tag, is_gone in gone.items() if is_gone)

    def from_disk(self, model_path: str, update: Update = WHOLE) -> Fresh:
        """Read a checkpoint of the same architecture; any thread may.

        Raises:
            ValueError: it cannot be read, is another model's, or is broken; the message says what is wrong.
        """
        folder = locate(model_path)
        self._check_same(folder, architecture_of(read_json(folder, "config.json")))
        source = Source.of(folder, "auto")
        decoder = load_decoder(self._config, folder, self._device, mesh=self._mesh, load_format=source.load_format, progress=False)
        return self._ready(Fresh(decoder, None, source, update))

    def _ready(self, fresh: Fresh) -> Fresh:
        """With its step, or with all of it that can be made beside the steps."""
        if self._aside:
            return self.complete(fresh)
        if fresh.decoder is not None:
            with self._or_released(fresh):
                fresh.decoder.prepare()
        return fresh

    def complete(self, fresh: Fresh) -> Fresh:
        """With the step that could not be made beside others. For the thread that steps, when none is under way.

        Raises whatever making it raises; what was released is so still, and nothing has changed.
        """
        if fresh.step is not None or fresh.decoder is None or self._storage.released:
            return fresh
        with self._or_released(fresh):
            return dataclasses.replace(fresh, step=self._make_step(fresh.decoder))

    @contextlib.contextmanager
    def _or_released(self, fresh: Fresh) -> Iterator[None]:
        """Where this fails the cache has not come back, either."""
        try:
            yield
        except BaseException:
            if fresh.restored:
                self._storage.release()
            raise

    def from_tensors(self, tensors: Mapping[str, Tensor], update: Update = WHOLE) -> Fresh | None:
        """Take in tensors by a checkpoint's names; the weights with all of an update's in their places once the final ones are there.

        One thread at a time. Before its final part an update gives None, and it is given up as a whole when a part is refused.

        Raises:
            ValueError: no update has begun, or the tensors cannot be used; the message names them.
        """
        revision = self._begun(update)
        revision.add(tensors, quantize=update.quantize)
        return self._staged(revision, update)

    def from_files(self, files: Sequence[bytes], update: Update = WHOLE) -> Fresh | None:
        """The same with tensors out of safetensors files. Raises ValueError also where one is none."""
        try:
            tensors = [load(data) for data in files]
        except SafetensorError as error:
            self._revision = None
            raise ValueError(f"this is not a whole safetensors file: {error}") from error
        names = [name for file in tensors for name in file]
        if len(set(names)) != len(names):
            self._revision = None
            raise ValueError("two of the files have a tensor of the same name")
        joined = {name: tensor for file in tensors for name, tensor in file.items()}
        return self.from_tensors(joined, update)

    def _begun(self, update: Update) -> Revision:
        """The update that is under way, taken out: it is put back when this part of it has come."""
        revision, self._revision = self._revision, None
        if update.begin:
            return Revision(self._shard, rows_for(self._backends.moe, self.architecture))
        if revision is None:
            raise ValueError("begin is false, but no update has begun, or a part of it was refused; begin it anew")
        return revision

    def _staged(self, revision: Revision, update: Update) -> Fresh | None:
        if not update.final:
            self._revision = revision
            return None
        old = None if self._decoder is None else self._decoder.parameters
        decoder = Decoder(self._shard, revision.apply(old, self._device), self._backends, self._dtype, self._mesh)
        return self._ready(Fresh(decoder, None, None, update))

    @property
    def device(self) -> torch.device:
        return self._device

    def give_up(self) -> None:
        """Drop an update that is under way in parts."""
        self._revision = None

    def join_group(self, group: Group) -> None:
        """Meet the trainer, and whoever else is in the group; one at a time. Raises ValueError where they do not all come in time."""
        if self._group is not None:
            raise ValueError(f"this engine is in the group {self._group.name!r}; leave that first")
        group.join()
        self._group = group

    def leave_group(self, name: str) -> None:
        """Raises ValueError where it is in no such group."""
        self._group_of(name)
        self._group = None

    def from_group(self, announced: Sequence[Announced], group_name: str, update: Update = WHOLE) -> Fresh | None:
        """The same with tensors that rank 0 of a group broadcasts, one after the other.

        Args:
            announced: all of them, in the order of the broadcasts.

        Raises:
            ValueError: as above, or they do not come in time. The group is left then, for nobody could tell what would come next.
        """
        group = self._group_of(group_name)
        self._group = None
        revision, quantize = self._begun(update), update.quantize
        forms = [
            (name, shape, revision.check(name, shape, _DTYPES.get(dtype, dtype), quantize=quantize)) for name, dtype, shape in announced
        ]
        if len({name for name, _, _ in forms}) != len(forms):
            raise ValueError("names has a tensor twice")
        tensors = {name: torch.empty(shape, dtype=dtype, device=self._device) for name, shape, dtype in forms}
        group.receive(list(tensors.values()))
        revision.add(tensors, quantize=quantize)
        fresh = self._staged(revision, update)
        self._group = group
        return fresh

    def _group_of(self, name: str) -> Group:
        if self._group is None or self._group.name != name:
            where = "no group" if self._group is None else f"the group {self._group.name!r}"
            raise ValueError(f"group_name is {name!r}, but this engine is in {where}; it leaves a group when an update fails")
        return self._group

    def _check_same(self, folder: Path, found: Architecture) -> None:
        if others := list(_differences(found, self.architecture, FREE_FIELDS)):
            raise ValueError(f"{folder} is another model's checkpoint: {'; '.join(others)}")

    def enter(self, fresh: Fresh, version: str) -> None:
        """These are in force now, and called so."""
        self._decoder = fresh.decoder
        self.released = self._gone()
        if fresh.same:
            return
        self._revision = None
        self._is_source = fresh.source is not None
        if fresh.source is not None:
            self._source, self._source_version = fresh.source, version

    def release(self, tags: Collection[MemoryTag]) -> None:
        """Free the memory of these. There must be no step over them any more."""
        if "weights" in tags:
            self._decoder = None
        if "kv_cache" in tags:
            self._storage.release()
        self.released = self._gone()
        return_memory(self._device)

    def restore(self, tags: Collection[MemoryTag]) -> Fresh:
        """Have again what was released, or none of it; any thread may, one at a time.

        Weights are read from the folder that was read last, whatever tensors have come since; it must be as it was.

        Raises:
            ValueError: it is no longer what it was.
        """
        source, again = self._source, "weights" in tags
        decoder = self._decoder
        if again:
            source.check()
            decoder = load_decoder(
                self._config, source.folder, self._device, mesh=self._mesh, load_format=source.load_format, progress=False
            )
        restored = "kv_cache" in tags
        if restored:
            self._storage.restore()
        fresh = Fresh(decoder, None, same=True, restored=restored)
        if again and not self._is_source:
            fresh = Fresh(decoder, None, source, Update(weight_version=self._source_version), restored=restored)
        return self._ready(fresh)


def load_decoder(
    config: EngineConfig, folder: Path, device: torch.device, *, mesh: Mesh, load_format: str, progress: bool | None
) -> Decoder:
    """A model from a folder, or this rank's part of it, as the configuration wants it. Raises ValueError."""
    return load_model(
        folder,
        dtype=config.model.dtype,
        load_format=load_format,
        quantization=config.model.quantization,
        linear_backend=config.kernel.fp8_gemm_backend,
        attention_backend=config.kernel.attention_backend,
        moe_backend=config.kernel.moe_runner_backend,
        kv_dtype=kv_dtype_of(config),
        deterministic=config.kernel.enable_deterministic_inference,
        device=device,
        seed=config.model.random_seed,
        progress=progress,
        mesh=mesh,
    )


def _differences(found: Any, served: Any, free: Collection[str] = ()) -> Iterator[str]:
    """Which fields of two descriptions differ, parts by their own fields."""
    for name in (field.name for field in dataclasses.fields(found) if field.name not in free):
        new, old = getattr(found, name), getattr(served, name)
        if dataclasses.is_dataclass(new) and type(new) is type(old):
            yield from _differences(new, old)
        elif new != old:
            yield f"{name} is {new!r} where the model that serves has {old!r}"
