"""The table of names is a bijection between a checkpoint's tensors and our places."""

from __future__ import annotations

import pytest
from safetensors import safe_open

from pointsman.models import MODELS, architecture_of
from pointsman.models.minimax_m2 import ROWS
from pointsman.models.names import Place, name_of, places, respelled
from tests.models.checkpoints import Shape
from tests.models.families import MODELS as FAMILIES
from tests.models.families import config_of
from tests.models.test_architecture import PUBLISHED, without


def test_full_size_has_the_published_number_of_tensors() -> None:
    # 3 + 62 * (4 norms, gate and bias + 2 * (4 attention matrices + 3 * 256 expert matrices)), as counted in the published index
    expected = places(ROWS, architecture_of(PUBLISHED))
    assert len(expected) == 96_103
    assert sum(place.scale for _, place in expected.values()) == 47_864
    assert expected["model.layers.61.block_sparse_moe.experts.255.w3.weight_scale_inv"][1] == Place("gate_up", 61, 255, 1, True)
    plain = places(ROWS, architecture_of(without("quantization_config")))
    assert len(plain) == 96_103 - 47_864 and not any(place.scale for _, place in plain.values())


CONFIGS = {"minimax": Shape(block=(16, 16)).config(), "one scale": Shape(scalar="static").config()}
CONFIGS |= {name: config_of(name).to_diff_dict() for name in FAMILIES}


@pytest.mark.parametrize("name", CONFIGS)
def test_both_directions_agree(name: str) -> None:
    architecture = architecture_of(CONFIGS[name])
    rows = MODELS[architecture.name].rows
    expected = places(rows, architecture)
    assert len({place for _, place in expected.values()}) == len(expected)
    scalar = architecture.scalar_scales
    assert all(name_of(rows, place, scalar=scalar) == respelled(name, scalar=scalar) == name for name, (_, place) in expected.items())


def test_names_are_those_of_a_checkpoint_on_disk(tmp_path) -> None:
    for number, shape in enumerate((Shape(), Shape(block=(16, 16)), Shape(scalar="dynamic"), Shape(scalar="static"))):
        folder = shape.write(tmp_path / str(number))
        with safe_open(folder / "model.safetensors", framework="pt") as file:
            assert set(file.keys()) == set(places(ROWS, architecture_of(shape.config())))
