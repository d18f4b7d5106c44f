"""The router's kernels as the engine calls them against the reference router: routing, record, replay, agreement, padding.

In Triton's interpreter, or on the GPU where there is one. Experts are the same, as the numbers are drawn so that no two scores
are near each other; weights differ by the float32 sums of the gate in another order.
"""

from __future__ import annotations

import pytest
import torch

from pointsman.kernels import few_tokens
from pointsman.kernels.device import Device
from pointsman.kernels.routing import counters
from pointsman.moe import candidates
from pointsman.moe.candidates import router_choice
from pointsman.moe.capture import RouteStore
from pointsman.moe.router import INVARIANT_ROUTERS, ROUTERS, Router, RouterInput, Wanted
from pointsman.moe.routing import Routing, RoutingSpec
from tests.kernels.interpreter import correct

correct()
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
T, D, E, K, LAYERS, SLOTS = 5, 256, 16, 4, 2, 12
SPEC = RoutingSpec(num_experts=E, top_k=K, score="sigmoid")


def routed(
    table: Router, rows_T: torch.Tensor, given_TLK: torch.Tensor | None, *, few_rows: bool = False
) -> tuple[list[Routing], RouteStore]:
    """Two layers of one step through a router."""
    generator = torch.Generator().manual_seed(0)
    routes = RouteStore(SLOTS, LAYERS, K, E, DEVICE)
    routes.rows_SLK.fill_(255)
    routes.alike_S.fill_(99)
    answers = []
    for layer in range(LAYERS):
        x_TD = torch.randn(T, D, generator=generator).bfloat16().to(DEVICE)
        gate_ED, bias_E = torch.randn(E, D, generator=generator).to(DEVICE), torch.randn(E, generator=generator).to(DEVICE) / 4
        given_TK = None if given_TLK is None else given_TLK[:, layer]
        rows = RouterInput(x_TD, gate_ED, bias_E, layer, rows_T, routes, given_TK, counter=counters(few_tokens.NUM_COUNTERS, DEVICE))
        if few_rows:
            few = table.run_few(rows, SPEC, Wanted(True, 0))
            answers.append(Routing(few.ids_TK, few.weights_TK))
        else:
            answers.append(table.run(rows, SPEC))
    return answers, routes


@pytest.mark.parametrize(
    ("table", "few_rows"), [(ROUTERS, False), (INVARIANT_ROUTERS, False), (ROUTERS, True)], ids=["fast", "invariant", "few rows"]
)
@pytest.mark.parametrize("replays", [False, True])
def test_kernels_route_record_and_replay_as_the_reference(table: dict, replays: bool, few_rows: bool) -> None:
    slots_T = torch.tensor([7, 0, 3, 11, 5], device=DEVICE)
    given_TLK = None
    if replays:
        free, _ = routed(ROUTERS["reference"], slots_T, None)
        given_TLK = torch.full((T, LAYERS, K), -1, device=DEVICE)
        given_TLK[1] = torch.stack([layer.ids_TK[1].flip(0) for layer in free])  # the same set in another order
        given_TLK[3] = torch.arange(K, device=DEVICE)
    want, want_routes = routed(ROUTERS["reference"], slots_T, given_TLK)
    padded_T = slots_T.clone()
    padded_T[4] = -1
    got, got_routes = routed(table["triton"], padded_T, given_TLK, few_rows=few_rows)
    for mine, theirs in zip(got, want, strict=True):
        assert torch.equal(mine.ids_TK[:4].long(), theirs.ids_TK[:4])
        torch.testing.assert_close(mine.weights_TK[:4], theirs.weights_TK[:4], rtol=1e-5, atol=1e-6)
        assert (mine.ids_TK[4] == -1).all() and (mine.weights_TK[4] == 0).all()
    for mine, theirs in zip(routed(ROUTERS["reference"], padded_T, given_TLK)[0], want, strict=True):
        assert torch.equal(mine.ids_TK[:4], theirs.ids_TK[:4]) and torch.equal(mine.weights_TK[:4], theirs.weights_TK[:4])
        assert (mine.ids_TK[4] == -1).all() and (mine.weights_TK[4] == 0).all()
    want_routes.rows_SLK[5] = 255
    assert torch.equal(got_routes.rows_SLK, want_routes.rows_SLK)
    if replays:
        assert got_routes.alike_S[[0, 11]].tolist() == want_routes.alike_S[[0, 11]].tolist() and got_routes.alike_S[0] == LAYERS


def test_routers_say_why_not() -> None:
    grouped = RoutingSpec(num_experts=E, top_k=K, score="sigmoid", num_groups=4, top_groups=2)
    triton = candidates.ROUTERS["triton"]
    assert "limits a token to groups" in str(triton(grouped, Device(type="cuda"), "bfloat16"))
    assert "bfloat16" in str(triton(SPEC, Device(type="cuda"), "float32"))
    assert "the device is cpu" in str(triton(SPEC, Device(type="cpu"), "bfloat16"))
    assert router_choice(SPEC, device=Device(type="cpu"), dtype="float32").take() == "reference"
    with pytest.raises(ValueError, match="no router can serve here"):
        router_choice(SPEC, device=Device(type="cpu"), dtype="float32", invariant=True).take()
