"""What those who run a server may ask of it, in SGLang's words."""

from __future__ import annotations

from typing import Any

import msgspec

from pointsman.request import PauseMode
from pointsman.server import bounds


class PauseRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """What becomes of the requests that are there."""

    mode: PauseMode = "abort"


class ContinueRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Nothing to say."""


class UpdateFromDiskRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Which checkpoint, and what becomes of what its predecessor has computed."""

    model_path: bounds.ModelPath
    flush_cache: bool = True
    abort_all_requests: bool = False
    weight_version: bounds.WeightVersion | None = None


# Fields of SGLang that are not supported, with the values that change nothing.
NO_EFFECT: dict[type[msgspec.Struct], dict[str, tuple[Any, ...]]] = {
    PauseRequest: {},
    ContinueRequest: {"torch_empty_cache": (None, False)},
    UpdateFromDiskRequest: {
        "is_async": (None, False),
        "keep_pause": (None, True),
        "load_format": (None, "auto", "safetensors"),
        "manifest": (None,),
        "recapture_cuda_graph": (None, False),
        "token_step": (None, 0),
        "torch_empty_cache": (None, False),
    },
}
