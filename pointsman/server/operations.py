"""What those who run a server may ask of it, in SGLang's words."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from pointsman.request import MemoryTag, PauseMode
from pointsman.server import bounds


class PauseRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """What becomes of the requests that are there."""

    mode: PauseMode = "abort"


class ContinueRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Nothing to say."""


class MemoryRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Which memory; all, where nothing is said."""

    tags: Annotated[list[MemoryTag], Meta(min_length=1, max_length=2)] | None = None


class UpdateFields(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """What all updates have: what becomes of what the weights before have computed, and what the new ones are called."""

    flush_cache: bool = True
    abort_all_requests: bool = False
    weight_version: bounds.WeightVersion | None = None


class UpdateFromDiskRequest(UpdateFields, kw_only=True, forbid_unknown_fields=True):
    """Which checkpoint."""

    model_path: bounds.ModelPath


class Part(UpdateFields, kw_only=True, forbid_unknown_fields=True):
    """What all updates by tensors have besides: whether this is all of it, and whether it is quantized here."""

    begin: bool = True
    final: bool = True
    quantize: bool = False


class UpdateFromTensorRequest(Part, kw_only=True, forbid_unknown_fields=True):
    """Tensors, as safetensors files in base64."""

    serialized_named_tensors: str | Annotated[list[str], Meta(min_length=1, max_length=bounds.MAX_FILES)]


class UpdateFromDistributedRequest(Part, kw_only=True, forbid_unknown_fields=True):
    """What rank 0 of a group is going to broadcast, tensor by tensor."""

    names: Annotated[list[bounds.Name], Meta(min_length=1, max_length=bounds.MAX_TENSORS)]
    dtypes: Annotated[list[bounds.Name], Meta(min_length=1, max_length=bounds.MAX_TENSORS)]
    shapes: Annotated[list[bounds.Shape], Meta(min_length=1, max_length=bounds.MAX_TENSORS)]
    group_name: bounds.Name = "weight_update_group"


class InitGroupRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Where a process group meets, and who this engine is in it; rank 0 is the trainer."""

    master_address: bounds.Name
    master_port: Annotated[int, Meta(ge=1, le=65535)]
    rank_offset: Annotated[int, Meta(ge=1, le=1023)] = 1
    world_size: Annotated[int, Meta(ge=2, le=1024)]
    group_name: bounds.Name = "weight_update_group"
    backend: Literal["gloo", "nccl"] = "nccl"
    timeout: Annotated[float, Meta(ge=1, le=3600)] = 60.0


class DestroyGroupRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Which group to leave."""

    group_name: bounds.Name = "weight_update_group"


# Fields of SGLang that are not supported, with the values that change nothing.
NO_EFFECT: dict[type[msgspec.Struct], dict[str, tuple[Any, ...]]] = {
    PauseRequest: {},
    ContinueRequest: {"torch_empty_cache": (None, False)},
    MemoryRequest: {},
    UpdateFromDiskRequest: {
        "is_async": (None, False),
        "keep_pause": (None, True),
        "load_format": (None, "auto", "safetensors"),
        "manifest": (None,),
        "recapture_cuda_graph": (None, False),
        "token_step": (None, 0),
        "torch_empty_cache": (None, False),
    },
    UpdateFromTensorRequest: {"load_format": (None,)},
    UpdateFromDistributedRequest: {"load_format": (None,)},
    InitGroupRequest: {},
    DestroyGroupRequest: {},
}
