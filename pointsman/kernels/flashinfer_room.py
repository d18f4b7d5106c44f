"""How many requests a step of FlashInfer's attention has, and the memory that its plans take: the launcher's own bounds, without tensors.

A plan cuts a step into tiles: some rows of (token, query head of a group), and a part of their sequence. The library says how large its
workspaces must be when one is too small, or from 0.7 on when it is asked with a plan at hand; an engine must know before there is any.
"""

from __future__ import annotations

from pointsman.kernels.candidates import AttentionShape, StepBounds

# programs for each processor, of which no GPU has more; rows of the widest and of the narrowest tile
PROGRAMS_EACH, MOST_PROCESSORS, WIDEST, NARROWEST = 2, 160, 128, 16
SLACK = 4096  # of alignment


def num_requests(num_rows: int, num_lanes: int) -> int:
    """As many as a step of so many rows may need: a run for each lane, and the rows that pad."""
    return min(num_rows, num_lanes) + 1


def float_bytes(shape: AttentionShape, bounds: StepBounds) -> int:
    """What parts of sequences are summed in, by the bound of 0.6; later versions take less."""
    _, tiles = _most_tiles(shape, bounds, WIDEST)
    return shape.num_heads * tiles * WIDEST * (shape.head_dim + 1) * 4 + SLACK


def int_bytes(shape: AttentionShape, bounds: StepBounds) -> int:
    """What a plan is written in: three numbers and a mark for each tile, one for each row, and one for each request."""
    requests, tiles = _most_tiles(shape, bounds, NARROWEST)
    return 13 * tiles + 4 * (bounds.sizes[-1] + 1) + 4 * (requests + 1) + SLACK


def num_bytes(shape: AttentionShape, bounds: StepBounds) -> int:
    """All that a planner keeps on the device: the two, and the pages of every lane."""
    return float_bytes(shape, bounds) + int_bytes(shape, bounds) + 4 * bounds.num_lanes * bounds.max_pages


def _most_tiles(shape: AttentionShape, bounds: StepBounds, tile: int) -> tuple[int, int]:
    """Requests and tiles of the largest step."""
    num_rows, group = bounds.sizes[-1], shape.num_heads // shape.num_kv_heads
    requests = num_requests(num_rows, bounds.num_lanes)
    split = PROGRAMS_EACH * MOST_PROCESSORS // shape.num_kv_heads
    return requests, max(split, -(-num_rows * group // tile) + requests - 1)
