"""A device step over Triton's kernels, in the interpreter or on the GPU where there is one, against the model's own forward.

The oracle runs the same kernels unpadded, with a plan of exactly the step's tiles. What pads a step must change no bit of the
other rows, and write nothing.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from pointsman.engine.batch import NONE, PENDING, Batch, Lanes
from pointsman.engine.device_lanes import DeviceLanes
from pointsman.engine.device_step import DeviceMemory, DeviceStep
from pointsman.kernels.operations import GLUES, INVARIANT_ATTENTIONS, INVARIANT_LINEARS
from pointsman.layers.context import Span, StepContext
from pointsman.layers.paged_kv import PagedKV
from pointsman.models.architecture import Architecture
from pointsman.models.backends import Backends
from pointsman.models.decoder import Decoder
from pointsman.models.loader import load_model
from pointsman.moe.capture import RouteStore
from pointsman.moe.load import DeviceExpertLoad
from pointsman.moe.router import INVARIANT_ROUTERS
from tests.kernels.interpreter import correct
from tests.models.checkpoints import Shape
from tests.models.families import model_of, save

correct()
SHAPE = Shape(layers=2, hidden=128, heads=3, kv_heads=1, head_dim=128, rotary_dim=64, experts=4, width=128, block=(128, 128))
PAGE_SIZE, PAGES, MAX_LANES = 4, 8, 3


@pytest.fixture(params=["minimax", "mixtral", "glm"])
def decoder(request: pytest.FixtureRequest, tmp_path: Path) -> Decoder:
    folder = SHAPE.write(tmp_path) if request.param == "minimax" else save(model_of(request.param), tmp_path)
    plain = load_model(folder, dtype="bfloat16", linear_backend="reference", moe_backend="reference")
    kernels = Backends(
        INVARIANT_LINEARS["triton"], INVARIANT_ATTENTIONS["triton"], GLUES["triton"], INVARIANT_ROUTERS["triton"], plain.backends.moe
    )
    return Decoder(plain.shard, plain.parameters, kernels, torch.bfloat16)


def memory(model: Architecture) -> DeviceMemory:
    sizes = {"num_layers": model.num_layers, "num_kv_heads": model.num_kv_heads, "head_dim": model.head_dim}
    kv = PagedKV.allocate(num_pages=MAX_LANES * PAGES + 1, page_size=PAGE_SIZE, dtype=torch.bfloat16, **sizes)
    for pages in (kv.k, kv.v):
        pages.fill_(float("nan"))
    routes = RouteStore(kv.num_slots, len(model.expert_layers), model.top_k, model.num_experts)
    routes.rows_SLK.fill_(255)
    cpu = torch.device("cpu")
    return DeviceMemory(kv=kv, routes=routes, lanes=DeviceLanes(MAX_LANES, PAGES, cpu), load=DeviceExpertLoad(routes, model.num_experts))


def batch_of(feed: list[tuple[int, int, list[int]]], pages_LP: np.ndarray, grown: bool) -> Batch:
    """Rows of (lane, start, tokens); logits of every row are wanted."""
    tokens, positions, lanes, segments = [], [], [], []
    for lane, start, ids in feed:
        segments.append((lane, len(tokens), len(ids)))
        tokens += ids
        positions += range(start, start + len(ids))
        lanes += [lane] * len(ids)
    at = np.array(positions)
    slots = pages_LP[lanes, at // PAGE_SIZE].astype(np.int64) * PAGE_SIZE + at % PAGE_SIZE
    growth = (np.arange(pages_LP.size), pages_LP.reshape(-1)) if grown else (NONE, NONE)
    return Batch(np.array(tokens), at, np.array(lanes), slots, 0, segments, np.arange(len(tokens)), [], NONE, [], *growth)


def test_padding_changes_no_bit_and_writes_nothing(decoder: Decoder) -> None:
    pages_LP = np.random.default_rng(0).permutation(MAX_LANES * PAGES).reshape(MAX_LANES, PAGES)
    tables = Lanes(MAX_LANES, PAGES, PAGE_SIZE, SHAPE.vocab, (), lambda start: None)
    model = decoder.architecture
    mine, theirs = memory(model), memory(model)
    step = DeviceStep(decoder, mine, sizes=(2, 8, 16))
    feeds = [
        [(0, 0, [5, 6, 7, 8, 9]), (2, 0, [11, 12, 13])],  # prefill alone
        [(0, 5, [PENDING]), (1, 0, [20, 21, 22, 23]), (2, 3, [14])],  # mixed, 6 rows in 8
        [(0, 6, [31])],  # decode, 1 row in 2
    ]
    mine.lanes.last_token_L[0] = 30
    for index, feed in enumerate(feeds):
        batch = batch_of(feed, pages_LP, index == 0)
        got = step(batch, tables)
        spans = [Span(*segment) for segment in batch.segments]
        context = StepContext(
            positions_T=torch.from_numpy(batch.positions_T),
            slots_T=torch.from_numpy(batch.slots_T),
            attention_plan=decoder.plan_attention(spans, len(batch.tokens_T)),
            page_table_LP=torch.from_numpy(pages_LP),
            kv=theirs.kv,
            routes=theirs.routes,
        )
        tokens_T = torch.from_numpy(np.where(batch.tokens_T == PENDING, 30, batch.tokens_T))
        want = decoder.forward(tokens_T, context, torch.from_numpy(batch.rows_R))
        assert torch.equal(got, want)
        theirs.load.count(context.slots_T)
    for one, other in ((mine.kv.k, theirs.kv.k), (mine.kv.v, theirs.kv.v)):
        assert torch.equal(one[:, :-1].nan_to_num(7.0), other[:, :-1].nan_to_num(7.0)) and one[:, -1].isnan().all()
    assert torch.equal(mine.routes.rows_SLK, theirs.routes.rows_SLK)
    counts_LE = mine.load.counts_LE()
    assert np.array_equal(counts_LE, theirs.load.counts_LE()) and (counts_LE.sum(1) == 15 * model.top_k).all()
