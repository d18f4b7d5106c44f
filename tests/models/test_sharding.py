"""What ranks hold: every element once, whole blocks, heads with the keys they read; the same of weights that are read, made, or pushed."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pointsman.distributed import Mesh
from pointsman.models import architecture_of
from pointsman.models.architecture import Architecture
from pointsman.models.checkpoint import Checkpoint
from pointsman.models.decoder import Decoder
from pointsman.models.loader import load_model
from pointsman.models.parameters import Parameters
from pointsman.models.revision import Revision
from pointsman.models.sharding import Shard, deal, deal_width, describe_split, reason_against
from tests.models.checkpoints import Shape
from tests.models.test_architecture import PUBLISHED

MINIMAX = architecture_of(PUBLISHED)


@given(st.integers(0, 300), st.integers(1, 40))
def test_all_is_dealt_once_and_evenly(count: int, num_ranks: int) -> None:
    shares = [deal(count, num_ranks, rank) for rank in range(num_ranks)]
    assert [one for share in shares for one in share] == list(range(count))
    lengths = [len(share) for share in shares]
    assert lengths == sorted(lengths, reverse=True) and lengths[0] - lengths[-1] <= 1


@given(st.integers(1, 3000), st.sampled_from([1, 16, 48, 128]), st.integers(1, 20))
def test_widths_are_cut_between_blocks_alone(width: int, unit: int, num_ranks: int) -> None:
    shares = [deal_width(width, unit, num_ranks, rank) for rank in range(num_ranks)]
    assert [one for share in shares for one in share] == list(range(width))
    assert all(share.start % unit == 0 and (share.stop % unit == 0 or share.stop == width) for share in shares if share)


@given(st.data())
def test_heads_stay_with_the_keys_they_read(data: st.DataObject) -> None:
    kv_heads, group = data.draw(st.integers(1, 12)), data.draw(st.integers(1, 12))
    architecture = dataclasses.replace(MINIMAX, num_heads=kv_heads * group, num_kv_heads=kv_heads)
    fine = [tp for tp in range(1, 65) if reason_against(architecture, tp, 1) is None]
    assert set(fine) >= {1, kv_heads, kv_heads * group} - set(range(65, 200))
    tp = data.draw(st.sampled_from(fine))
    shards = [Shard(architecture, tp, 1, rank) for rank in range(tp)]
    assert [head for shard in shards for head in shard.heads] == list(range(kv_heads * group))
    # what attention does: query head i of a rank reads its key/value head i // (heads / key heads)
    for shard in shards:
        own = len(shard.heads) // len(shard.kv_heads)
        assert [head // group for head in shard.heads] == [shard.kv_heads[at // own] for at in range(len(shard.heads))]
    assert sorted(head for shard in shards if shard.owns_kv_heads for head in shard.kv_heads) == list(range(kv_heads))


def test_the_flagship_over_eight_ranks() -> None:
    shards = [Shard(MINIMAX, 8, 1, rank) for rank in range(8)]
    assert [shard.sizes["width"] // 128 for shard in shards] == [2, 2, 2, 2, 1, 1, 1, 1]
    assert {len(shard.heads) for shard in shards} == {6} and {len(shard.kv_heads) for shard in shards} == {1}
    assert describe_split(MINIMAX, 8, 1) == [
        "attention: 6 of 48 query heads and 1 of 8 key/value heads a rank",
        "experts: 256+256+256+256+128+128+128+128 of 1536 columns of each a rank, whole blocks of 128",
        "vocabulary: 25008 of 200064 rows a rank",
    ]
    assert describe_split(MINIMAX, 16, 4)[:2] == [
        "attention: 3 of 48 query heads and 1 of 8 key/value heads a rank, each of these on 2 ranks",
        "experts: 64 of 256 whole experts in 4 groups of 4 ranks, 384 of 1536 columns of each a rank, whole blocks of 128",
    ]
    mixed = [Shard(MINIMAX, 4, 2, rank) for rank in range(4)]
    assert [(shard.group, shard.experts, shard.ranges["width"]) for shard in mixed] == [
        (group, range(128 * group, 128 * group + 128), range(768 * at, 768 * at + 768)) for group in range(2) for at in range(2)
    ]


@pytest.mark.parametrize(
    ("tp", "ep", "words"),
    [
        (5, 1, ["tensor_parallel_size is 5", "48 query heads and 8 key/value heads", "1, 2, 4, 8, 16, 24, 48"]),
        (3, 1, ["tensor_parallel_size is 3", "1, 2, 4, 8, 16, 24, 48"]),
        (4, 3, ["expert_parallel_size is 3", "(4, by --tp)", "1, 2, 4"]),
        (2, 4, ["expert_parallel_size is 4", "1, 2"]),
    ],
)
def test_layouts_that_cannot_be_are_refused_with_those_that_can(tp: int, ep: int, words: list[str]) -> None:
    with pytest.raises(ValueError) as told:
        Shard(MINIMAX, tp, ep)
    assert all(word in str(told.value) for word in words)


def test_a_model_of_few_heads_is_refused_before_it_is_read(tmp_path: Path) -> None:
    (Shape(heads=2, kv_heads=2).write(tmp_path) / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"tensor_parallel_size is 4: 2 query heads and 2 key.* by these they can be: 1, 2"):
        load(tmp_path, 4, 1, 0)


# sizes that divide and sizes that do not; heads smaller than a block, within one and across two; keys on several ranks
SHAPES = {
    "blocks": (Shape(heads=8, kv_heads=2, hidden=48, width=80, experts=5, block=(16, 16)), [(2, 1), (4, 2), (8, 1), (8, 4)]),
    "heads share blocks": (Shape(heads=8, kv_heads=4, hidden=48, width=96, block=(32, 32)), [(8, 1), (4, 4), (2, 2)]),
    "heads across blocks": (Shape(heads=6, kv_heads=2, hidden=48, width=48, block=(32, 48)), [(2, 1), (6, 3)]),
    "one scale": (Shape(heads=8, kv_heads=2, head_dim=32, hidden=48, width=320, experts=5, scalar="static"), [(2, 1), (8, 1), (8, 4)]),
    "plain": (Shape(heads=4, kv_heads=4, width=25, vocab=98), [(4, 1), (4, 2)]),
}
CASES = [(name, *layout) for name, (_, layouts) in SHAPES.items() for layout in layouts]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: shape.write(tmp_path_factory.mktemp("model"), shards=2) for name, (shape, _) in SHAPES.items()}


def load(folder: Path, tp: int, ep: int, rank: int, **options: Any) -> Decoder:
    """Loading exchanges nothing, so a rank can be loaded alone."""
    return load_model(folder, mesh=Mesh(tp=tp, ep=ep, rank=rank), progress=False, **options)


def values(parameters: Parameters) -> dict[str, Tensor]:
    """All numbers that a shard computes with, by what they are."""
    found = {"embed": parameters.embed_VD.float(), "head": parameters.head.dequantize(torch.float32), "norm": parameters.norm_D}
    for index, layer in enumerate(parameters.layers):
        assert layer.experts is not None and layer.q_norm_Q is not None and layer.k_norm_W is not None
        parts = zip("qkv", torch.split(layer.qkv.dequantize(torch.float32), layer.qkv.parts), strict=True)
        found |= {f"{index}.{name}": part for name, part in parts}
        gate, up = layer.experts.gate_up.dequantize(torch.float32).chunk(2, dim=1)
        found |= {f"{index}.w1": gate, f"{index}.w3": up, f"{index}.w2": layer.experts.down.dequantize(torch.float32)}
        found |= {f"{index}.o": layer.o.dequantize(torch.float32), f"{index}.q_norm": layer.q_norm_Q, f"{index}.k_norm": layer.k_norm_W}
        found |= {f"{index}.gate": layer.gate_ED, f"{index}.bias": layer.bias_E}
    return found


def part_of(name: str, whole: Tensor, shard: Shard) -> Tensor:
    """The part that a shard should have, cut out of the values themselves."""
    kind, channels = name.split(".")[-1], shard.architecture.head_dim
    q = [head * channels + channel for head in shard.heads for channel in range(channels)]
    kv = [head * channels + channel for head in shard.kv_heads for channel in range(channels)]
    width, experts = list(shard.ranges["width"]), list(shard.experts)
    match kind:
        case "q" | "q_norm":
            return whole[q]
        case "k" | "v" | "k_norm":
            return whole[kv]
        case "o":
            return whole[:, q]
        case "w1" | "w3":
            return whole[experts][:, width]
        case "w2":
            return whole[experts][:, :, width]
        case "embed" | "head":
            return whole[list(shard.ranges["vocab"])]
    return whole


@pytest.mark.parametrize(("name", "tp", "ep"), CASES)
def test_a_rank_has_its_part_of_the_values(folders: dict[str, Path], name: str, tp: int, ep: int) -> None:
    """Numbers and scales, however blocks lie; of random weights too; and after an update, which brings whole tensors."""
    shape = SHAPES[name][0]
    for options in ({}, {"load_format": "dummy", "seed": 3}):
        whole = values(load_model(folders[name], progress=False, **options).parameters)
        for rank in range(tp):
            decoder = load(folders[name], tp, ep, rank, **options)
            for key, value in values(decoder.parameters).items():
                assert torch.equal(value, part_of(key, whole[key], decoder.shard)), key
    whole = values(load_model(shape.write(folders[name] / "new", seed=7), progress=False).parameters)
    for rank in range(tp):
        decoder = load(folders[name], tp, ep, rank)
        for old in (decoder.parameters, None):
            revision = Revision(decoder.shard)
            revision.add(shape.tensors(7))
            for key, value in values(revision.apply(old, torch.device("cpu"))).items():
                assert torch.equal(value, part_of(key, whole[key], decoder.shard)), key


def test_a_rank_reads_its_part_and_no_more(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted in elements, where files are sliced."""
    read: dict[str, int] = {}
    slices = Checkpoint.slices

    class Counting:
        def __init__(self, name: str, tensor: Any) -> None:
            self.name, self.tensor = name, tensor

        def __getitem__(self, index: Any) -> Tensor:
            found: Tensor = self.tensor[index]
            read[self.name] = found.numel()
            return found

    def counted(self: Checkpoint, names: Any, take: Any, *, whole: bool) -> None:
        assert not whole
        slices(self, names, lambda name, tensor: take(name, Counting(name, tensor)), whole=whole)

    monkeypatch.setattr(Checkpoint, "slices", counted)
    total: dict[str, int] = {}
    for rank in range(4):
        read.clear()
        decoder = load(folders["plain"], 4, 2, rank)
        shard = decoder.shard
        assert {int(name.split(".experts.")[1].split(".")[0]) for name in read if ".experts." in name} == set(shard.experts)
        assert read["model.layers.0.self_attn.k_proj.weight"] == len(shard.kv_heads) * 16 * 32
        for name, count in read.items():
            total[name] = total.get(name, 0) + count
    sizes = {name: tensor.numel() for name, tensor in SHAPES["plain"][0].tensors().items()}
    copied = ("gate.weight", "bias", "layernorm.weight", "norm.weight")
    for name, size in sizes.items():
        own = name.endswith(("q_norm.weight", "k_norm.weight"))
        assert total[name] == size * (4 if name.endswith(copied) and not own else 1), name


def test_an_update_that_lacks_a_tensor_of_another_rank_is_refused_here_too(folders: dict[str, Path]) -> None:
    decoder, tensors = load(folders["plain"], 4, 4, 0), SHAPES["plain"][0].tensors(1)
    missing = next(name for name in tensors if ".experts.7." in name)
    revision = Revision(decoder.shard)
    revision.add({name: tensor for name, tensor in tensors.items() if name != missing})
    with pytest.raises(ValueError, match=f"{missing} is missing, and the weights before are released"):
        revision.apply(None, torch.device("cpu"))


def test_narrow_experts_leave_ranks_without_a_block() -> None:
    """Which is said."""
    narrow: Architecture = dataclasses.replace(MINIMAX, expert_width=256)
    assert [Shard(narrow, 4, 1, rank).sizes["width"] for rank in range(4)] == [128, 128, 0, 0]
    assert describe_split(narrow, 4, 1)[-1] == "ranks without a block of any expert: 2, 3; --ep 4 would give each whole ones"
