"""The layers' own promises: the cache's layout, forms made once, replay within a step."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pointsman.distributed import Mesh
from pointsman.kernels import reference
from pointsman.kernels.dtypes import NUM_BYTES
from pointsman.kernels.operations import LINEARS
from pointsman.kernels.weight import Weight
from pointsman.layers.context import Span, StepContext
from pointsman.layers.linear import Embedding, Linear
from pointsman.layers.moe import MoE
from pointsman.layers.paged_kv import KV_DTYPES, PagedKV
from pointsman.moe.capture import RouteStore
from pointsman.moe.reference import ReferenceRunner
from pointsman.moe.router import ROUTERS
from pointsman.moe.routing import RoutingSpec, route
from pointsman.moe.weights import stack_experts


def normal(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", KV_DTYPES)
def test_the_cache_has_the_documented_layout(name: str) -> None:
    dtype = KV_DTYPES[name]
    kv = PagedKV.allocate(num_layers=3, num_pages=5, num_kv_heads=2, page_size=4, head_dim=8, dtype=dtype)
    for pages in (kv.k, kv.v):
        assert pages.shape == (3, 5, 2, 4, 8) and pages.dtype == dtype and pages.is_contiguous()
    assert (kv.page_size, kv.num_slots) == (4, 20)
    rows = normal(1, 2, 8)
    reference.write_kv(kv.k[1], kv.v[1], rows, rows + 1, torch.tensor([3 * 4 + 2]))
    assert torch.equal(kv.k[1, 3, :, 2].float(), rows[0].to(dtype).float())
    assert torch.equal(kv.v[1, 3, :, 2].float(), (rows[0] + 1).to(dtype).float())
    assert kv.k.element_size() == NUM_BYTES[name]


def test_a_linear_makes_its_form_once_and_keeps_the_checkpoints() -> None:
    weight = reference.quantize_weight(normal(6, 8), (4, 4))
    linear = Linear(weight, LINEARS["cpu"], torch.float32)
    ready = linear.prepare()
    assert linear.prepare() is ready and ready.data.dtype == torch.float32 and linear.weight is weight
    linear.release()
    assert linear.prepare() is not ready
    assert Linear(weight, LINEARS["reference"], torch.float32).prepare() is weight


def test_an_embedding_is_in_the_dtype_of_the_model() -> None:
    table_VD = normal(5, 3).bfloat16()
    got = Embedding(table_VD, torch.float32, Mesh.single())(torch.tensor([4, 0, 4]))
    assert got.dtype == torch.float32 and torch.equal(got, table_VD[[4, 0, 4]].float())


class TestMoE:
    SPEC = RoutingSpec(num_experts=5, top_k=2, score="sigmoid")

    def layer(self, index: int = 1) -> MoE:
        weights = stack_experts([tuple(Weight(normal(8, 8, seed=3 * e + i)) for i in range(3)) for e in range(5)])  # type: ignore[misc]
        return MoE(
            index, normal(5, 8, seed=50), normal(5, seed=51), weights, self.SPEC, ROUTERS["reference"], ReferenceRunner(), torch.float32
        )

    def context(self, rows: int, **fields: object) -> StepContext:
        kv = PagedKV.allocate(num_layers=1, num_pages=1, num_kv_heads=1, page_size=1, head_dim=2, dtype=torch.float32)
        at = torch.arange(rows)
        return StepContext(positions_T=at, slots_T=at + 3, attention_plan=[Span(0, 0, rows)], page_table_LP=at[None], kv=kv, **fields)  # type: ignore[arg-type]

    def test_it_is_gate_route_run(self) -> None:
        moe, x_TD = self.layer(), normal(6, 8, seed=9)
        routing = route(x_TD @ moe.gate_ED.T, self.SPEC, bias_E=moe.bias_E)
        routes = RouteStore(12, 2, 2, 5)
        got = moe(x_TD, self.context(6, routes=routes))
        torch.testing.assert_close(got, moe.runner(x_TD, routing, moe.weights))
        assert torch.equal(routes.gather(range(3, 9))[:, 1].long(), routing.ids_TK)

    def test_given_rows_are_forced_and_others_route_freely(self) -> None:
        moe, x_TD = self.layer(), normal(6, 8, seed=9)
        logits_TE = x_TD @ moe.gate_ED.T
        replay_TNK = torch.full((6, 2, 2), -1)
        replay_TNK[2, 1] = torch.tensor([4, 1])
        replay_TNK[3, 0] = torch.tensor([0, 1])  # another layer's
        routes = RouteStore(12, 2, 2, 5)
        got = moe(x_TD, self.context(6, routes=routes, replay_TNK=replay_TNK))
        ids_TK = route(logits_TE, self.SPEC, bias_E=moe.bias_E).ids_TK
        ids_TK[2] = torch.tensor([4, 1])
        assert torch.equal(routes.gather(range(3, 9))[:, 1].long(), ids_TK)
        torch.testing.assert_close(got, moe.runner(x_TD, route(logits_TE, self.SPEC, ids_TK=ids_TK), moe.weights))
