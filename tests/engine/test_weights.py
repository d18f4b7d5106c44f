"""Updates by tensors: whole, in part, in parts, quantized on arrival. The oracle is a fresh engine of a checkpoint with these tensors."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save
from torch import Tensor

from pointsman import LLM, SamplingParams
from pointsman.engine.control import Control
from pointsman.kernels.reference import quantize_weight
from pointsman.update import Update
from tests.models.checkpoints import Shape, write

SHAPE = Shape(block=(16, 16))
OLD, NEW = SHAPE.tensors(0), SHAPE.tensors(1)
PROMPT = [(7 * index + 3) % 97 for index in range(29)]
PARAMS = SamplingParams(temperature=0.0, max_tokens=10, logprobs=3, return_routed_experts=True)


def make(folder: Path, tensors: dict[str, Tensor], shape: Shape = SHAPE, step: str = "compiled") -> LLM:
    write(folder, shape.config(), tensors)
    return LLM(str(folder), progress=False, cpu_step=step, page_size=4)


def answer(llm: LLM) -> tuple[Any, ...]:
    output = llm.generate(PROMPT, PARAMS)[0].outputs[0]
    return output.token_ids, output.logprobs, output.routed_experts.tolist()


def fresh_answer(folder: Path, tensors: dict[str, Tensor], shape: Shape = SHAPE, step: str = "compiled") -> tuple[Any, ...]:
    llm = make(folder, tensors, shape, step)
    found = answer(llm)
    llm.close()
    return found


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    llm = make(tmp_path_factory.mktemp("old"), OLD)
    yield llm
    llm.close()


@pytest.fixture(autouse=True)
def old(llm: LLM) -> None:
    llm.update_weights_from_tensor(OLD)


def test_all_of_them(llm: LLM, tmp_path: Path) -> None:
    assert llm.update_weights_from_tensor(NEW, weight_version="new") == "new"
    assert answer(llm) == fresh_answer(tmp_path / "new", NEW)
    llm.update_weights_from_tensor(OLD)
    assert answer(llm) == fresh_answer(tmp_path / "old", OLD)


PARTS = [
    ["model.norm.weight"],
    ["lm_head.weight", "model.embed_tokens.weight"],
    ["model.layers.1.block_sparse_moe.gate.weight", "model.layers.0.block_sparse_moe.e_score_correction_bias"],
    ["model.layers.0.self_attn.k_proj.weight"],
    ["model.layers.1.block_sparse_moe.experts.5.w3.weight", "model.layers.1.block_sparse_moe.experts.5.w2.weight"],
]


@pytest.mark.parametrize("names", PARTS)
def test_some_of_them(llm: LLM, tmp_path: Path, names: list[str]) -> None:
    part = {name: tensor for name, tensor in NEW.items() if name.removesuffix("_scale_inv") in names}
    llm.update_weights_from_tensor(part)
    assert answer(llm) == fresh_answer(tmp_path / "new", OLD | part)


def test_plain_matrices_are_quantized_when_asked(llm: LLM, tmp_path: Path) -> None:
    """As a checkpoint would have been that was quantized by the same function."""
    plain = Shape().tensors(5)
    with pytest.raises(ValueError, match=r"w1\.weight is BF16 where F8_E4M3 belongs; quantize true makes FP8"):
        llm.update_weights_from_tensor(plain)
    quantized = dict(plain)
    for name in OLD:
        if name + "_scale_inv" in OLD:
            weight = quantize_weight(plain[name], SHAPE.block or (0, 0))
            assert weight.scale is not None
            quantized |= {name: weight.data, name + "_scale_inv": weight.scale}
    llm.update_weights_from_tensor(plain, quantize=True)
    assert answer(llm) == fresh_answer(tmp_path / "new", quantized)


def test_wider_numbers_are_not_rounded(tmp_path: Path) -> None:
    llm = make(tmp_path / "old", OLD, step="torch")
    wide = {"lm_head.weight": torch.randn(97, 32, generator=torch.Generator().manual_seed(3))}
    llm.update_weights_from_tensor(wide)
    assert answer(llm) == fresh_answer(tmp_path / "new", OLD | wide, step="torch")
    llm.close()


def test_a_model_without_quantization(tmp_path: Path) -> None:
    shape = Shape()
    llm = make(tmp_path / "old", shape.tensors(0), shape, "torch")
    part = {name: tensor for name, tensor in shape.tensors(1).items() if "layers.1" in name}
    llm.update_weights_from_tensor(part)
    assert answer(llm) == fresh_answer(tmp_path / "new", shape.tensors(0) | part, shape, "torch")
    with pytest.raises(ValueError, match="does not belong"):
        llm.update_weights_from_tensor({"model.layers.0.self_attn.q_proj.weight_scale_inv": torch.ones(4, 2)})
    llm.close()


QUERY = "model.layers.0.self_attn.q_proj.weight"
WRONG: list[tuple[dict[str, Tensor], str]] = [
    ({}, "no tensors"),
    ({"model.norm": torch.ones(32)}, "model.norm does not belong"),
    ({"model.norm.weight": torch.ones(31)}, r"\[31\] where \[32\] belongs"),
    ({"model.norm.weight": torch.ones(32, dtype=torch.float16)}, "float16 where BF16 or F32 belongs"),
    ({"model.norm.weight": torch.full((32,), float("inf"))}, "NaN or infinite"),
    ({QUERY: NEW[QUERY]}, "came without .*scale_inv"),
    ({QUERY + "_scale_inv": NEW[QUERY + "_scale_inv"]}, "q_proj.weight_scale_inv came without"),
    ({QUERY: torch.full((64, 32), 0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn)}, "NaN"),
]


@pytest.mark.parametrize("quantize", [False, True])
@pytest.mark.parametrize(("tensors", "message"), WRONG)
def test_what_is_refused_changes_nothing(llm: LLM, tensors: dict[str, Tensor], message: str, quantize: bool) -> None:
    before, version = answer(llm), llm.weight_version
    with pytest.raises(ValueError, match=message):
        llm.update_weights_from_tensor(
            {**tensors} if not tensors else {"lm_head.weight": NEW["lm_head.weight"], **tensors}, quantize=quantize
        )
    assert answer(llm) == before and llm.weight_version == version


def test_files_that_are_none(llm: LLM) -> None:
    weights = llm.engine.weights
    data = save({"model.norm.weight": NEW["model.norm.weight"]})
    for broken in (b"", b"\x00" * 40, data[:-1], data + b"x", b"\x80\x04N."):
        with pytest.raises(ValueError, match="not a whole safetensors file"):
            weights.from_files([broken])
    with pytest.raises(ValueError, match="same name"):
        weights.from_files([data, data])


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_an_update_in_parts_serves_as_a_whole_or_not_at_all(llm: LLM, data: st.DataObject) -> None:
    """Parts in any order, with a wrong one now and then, and with beginnings anew: only what was begun, and has come whole, is in force."""
    control = Control(llm.engine)
    control.update_weights_from_tensor(OLD)
    live = dict(OLD)
    staged: dict[str, Tensor] | None = None
    groups = data.draw(st.lists(st.sampled_from([*PARTS, ["wrong"]]), min_size=1, max_size=5))
    for names in groups:
        begin, final = data.draw(st.booleans()), data.draw(st.booleans())
        source = data.draw(st.sampled_from([OLD, NEW]))
        part = {name: tensor for name, tensor in source.items() if name.removesuffix("_scale_inv") in names} or {"x": torch.ones(1)}
        before = {} if begin else staged
        fits = names != ["wrong"] and before is not None and not before.keys() & part.keys()
        if not fits:
            with pytest.raises(ValueError, match=r"does not belong|has come already|no update has begun"):
                control.update_weights_from_tensor(part, Update(begin=begin, final=final))
            staged = None
            continue
        assert before is not None
        control.update_weights_from_tensor(part, Update(begin=begin, final=final))
        staged = None if final else before | part
        live |= before | part if final else {}
    expected = answer(llm)
    control.update_weights_from_tensor(live)
    assert answer(llm) == expected


def test_one_scale_a_matrix(tmp_path: Path) -> None:
    """Some by their names, some quantized on arrival, and all from disk; scales of activations stay where none come."""
    shape = Shape(hidden=160, width=136, experts=4, scalar="static")
    old, new = shape.tensors(0), shape.tensors(1)
    llm = make(tmp_path / "old", old, shape)
    part = {name: tensor for name, tensor in new.items() if "k_proj" in name or "experts.2.w3" in name or name == "model.norm.weight"}
    raw = "model.layers.1.block_sparse_moe.experts.3.w2.weight"
    numbers = Shape(hidden=160, width=136).tensors(7)[raw]
    weight = quantize_weight(numbers, (160, 136))
    assert weight.scale is not None
    llm.update_weights_from_tensor(part | {raw: numbers}, quantize=True)
    assert answer(llm) == fresh_answer(tmp_path / "new", old | part | {raw: weight.data, raw + "_scale": weight.scale.reshape(())}, shape)
    write(tmp_path / "disk", shape.config(), new)
    llm.update_weights_from_disk(str(tmp_path / "disk"))
    assert answer(llm) == fresh_answer(tmp_path / "fresh", new, shape)
    blocks = Shape(hidden=160, width=136, experts=4, block=(128, 128))
    with pytest.raises(ValueError, match="scalar_scales"):
        llm.update_weights_from_disk(str(blocks.write(tmp_path / "blocks")))
    llm.close()
