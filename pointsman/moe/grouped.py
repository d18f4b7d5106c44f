"""The experts on a GPU, in Triton kernels over pairs sorted by expert: runners `triton` and `routed`.

`triton` is the plain arrangement that other engines run by default and stands here for comparison: sort, product, activation,
product, sum, each a kernel that passes bfloat16 on. `routed` keeps the reference's numerics: hidden rows are made, activated and
quantized in one kernel, and a choice's output stays float32 until the sum (in batches of up to 1024 tokens). Its kernels are
chained: each is launched while the one before still runs, and waits inside for its results.

Both take a Routing on the device, ids below zero being padding, and keep no state: buffers come from torch's
allocator, which in a CUDA graph gives them the graph's own memory, and grids depend on shapes alone. With `deterministic` a
token's result does not depend on how many others there are: on Hopper, every cut of an FP8 product for wgmma has the same bits (seen
in 7 cuts of H100, which a test of the GPU repeats), so that only cuts for the older tensor cores are left out; the gate, and
products of plain weights or on other GPUs, are cut alike for all batches.

Triton is imported when a runner is made, for installs without it must be able to ask why it cannot serve.

Shape suffixes: T tokens, K experts per token, D hidden, P padded pairs, F expert width.
"""

from __future__ import annotations

import functools
import importlib
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor

from pointsman.kernels.capability import chains, is_hopper
from pointsman.kernels.tiles import Shape, Tile, Tiles, TileTable, device_key, for_wide_products
from pointsman.kernels.triton_support import GLUON, version
from pointsman.kernels.unsummed import Unsummed
from pointsman.moe.router import Wanted
from pointsman.moe.routing import Routing
from pointsman.moe.weights import ExpertWeights

if TYPE_CHECKING:
    from pointsman.kernels.arrange import Arrangement
    from pointsman.kernels.few_tokens import Few

BLOCK = 128
EXACT_TOKENS = 1024  # in larger batches a choice's output would be a third of all that moves, and is rounded to bfloat16
VECTOR_TOKENS = 1  # so few go pair by pair, without tensor cores: one was measured so on an H100
WIDE_ROWS = 64.0  # rows of an expert from which on wide tiles multiply: on Hopper they win from 2,048 tokens of 8 of 256 experts on
FIXED_TOKENS = 512  # the batch for which deterministic cuts are made


class _Grouped:
    """What both runners share: kernels, cuts, and weights as they are stored."""

    name: ClassVar[str]
    routes_itself: ClassVar[Literal[False]] = False

    def __init__(self, *, deterministic: bool = False, tiles: Tiles | None = None) -> None:
        self.deterministic, self._given = deterministic, tiles
        self._arrange = importlib.import_module("pointsman.kernels.arrange")
        self._gemm = importlib.import_module("pointsman.kernels.grouped_gemm")
        self._rows = importlib.import_module("pointsman.kernels.expert_rows")

    def prepare(self, weights: ExpertWeights, dtype: torch.dtype) -> ExpertWeights:
        return weights if weights.quantized else weights.dequantize(dtype)

    def _tiles(self, num_tokens: int, top_k: int, weights: ExpertWeights) -> Tiles:
        if self._given is not None:
            return self._given
        num_experts, hidden, width = weights.down.data.shape
        shape = Shape(num_experts=num_experts, top_k=top_k, hidden=hidden, width=width, quantized=weights.quantized)
        table = tile_table(self.name, shape, weights.down.data.device)
        if not self.deterministic:
            return table(num_tokens)
        # Hopper's FP8 products by wgmma have the same bits however they are cut; others are cut alike
        free = weights.quantized and is_hopper(weights.down.data.device)
        return for_wide_products(table(num_tokens)) if free else table(FIXED_TOKENS)


@functools.cache
def tile_table(runner: str, shape: Shape, device: torch.device) -> TileTable:
    """A runner's cuts of this shape on this device."""
    return TileTable(runner, shape, device_key(torch.cuda.get_device_name(device) if device.type == "cuda" else device.type))


class TritonRunner(_Grouped):
    """Sort, product, activation, product, sum; what passes between kernels is bfloat16."""

    name: ClassVar[str] = "triton"

    def __call__(self, x_TD: Tensor, routing: Routing, weights: ExpertWeights) -> Tensor:
        ids_TK, weights_TK = routing
        num_tokens, top_k = ids_TK.shape
        if num_tokens == 0:
            return torch.empty_like(x_TD)
        num_pairs, tiles, gemm = num_tokens * top_k, self._tiles(num_tokens, top_k, weights), self._gemm
        arranged, q_TD, scale_TG = self._arrange.arrange(ids_TK, weights.num_experts, tiles.up.block, x_TD if weights.quantized else None)
        both_PF = x_TD.new_empty(len(arranged.pairs_P), weights.gate_up.data.shape[1])
        rows_TD = x_TD if q_TD is None else q_TD
        gemm.gemm(rows_TD, scale_TG, weights.gate_up, arranged, num_pairs, tiles.up, both_PF, gather=top_k)
        h_PF, scale_PG = self._rows.activate(both_PF, arranged, num_pairs, tiles.up.block, quantize=weights.quantized)
        y_RD = x_TD.new_empty(num_pairs, x_TD.shape[1])
        gemm.gemm(h_PF, scale_PG, weights.down, arranged, num_pairs, tiles.down, y_RD)
        out_TD: Tensor = self._rows.combine(y_RD, ids_TK, weights_TK, x_TD.dtype)
        return out_TD


class RoutedRunner(_Grouped):
    """Sort and quantize; up, activate and quantize; down; sum: four chained kernels in the reference's numerics. The last may be left to
    the norm that follows (`unsummed`).

    Few tokens come sorted and quantized from the kernel that routes them (`run_few`), and one is multiplied pair by pair.
    """

    name: ClassVar[str] = "routed"

    def __init__(
        self,
        *,
        deterministic: bool = False,
        tiles: Tiles | None = None,
        wide_rows: float = WIDE_ROWS,
    ) -> None:
        super().__init__(deterministic=deterministic, tiles=tiles)
        self._wide_rows = wide_rows
        self._few = importlib.import_module("pointsman.kernels.few_tokens")
        self._vectors = importlib.import_module("pointsman.kernels.vector_products")

    def __call__(self, x_TD: Tensor, routing: Routing, weights: ExpertWeights) -> Tensor:
        return self.unsummed(x_TD, routing, weights).total() if len(x_TD) else torch.empty_like(x_TD)

    def unsummed(self, x_TD: Tensor, routing: Routing, weights: ExpertWeights) -> Unsummed:
        """All but the sum, of one token or more."""
        ids_TK = routing.ids_TK
        num_tokens, top_k = ids_TK.shape
        if self._is_wide(num_tokens * top_k / weights.num_experts, weights):
            return self._many(x_TD, routing, weights)
        num_pairs, tiles, gemm, pdl = num_tokens * top_k, self._tiles(num_tokens, top_k, weights), self._gemm, chains(x_TD.device)
        arranged, q_TD, scale_TG = self._arrange.arrange(
            ids_TK, weights.num_experts, tiles.up.block, x_TD if weights.quantized else None, pdl=pdl
        )
        rows_TD = x_TD if q_TD is None else q_TD
        h_PF, scale_PG = gemm.up(rows_TD, scale_TG, weights.gate_up, arranged, num_pairs, top_k, tiles.up, pdl=pdl)
        return self._down(h_PF, scale_PG, routing, arranged, weights, tiles.down, x_TD.dtype, pdl=pdl)

    def _down(
        self,
        h_PF: Tensor,
        scale_PG: Tensor | None,
        routing: Routing,
        arranged: Arrangement,
        weights: ExpertWeights,
        tile: Tile,
        dtype: torch.dtype,
        *,
        pdl: bool,
    ) -> Unsummed:
        """What `down` makes of hidden rows."""
        num_pairs, hidden = routing.ids_TK.numel(), weights.down.data.shape[1]
        exact = self.deterministic or len(routing.ids_TK) <= EXACT_TOKENS
        y_RD = torch.empty(num_pairs, hidden, dtype=torch.float32 if exact else torch.bfloat16, device=h_PF.device)
        self._gemm.gemm(h_PF, scale_PG, weights.down, arranged, num_pairs, tile, y_RD, pdl=pdl)
        return Unsummed(y_RD, *routing, dtype)

    def counters(self, device: torch.device) -> Tensor:
        """What a router counts with that routes few tokens."""
        made: Tensor = importlib.import_module("pointsman.kernels.routing").counters(self._few.NUM_COUNTERS, device)
        return made

    def wanted(self, num_tokens: int, top_k: int, weights: ExpertWeights) -> Wanted | None:
        """What `run_few` wants of so many tokens; None: they are to come as many do."""
        if self.deterministic or not weights.quantized or not 0 < num_tokens <= self._few.MOST_TOKENS:
            return None
        if self._in_vectors(num_tokens, top_k, weights):
            return Wanted(False, self._vectors.num_arrivals(num_tokens * top_k, weights.down.data.shape[2]))
        return Wanted(True, 0) if self._tiles(num_tokens, top_k, weights).up.block == self._few.ROWS.value else None

    def _in_vectors(self, num_tokens: int, top_k: int, weights: ExpertWeights) -> bool:
        """Whether pairs are so few that each is multiplied on its own."""
        fits: bool = self._vectors.takes_experts(num_tokens, top_k, *weights.down.data.shape[1:])
        return fits and num_tokens <= VECTOR_TOKENS and self._given is None

    def run_few(self, few: Few, weights: ExpertWeights) -> Tensor | Unsummed:
        """The same for few tokens as the kernel leaves them that routed them (`kernels.few_tokens`)."""
        (num_tokens, top_k), pdl = few.ids_TK.shape, chains(few.ids_TK.device)
        assert few.q_TD is not None and few.scale_TG is not None
        if self._in_vectors(num_tokens, top_k, weights):
            both = weights.gate_up, weights.down
            out_TD: Tensor = self._vectors.experts(few.q_TD, few.scale_TG, few.ids_TK, few.weights_TK, *both, few.zeros, pdl=pdl)
            return out_TD
        tiles, arranged, routing = self._tiles(num_tokens, top_k, weights), few.arrangement, Routing(few.ids_TK, few.weights_TK)
        assert arranged is not None
        h_PF, scale_PG = self._gemm.up(few.q_TD, few.scale_TG, weights.gate_up, arranged, num_tokens * top_k, top_k, tiles.up, pdl=pdl)
        return self._down(h_PF, scale_PG, routing, arranged, weights, tiles.down, torch.bfloat16, pdl=pdl)

    def _is_wide(self, rows: float, weights: ExpertWeights) -> bool:
        """Whether products are what takes the time, and of a form that there are wide tiles for."""
        fits = weights.quantized and weights.down.data.shape[1] % (2 * BLOCK) == 0 and self._given is None
        return fits and rows >= self._wide_rows and is_hopper(weights.down.data.device) and (version() or (0, 0)) >= GLUON

    def _many(self, x_TD: Tensor, routing: Routing, weights: ExpertWeights) -> Unsummed:
        """The same where products and not the memory are the limit: rows spread out by expert, products in wide tiles."""
        ids_TK = routing.ids_TK
        num_tokens, top_k = ids_TK.shape
        num_pairs, wide = num_tokens * top_k, importlib.import_module("pointsman.kernels.wide_gemm")
        processors = torch.cuda.get_device_properties(x_TD.device).multi_processor_count
        arranged, q_PD, scale_GP = self._arrange.spread(ids_TK, weights.num_experts, wide.ROWS, x_TD, pdl=True)
        h_PF, scale_HP = wide.up(q_PD, scale_GP, weights.gate_up, arranged, num_pairs, processors=processors, pdl=True)
        exact = self.deterministic or num_tokens <= EXACT_TOKENS
        y_RD = torch.empty(num_pairs, x_TD.shape[1], dtype=torch.float32 if exact else torch.bfloat16, device=x_TD.device)
        wide.down(h_PF, scale_HP, weights.down, arranged, num_pairs, y_RD, processors=processors, pdl=True)
        return Unsummed(y_RD, *routing, x_TD.dtype)
