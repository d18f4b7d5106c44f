"""Models split over ranks say what they say in one piece: logits, tokens, experts; and all ranks the same.

Ranks add up in another order than one device does, so logits are near each other and no more: float32 rounding of activations of size 1,
through two or three layers. Where activations are quantized (W8A8), such a difference may move a number to the next e4m3, 6 % away, and
the sum of a few thousand of them by what is allowed there.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from pointsman import tiny
from pointsman.distributed import Mesh
from pointsman.models.loader import load_model
from pointsman.moe.candidates import RUNNERS
from tests.distributed.ranks import run_ranks
from tests.models import families
from tests.models.checkpoints import Harness, Shape
from tests.moe.libraries.flashinfer import VERSIONS, Emulation

TOLERANCE = 2e-4
QUANTIZED_TOLERANCE = 0.15
PROMPTS = {2: [5, 9, 33, 21, 60, 2, 7, 7, 11], 0: [40, 1, 13], 3: [8]}

SHAPES = {
    # 12 blocks of expert width, one of heads; keys on four ranks of eight
    "blocks": Shape(heads=8, kv_heads=2, hidden=64, width=192, block=(16, 16)),
    # a head is less than a block, two blocks of width for four ranks
    "shared scales": Shape(heads=8, kv_heads=4, hidden=48, width=64, experts=6, top_k=3, block=(32, 32)),
    "one scale": Shape(heads=8, kv_heads=4, hidden=48, width=256, experts=6, scalar="dynamic"),
    "plain": Shape(heads=8, kv_heads=8, width=24),
}
# tp to the checkpoints, runners and numbers of groups that are tried on such a mesh
LAYOUTS: dict[int, list[tuple[str, str, tuple[int, ...]]]] = {
    2: [("blocks", "cpu", (1, 2)), ("shared scales", "reference", (2,)), ("glm, groups", "cpu", (1, 2)), ("qwen", "reference", (1,))],
    4: [("blocks", "cpu", (1, 2, 4)), ("blocks", "reference", (1, 4)), ("shared scales", "cpu", (1,)), ("plain", "cpu", (2,))],
    8: [("blocks", "cpu", (1, 4))],
}


@dataclasses.dataclass
class Said:
    """What a model made of the prompts, in one step and then token by token."""

    logits: list[np.ndarray]
    rows_SLK: np.ndarray

    @staticmethod
    def by(folder: Path, runner: str, mesh: Mesh, dtype: str = "float32") -> Said:
        backend = "reference" if runner == "reference" else "auto"
        decoder = load_model(folder, mesh=mesh, dtype=dtype, moe_backend=runner, linear_backend=backend, progress=False)
        harness = Harness(decoder)
        harness.routes.rows_SLK.zero_()
        said = [harness.step(PROMPTS)]
        for _ in range(2):
            said.append(harness.step({lane: [int(rows[-1].argmax())] for lane, rows in said[-1].items()}))
        logits = [rows[lane].float().numpy() for rows in said for lane in rows]
        return Said(logits, harness.routes.rows_SLK.numpy())


def compare(mesh: Mesh, cases: list[tuple[str, Path, str, int, Said]]) -> None:
    for name, folder, runner, ep, want in cases:
        case = f"{name}, {runner}, tp {mesh.tp}, ep {ep}"
        got = Said.by(folder, runner, dataclasses.replace(mesh, ep=ep))
        tolerance = TOLERANCE if runner == "cpu" else QUANTIZED_TOLERANCE
        for one, other in zip(got.logits, want.logits, strict=True):
            assert np.abs(one - other).max() < tolerance, (case, np.abs(one - other).max())
            assert np.array_equal(one.argmax(-1), other.argmax(-1)), case
        if runner == "cpu":
            assert np.array_equal(got.rows_SLK, want.rows_SLK), case
        bits = [torch.from_numpy(np.concatenate(got.logits)).view(torch.int32), torch.from_numpy(got.rows_SLK.astype(np.int32))]
        for mine in bits:
            everyone = mesh.all_gather(mine.unsqueeze(0))
            assert all(torch.equal(other, mine) for other in everyone), case


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    found = {name: shape.write(tmp_path_factory.mktemp("model")) for name, shape in SHAPES.items()}
    for name in ("glm, groups", "qwen"):
        found[name] = families.save(families.model_of(name), tmp_path_factory.mktemp("model"))
    return found


@pytest.mark.parametrize("tp", LAYOUTS)
def test_a_model_over_ranks_says_what_it_says_in_one_piece(folders: dict[str, Path], tp: int) -> None:
    cases = []
    for name, runner, groups in LAYOUTS[tp]:
        want = Said.by(folders[name], runner, Mesh.single())
        cases += [(name, folders[name], runner, ep, want) for ep in groups]
    run_ranks(tp, 1, compare, cases)


def meet_tiny(mesh: Mesh, want: list[tuple[str, Said]]) -> None:
    """The bundled checkpoint, whose experts are one block wide."""
    for ep, (runner, said) in zip((1, mesh.tp), want, strict=True):
        got = Said.by(tiny.path(), runner, dataclasses.replace(mesh, ep=ep))
        for one, other in zip(got.logits, said.logits, strict=True):
            assert np.array_equal(one.argmax(-1), other.argmax(-1))
            assert np.abs(one - other).max() < 5e-3


@pytest.mark.skipif(not list(tiny.path().glob("*.safetensors")), reason="the bundled checkpoint is not there")
def test_the_bundled_checkpoint() -> None:
    want = Said.by(tiny.path(), "cpu", Mesh.single())
    run_ranks(2, 1, meet_tiny, [("cpu", want), ("cpu", want)])


def share_experts(mesh: Mesh, folder: Path, runner: str, want: Said) -> None:
    """One of two ranks with half of the experts each, over FlashInfer's kernels as they are documented."""
    with pytest.MonkeyPatch.context() as patch:
        Emulation(VERSIONS[-1], exact=True).install(patch)
        patch.setitem(RUNNERS, runner, lambda *what: None)
        got = Said.by(folder, runner, dataclasses.replace(mesh, ep=2))
    for one, other in zip(got.logits, want.logits, strict=True):
        assert np.abs(one - other).max() < QUANTIZED_TOLERANCE
    # an activation that moved to the next e4m3 may tip a choice that is all but even, in layers past the first
    assert np.array_equal(got.rows_SLK[:, 0], want.rows_SLK[:, 0]) and (got.rows_SLK == want.rows_SLK).mean() > 0.95
    assert all(torch.equal(other, torch.from_numpy(got.rows_SLK)) for other in mesh.all_gather(torch.from_numpy(got.rows_SLK)[None]))


@pytest.mark.parametrize("runner", ["flashinfer_trtllm_routed", "flashinfer_trtllm"])
def test_experts_over_ranks_by_flashinfer(runner: str, tmp_path: Path) -> None:
    shape = Shape(heads=4, kv_heads=2, head_dim=32, rotary_dim=16, hidden=256, width=128, experts=8, block=(128, 128))
    folder = shape.write(tmp_path)
    run_ranks(2, 1, share_experts, folder, runner, Said.by(folder, "cpu", Mesh.single()))
