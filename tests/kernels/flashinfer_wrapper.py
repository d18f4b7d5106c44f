"""FlashInfer's wrapper for paged prefill as it is documented, in torch, behind the signatures of a version.

What the launcher checks is checked, and raises as it does: fixed numbers of requests and rows, room in buffers and workspaces, layouts.
What a graph would read when it is replayed (rows, pages, lengths) is read from the buffers that the wrapper was given, when it runs; what
it would have kept from its capture (tile, grid, places in the workspaces) must not change from plan to plan. Written from the library's
documentation and launchers (versions 0.6.8 to 0.7.2), and sharing no code with what calls it.

Shape suffixes: T rows, Q query heads, C channels of a head, P pages, H key/value heads, S slots of a page, X positions.
"""

from __future__ import annotations

import inspect
import math
import sys
import types
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.moe.libraries.products import check
from tests.moe.libraries.signatures import known, signature

NAME = "BatchPrefillWithPagedKVCacheWrapper"
VERSIONS = tuple(known()["flashinfer-python"])
METHODS = ("__init__", "reset_workspace_buffer", "plan", "run")
NUM_PROCESSORS = 148


class Emulation:
    """A version of the library.

    Attributes:
        exact: leave out what the kernel rounds beyond the reference, so that a layout's fault cannot hide in it.
        calls: method and arguments of each call.
    """

    def __init__(self, version: str, *, exact: bool = False, signatures: dict[str, inspect.Signature] | None = None) -> None:
        self.version, self.exact = version, exact
        self.calls: list[tuple[str, dict[str, Any]]] = []
        entries = known()["flashinfer-python"][version]["functions"]
        self.signatures = signatures or {name: signature(entries[f"{NAME}.{name}"]) for name in METHODS}
        self.library = types.ModuleType("flashinfer")
        setattr(self.library, NAME, type(NAME, (Wrapper,), {name: self._method(name) for name in METHODS}))

    def install(self, monkeypatch: pytest.MonkeyPatch) -> Emulation:
        monkeypatch.setitem(sys.modules, "flashinfer", self.library)
        return self

    def _method(self, name: str) -> Any:
        parameters, work = self.signatures[name], getattr(Wrapper, name.strip("_"))

        def call(*args: Any, **options: Any) -> Any:
            given = dict(parameters.bind(*args, **options).arguments)
            wrapper = given.pop("self")
            self.calls.append((name, given))
            return work(wrapper, self, **given)

        call.__name__, call.__signature__ = name, parameters  # type: ignore[attr-defined]
        return call


class Wrapper:
    """The methods, after their arguments were bound."""

    def init(
        self,
        library: Emulation,
        float_workspace_buffer: Tensor,
        kv_layout: str,
        use_cuda_graph: bool,
        qo_indptr_buf: Tensor,
        paged_kv_indptr_buf: Tensor,
        paged_kv_indices_buf: Tensor,
        paged_kv_last_page_len_buf: Tensor,
        backend: str,
    ) -> None:
        check(use_cuda_graph and kv_layout == "HND" and backend == "fa2", "what is emulated")
        self.library = library
        self.buffers = qo_indptr_buf, paged_kv_indptr_buf, paged_kv_indices_buf, paged_kv_last_page_len_buf
        check(all(buffer.dtype == torch.int32 and buffer.is_contiguous() for buffer in self.buffers), "buffers are int32")
        self.fixed_batch_size = len(qo_indptr_buf) - 1
        check(len(paged_kv_indptr_buf) == self.fixed_batch_size + 1, "The length of paged_kv_indptr_buf should be batch_size + 1.")
        check(len(paged_kv_last_page_len_buf) == self.fixed_batch_size, "The length of paged_kv_last_page_len_buf should be batch_size.")
        self.float_bytes = self.int_bytes = 0
        self.kept: tuple[int, ...] | None = None
        self.most_rows: int | None = None

    def reset_workspace_buffer(self, library: Emulation, float_workspace_buffer: Tensor, int_workspace_buffer: Tensor) -> None:
        for buffer in float_workspace_buffer, int_workspace_buffer:
            check(buffer.dtype == torch.uint8 and buffer.data_ptr() % 16 == 0, "workspace buffers must be 16-byte aligned")
        self.float_bytes, self.int_bytes = len(float_workspace_buffer), len(int_workspace_buffer)

    def plan(
        self,
        library: Emulation,
        qo_indptr: Tensor,
        paged_kv_indptr: Tensor,
        paged_kv_indices: Tensor,
        paged_kv_last_page_len: Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim_qk: int,
        page_size: int,
        causal: bool,
        sm_scale: float,
        q_data_type: torch.dtype,
        kv_data_type: torch.dtype,
        max_token_per_sequence: int,
    ) -> None:
        given = qo_indptr, paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len
        check(all(part.dtype == torch.int32 and part.dim() == 1 for part in given), "indptr, indices and lengths are int32")
        check(
            all(part.device.type == "cpu" for part in (qo_indptr, paged_kv_indptr, paged_kv_last_page_len)), "from the device is waited for"
        )
        batch = len(qo_indptr) - 1
        check(batch == self.fixed_batch_size, "The batch size should be fixed during the lifecycle of the wrapper")
        check(len(paged_kv_indices) <= len(self.buffers[2]), "The length of paged_kv_indices exceeds the allocated buffer size.")
        check(len(paged_kv_indices) == int(paged_kv_indptr[-1]), "as many pages as the last one's end says")
        num_rows = int(qo_indptr[-1])
        self.most_rows = self.most_rows or num_rows
        check(num_rows <= self.most_rows, "The total number of rows in qo_indptr cannot exceed those set during initialization")
        rows, pages = qo_indptr.diff(), paged_kv_indptr.diff()
        check(bool((rows >= 0).all()) and bool((pages >= 0).all()), "should be non-negative")
        check(max_token_per_sequence >= int(rows[pages > 0].max()) if bool((pages > 0).any()) else True, "a longer request")
        last = paged_kv_last_page_len
        check(bool(torch.where(pages > 0, (last >= 1) & (last <= page_size), last == 0).all()), "1 <= paged_kv_last_page_len <= page_size")
        check(head_dim_qk in (64, 128, 256) and num_qo_heads % num_kv_heads == 0, "num_qo_heads should be divisible by num_kv_heads")
        check(q_data_type == torch.bfloat16 and kv_data_type in (torch.bfloat16, torch.float8_e4m3fn), "types that there is a kernel for")
        check(causal, "what is emulated")
        self.heads, self.page_size, self.scale, self.types = (
            (num_qo_heads, num_kv_heads, head_dim_qk),
            page_size,
            sm_scale,
            (
                q_data_type,
                kv_data_type,
            ),
        )
        kept = self.launch(rows.tolist(), pages.tolist())
        check(self.kept in (None, kept), f"a captured graph has {self.kept}, and this plan {kept}")
        self.kept, self.last_row = kept, num_rows
        for buffer, part in zip(self.buffers, given, strict=True):
            buffer[: len(part)].copy_(part)

    def launch(self, rows: list[int], pages: list[int]) -> tuple[int, ...]:
        """What a graph keeps of a plan: the grid and where its parts lie in the workspaces, which must hold them."""
        heads, kv_heads, channels = self.heads
        group, batch, most = heads // kv_heads, len(rows), self.most_rows
        assert most is not None
        longest = max(most - batch + 1, 0) * group
        tile = 128 if longest > 64 and channels < 256 else 64 if longest > 16 else 16
        split = 2 * NUM_PROCESSORS // kv_heads
        grid = max(split, -(-most * group // tile) + batch - 1)
        low, high = max(128 // self.page_size, 1), max([*pages, 1])
        while low < high:
            middle = (low + high) // 2
            tiles = sum(-(-n * group // tile) * -(-max(p, 1) // middle) for n, p in zip(rows, pages, strict=True))
            low, high = (middle + 1, high) if tiles > split else (low, middle)
        tiles = sum(-(-n * group // tile) * -(-max(p, 1) // low) for n, p in zip(rows, pages, strict=True))
        check(tiles <= grid, "new batch size should not exceed padded batch size")

        def place(*sizes: int) -> int:
            end = 0
            for size in sizes:
                end = -(-end // 16) * 16 + size
            return end

        whole = place(*[4 * grid] * 3, 4 * (batch + 1), 4, 4, 4 * (most + 1), grid)
        check(whole <= self.int_bytes, f"Failed to allocate memory for batch_prefill of {whole} bytes")
        parts = heads * grid * tile
        check(place(4 * parts * channels, 4 * parts) <= self.float_bytes, "Failed to allocate memory for batch_prefill_tmp_v")
        return tile, grid, whole

    def run(self, library: Emulation, q: Tensor, paged_kv_cache: tuple[Tensor, Tensor], out: Tensor) -> Tensor:
        k_PHSC, v_PHSC = paged_kv_cache
        heads, kv_heads, channels = self.heads
        check(q.shape == (self.last_row, heads, channels) and out.shape == q.shape, "q must have shape [total_tokens, num_heads, head_dim]")
        check((q.dtype, k_PHSC.dtype) == self.types and out.dtype == q.dtype, "The dtype of q and kv does not match that of plan")
        check(k_PHSC.shape[1:] == (kv_heads, self.page_size, channels) and k_PHSC.shape == v_PHSC.shape, "HND pages")
        check(k_PHSC.stride() == v_PHSC.stride() and k_PHSC.stride(-1) == 1 and q.stride(-1) == 1, "k/v strides differs")
        rows, pages, indices, last = self.buffers
        for index in range(self.fixed_batch_size):
            mine = slice(int(rows[index]), int(rows[index + 1]))
            used = indices[int(pages[index]) : int(pages[index + 1])].long()
            length = 0 if not len(used) else (len(used) - 1) * self.page_size + int(last[index])
            out[mine] = self.attend(q[mine], *(self.read(cache, used, length) for cache in (k_PHSC, v_PHSC)))
        return out

    def read(self, cache_PHSC: Tensor, used: Tensor, length: int) -> Tensor:
        raw = cache_PHSC.view(torch.uint8)[used].view(cache_PHSC.dtype) if cache_PHSC.element_size() == 1 else cache_PHSC[used]
        return raw.float().transpose(0, 1).flatten(1, 2)[:, :length]

    def attend(self, q_TQC: Tensor, k_HXC: Tensor, v_HXC: Tensor) -> Tensor:
        """Right-aligned causal attention of a request, as sums over unnormed weights; nothing where there are no positions."""
        heads, kv_heads, _ = self.heads
        if not len(q_TQC) or not k_HXC.shape[1]:
            return torch.zeros_like(q_TQC)
        k_QXC, v_QXC = (part.repeat_interleave(heads // kv_heads, 0) for part in (k_HXC, v_HXC))
        scores_QTX = torch.einsum("tqc,qxc->qtx", q_TQC.float(), k_QXC) * (self.scale * math.log2(math.e))
        row, position = torch.arange(len(q_TQC))[:, None], torch.arange(k_HXC.shape[1])[None]
        scores_QTX = scores_QTX.masked_fill(position + len(q_TQC) > k_HXC.shape[1] + row, float("-inf"))
        weights_QTX = torch.exp2(scores_QTX - scores_QTX.amax(-1, keepdim=True))
        total_QT1 = weights_QTX.sum(-1, keepdim=True)
        if not self.library.exact:
            weights_QTX = weights_QTX.bfloat16().float()
        return (torch.einsum("qtx,qxc->qtc", weights_QTX, v_QXC) / total_QT1).transpose(0, 1).to(q_TQC.dtype)
