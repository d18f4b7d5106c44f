"""`pointsman tune`: every cut it tries is sound, the best is kept where a runner finds it, and what was measured is not measured again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from pointsman import cli
from pointsman.bench import tune
from pointsman.bench.expert_layer import Layer
from pointsman.bench.options import TuneOptions
from pointsman.kernels import tiles
from pointsman.kernels.tiles import Shape, Tile, TileTable, device_key
from tests.kernels.interpreter import correct

correct()
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SHAPE = Shape(num_experts=4, top_k=2, hidden=256, width=128, quantized=True)


def test_every_cut_is_sound() -> None:
    for rows in (0.03, 1, 4, 16, 32, 64, 256, 2048):
        heights = tune.blocks(rows)
        assert heights
        for block in heights:
            for tile in (*tune.gemm_tiles(block), *tune.up_tiles(block, quantized=True), *tune.up_tiles(block, quantized=False)):
                assert tile.block == block and 128 % tile.columns == 0
                assert not tile.quantize or tile.columns in (64, 128)


def test_the_best_is_kept_found_and_not_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _=None: "Some GPU")
    monkeypatch.setattr(tune, "time_graph", lambda _: 1e-6)
    best = Tile(block=16, columns=64, warps=4, stages=3, swap=True, quantize=True)
    timed: list[Tile] = []

    def time_up(_: tune.Products, tile: Tile) -> float:
        timed.append(tile)
        return 1e-6 if tile == best else 2e-6

    monkeypatch.setattr(tune.Products, "time_up", time_up)
    monkeypatch.setattr(tune.Products, "time_down", lambda _, tile, from_quantized: 1e-6 * tile.stages)
    layer = Layer.draw(SHAPE, DEVICE, 0)
    options = TuneOptions(num_experts=4, experts_per_token=2, hidden_size=256, expert_width=128, num_tokens=(2,))
    rows = tune.tune_runner(layer, "routed", tiles.own_file(), options)
    assert [row["tokens"] for row in rows] == [2] and best in timed
    tiles._rows.cache_clear()
    found = TileTable("routed", SHAPE, device_key("Some GPU"))
    assert found(1).up == best and found(2).down.stages == 3 and found(3) == tiles.rule("routed", SHAPE, 3)
    timed.clear()
    assert tune.tune_runner(layer, "routed", tiles.own_file(), options) == rows and not timed
    more = TuneOptions(num_experts=4, experts_per_token=2, hidden_size=256, expert_width=128, num_tokens=(2, 4))
    assert [row["tokens"] for row in tune.tune_runner(layer, "routed", tiles.own_file(), more)] == [2, 4] and timed
    assert [path.name for path in (tmp_path / "pointsman").iterdir()] == ["tiles.json"]
    assert list(json.loads(tiles.own_file().read_text())) == [device_key("Some GPU")]
    tiles._rows.cache_clear()


def test_the_bar_counts_every_cut_and_has_the_best_so_far(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune.Products, "time_up", lambda _, tile: 1e-6 * tile.stages)
    monkeypatch.setattr(tune.Products, "time_down", lambda _, tile, from_quantized: 1e-6 * tile.columns)
    products = tune.Products(Layer.draw(SHAPE, DEVICE, 0), "routed", 2)
    with tune.Bar("routed", [2, 4], SHAPE) as bar:
        seconds, best = bar.best_of(products, SHAPE, 2)
        [task] = bar._progress.tasks
        assert best.up.stages == 2 and best.down.columns == 32 and seconds == pytest.approx(34e-6)
        assert task.total == 2 * task.completed and task.fields["best"] == "best 34.0 us" and "routed 2 tokens 16x" in task.description
        bar.best_of(products, SHAPE, 4)
        assert task.finished


def test_a_wrong_result_is_never_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _=None: "Some GPU")
    monkeypatch.setattr(tune, "time_graph", lambda _: 1e-6)
    monkeypatch.setattr(tune.Products, "time_up", lambda *_: 1e-6)
    monkeypatch.setattr(tune.Products, "time_down", lambda *_, from_quantized: 1e-6)
    monkeypatch.setattr(tune, "check", lambda *_: ("it is wrong", 1.0))
    options = TuneOptions(num_experts=4, experts_per_token=2, hidden_size=256, expert_width=128, num_tokens=(1,))
    with pytest.raises(ValueError, match=r"routed with 1 tokens in .* it is wrong"):
        tune.tune_runner(Layer.draw(SHAPE, DEVICE, 0), "routed", tmp_path / "tiles.json", options)
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_tuned_is_refused(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cli.main(["tune"]) == 1
    assert "there is nothing to tune on this machine" in capsys.readouterr().err
    assert cli.main(["tune", "--expert-width", "200"]) == 2
    assert "--expert-width is 200; it must be a multiple of 128" in capsys.readouterr().err
    assert cli.main(["tune", "--num-experts", "4"]) == 2
    assert "--experts-per-token is 8; there are 4 experts" in capsys.readouterr().err
