"""The trainer's side of weights in flight: new weights into a running server, by HTTP or over a process group.

    sync = WeightSync("http://127.0.0.1:30000")
    sync.push(published_names(model.state_dict()), version="7", quantize=True)

An update crosses in buckets and comes into force as a whole, with the last of them; whatever goes wrong before leaves the old weights
serving, and raises. torch and the standard library are all that is needed.
"""

from __future__ import annotations

import json
import re
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any
from urllib.parse import urlencode

import torch
from safetensors.torch import save
from torch import Tensor

from pointsman.distributed import Group, listen
from pointsman.request import MemoryTag

BUCKET_BYTES = 16 << 20
_EXPERTS = re.compile(r"(.*)\.mlp\.experts\.(gate_up_proj|down_proj)")
_MINIMAX, _PROJECTIONS = ("block_sparse_moe", "w1", "w3", "w2"), ("mlp", "gate_proj", "up_proj", "down_proj")
_PUBLISHED = {"minimax_m2": _MINIMAX, "mixtral": _MINIMAX, "qwen3_moe": _PROJECTIONS, "glm4_moe": _PROJECTIONS}


class SyncFailed(RuntimeError):
    """The server did not take the weights, and goes on with the old ones; the message is its reason."""


class WeightSync:
    """One server, seen by a trainer.

    Args:
        url: where the server is.
        admin_key: its admin key, or its API key where it has no other; None where it has neither.
        bucket_bytes: tensors are sent together up to so many bytes; a larger one goes alone.
        timeout: seconds that one request to the server may take.
    """

    def __init__(self, url: str, admin_key: str | None = None, *, bucket_bytes: int = BUCKET_BYTES, timeout: float = 600.0) -> None:
        self._url = url.rstrip("/")
        self._headers = {} if admin_key is None else {"authorization": f"Bearer {admin_key}"}
        self._bucket_bytes = bucket_bytes
        self._timeout = timeout
        self._group: Group | None = None
        # no proxy: weights go to the address that was given
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    @property
    def version(self) -> str:
        """What the weights in force are called."""
        version: str = self._ask("/weight_version")["weight_version"]
        return version

    def pause(self, mode: str = "abort") -> None:
        """Let the server run no step; see `/pause_generation` for the modes."""
        self._post("/pause_generation", {"mode": mode})

    def resume(self) -> None:
        """Let it run steps again."""
        self._post("/continue_generation", {})

    def release_memory(self, *tags: MemoryTag) -> None:
        """Have it free memory, and run no step until it has it again; see `/release_memory_occupation`.

        Args:
            tags: "weights", "kv_cache", or both; both where none is named.

        Raises:
            SyncFailed: requests are running, or it is released already.
        """
        self._post("/release_memory_occupation", {"tags": list(tags)} if tags else {})

    def resume_memory(self, *tags: MemoryTag) -> str:
        """Have it take the memory of these again. Returns the version of the weights, which are again those of the folder read last.

        Args:
            tags: as for `release_memory`; after a `push` of all weights these need no more than "kv_cache".

        Raises:
            SyncFailed: it is not released, or the folder is not what it was.
        """
        version: str = self._post("/resume_memory_occupation", {"tags": list(tags)} if tags else {})["weight_version"]
        return version

    def push(
        self,
        tensors: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]],
        *,
        version: str | None = None,
        quantize: bool = False,
        dtype: torch.dtype | None = None,
        flush_cache: bool = True,
        abort_all_requests: bool = False,
    ) -> str:
        """Put these weights in force, all or none, over the group that was connected or else by HTTP. Returns their version.

        Args:
            tensors: under the names of a checkpoint; others than these stay. May be made one by one.
            version: what the new weights are called; None counts on.
            quantize: plain matrices become FP8 where the model is.
            dtype: matrices but the router's are rounded to this type before they are sent; None sends what is there.

        Raises:
            SyncFailed: the server refused, with its reason, or did not answer.
        """
        named = tensors.items() if isinstance(tensors, Mapping) else tensors
        rounded = ((name, _rounded(name, tensor.detach(), dtype)) for name, tensor in named)
        common: dict[str, Any] = {"quantize": quantize, "flush_cache": flush_cache, "abort_all_requests": abort_all_requests}
        if version is not None:
            common["weight_version"] = version
        send = self._send if self._group is None else self._broadcast
        answer: dict[str, Any] = {}
        begin = True
        for bucket, final in _last_known(_buckets(rounded, self._bucket_bytes)):
            answer = send(bucket, common | {"begin": begin, "final": final})
            begin = False
        if not answer:
            raise SyncFailed("there are no tensors to send")
        pushed: str = answer["weight_version"]
        return pushed

    def connect(
        self,
        *,
        master_address: str = "127.0.0.1",
        master_port: int | None = None,
        group_name: str = "weight_update_group",
        backend: str = "gloo",
        timeout: float = 60.0,
    ) -> None:
        """Make a process group with the server, with each of its ranks; from now on weights are broadcast over it.

        Args:
            master_address: of this machine, as the server reaches it; nothing listens at any other.
            master_port: None takes a free one.
            backend: "gloo", or "nccl" where the server's model is on a CUDA device; then tensors are sent from the one that is current now.
            timeout: seconds that joining, and the broadcasts of one bucket, may take.

        Raises:
            SyncFailed: the port is taken, or the server refused, or did not come.
        """
        ranks: int = self._ask("/server_info")["engine"]["parallel"]["tensor_parallel_size"]
        try:
            listener = listen(master_address, master_port or 0)
        except OSError as error:
            raise SyncFailed(f"cannot listen on {master_address} port {master_port or 0}: {error}") from error
        port = listener.getsockname()[1]
        here = {"master_address": master_address, "master_port": port, "world_size": 1 + ranks, "backend": backend, "timeout": timeout}
        group = Group(**here, rank=0, name=group_name)  # type: ignore[arg-type]
        self._together(lambda: group.join(listener), "/init_weights_update_group", here | {"rank_offset": 1, "group_name": group_name})
        self._group = group

    def disconnect(self) -> None:
        """Have the server leave the group, and leave it."""
        if self._group is not None:
            group, self._group = self._group, None
            self._post("/destroy_weights_update_group", {"group_name": group.name})

    def _send(self, bucket: dict[str, Tensor], fields: dict[str, Any]) -> dict[str, Any]:
        query = urlencode({name: str(value).lower() if isinstance(value, bool) else value for name, value in fields.items()})
        data = save({name: tensor.cpu().contiguous() for name, tensor in bucket.items()})
        return self._ask(f"/update_weights_from_tensor?{query}", data, "application/octet-stream")

    def _broadcast(self, bucket: dict[str, Tensor], fields: dict[str, Any]) -> dict[str, Any]:
        group = self._group
        assert group is not None
        announced = {
            "names": list(bucket),
            "dtypes": [str(tensor.dtype).removeprefix("torch.") for tensor in bucket.values()],
            "shapes": [list(tensor.shape) for tensor in bucket.values()],
            "group_name": group.name,
        }

        try:
            return self._together(lambda: group.send(list(bucket.values())), "/update_weights_from_distributed", fields | announced)
        except SyncFailed:
            self._group = None  # the server has left it
            raise

    def _together(self, mine: Callable[[], None], path: str, fields: dict[str, Any]) -> dict[str, Any]:
        """Do my part while the server does its own. What the server says of a failure is the better reason."""
        failures: list[Exception] = []

        def run() -> None:
            try:
                mine()
            except ValueError as error:
                failures.append(error)

        beside = threading.Thread(target=run, daemon=True)
        beside.start()
        answer = self._post(path, fields)
        beside.join()
        if failures:
            raise SyncFailed(str(failures[0])) from failures[0]
        return answer

    def _post(self, path: str, fields: dict[str, Any]) -> dict[str, Any]:
        return self._ask(path, json.dumps(fields).encode(), "application/json")

    def _ask(self, path: str, data: bytes | None = None, media: str | None = None) -> dict[str, Any]:
        headers = self._headers if media is None else self._headers | {"content-type": media}
        request = urllib.request.Request(self._url + path, data=data, headers=headers)
        try:
            with self._opener.open(request, timeout=self._timeout) as response:
                answer: dict[str, Any] = json.load(response)
                return answer
        except urllib.error.HTTPError as error:
            raise SyncFailed(_reason(error)) from error
        except OSError as error:
            raise SyncFailed(f"the server at {self._url} does not answer: {error}") from error


def published_names(tensors: Mapping[str, Tensor], model_type: str = "minimax_m2") -> Iterator[tuple[str, Tensor]]:
    """The tensors of a Hugging Face model in memory under the names that its checkpoints have; others pass as they are.

    In memory transformers has the experts of a layer in two stacks, [experts, 2 * width, hidden] and [experts, hidden, width].

    Args:
        model_type: as the model's config has it.

    Raises:
        ValueError: the names of such a model are not known here.
    """
    if model_type not in _PUBLISHED:
        raise ValueError(f"model_type is {model_type!r:.80}; names are known of {', '.join(_PUBLISHED)}")
    block, gate_name, up_name, down_name = _PUBLISHED[model_type]
    for name, tensor in tensors.items():
        stack = _EXPERTS.fullmatch(name)
        if stack is None:
            yield name.replace(".mlp.", f".{block}."), tensor
            continue
        for expert, matrix in enumerate(tensor):
            at = f"{stack[1]}.{block}.experts.{expert}"
            if stack[2] == "down_proj":
                yield f"{at}.{down_name}.weight", matrix
            else:
                gate, up = matrix.chunk(2)
                yield f"{at}.{gate_name}.weight", gate
                yield f"{at}.{up_name}.weight", up


def _rounded(name: str, tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    plain = tensor.dtype.is_floating_point and tensor.element_size() > 1 and tensor.dim() > 1
    return tensor.to(dtype) if dtype is not None and plain and not name.endswith((".gate.weight", "_scale_inv", "_scale")) else tensor


def _buckets(named: Iterable[tuple[str, Tensor]], most: int) -> Iterator[dict[str, Tensor]]:
    """Tensors together, up to so many bytes; numbers and their scales may be apart."""
    bucket: dict[str, Tensor] = {}
    size = 0
    for name, tensor in named:
        if bucket and size + tensor.nbytes > most:
            yield bucket
            bucket, size = {}, 0
        bucket[name] = tensor
        size += tensor.nbytes
    if bucket:
        yield bucket


def _last_known(buckets: Iterator[dict[str, Tensor]]) -> Iterator[tuple[dict[str, Tensor], bool]]:
    """Each with whether it is the last."""
    before: dict[str, Tensor] | None = None
    for bucket in buckets:
        if before is not None:
            yield before, False
        before = bucket
    if before is not None:
        yield before, True


def _reason(error: urllib.error.HTTPError) -> str:
    text = error.read().decode(errors="replace")
    try:
        return str(json.loads(text)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return f"{error.code} {text[:200]}"
