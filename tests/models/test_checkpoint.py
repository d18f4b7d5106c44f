"""Where a checkpoint's files are, and what is refused before any of them is believed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import HFValidationError
from safetensors.torch import save_file

from pointsman.models.checkpoint import INDEX, open_checkpoint
from pointsman.models.folder import locate, read_json
from tests.models.checkpoints import Shape


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Shape(layers=1).write(tmp_path_factory.mktemp("sharded"), shards=3)


@pytest.fixture
def folder(template: Path, tmp_path: Path) -> Path:
    shutil.copytree(template, tmp_path / "model")
    return tmp_path / "model"


def rewrite_index(folder: Path, change: dict[str, str]) -> None:
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"] |= change
    (folder / INDEX).write_text(json.dumps(index))


def test_shards_are_read_whole_and_one_by_one(folder: Path) -> None:
    checkpoint = open_checkpoint(folder)
    want = Shape(layers=1).tensors()
    assert not checkpoint.problems and checkpoint.headers.keys() == want.keys()
    read = dict(checkpoint.tensors(want))
    assert all(torch.equal(read[name], tensor) for name, tensor in want.items())
    assert [name for name, _ in checkpoint.tensors({"lm_head.weight"})] == ["lm_head.weight"]
    header = checkpoint.headers["model.layers.0.block_sparse_moe.gate.weight"]
    assert (header.shape, header.dtype) == ((8, 32), "F32")


def test_without_an_index_the_single_file_is_taken(folder: Path) -> None:
    (folder / INDEX).unlink()
    assert len({header.file for header in open_checkpoint(folder).headers.values()}) == 3
    save_file({"a": torch.zeros(2)}, folder / "model.safetensors")
    assert list(open_checkpoint(folder).headers) == ["a"]


@pytest.mark.parametrize("file", ["../secret.safetensors", "/etc/passwd", "sub/x.safetensors", "..", "", "."])
def test_an_index_that_leads_elsewhere_is_refused(folder: Path, file: str) -> None:
    save_file({"a": torch.zeros(2)}, folder.parent / "secret.safetensors")
    rewrite_index(folder, {"a": file})
    with pytest.raises(ValueError, match="no plain file name"):
        open_checkpoint(folder)


def test_a_link_that_leads_elsewhere_is_refused(folder: Path) -> None:
    save_file({"a": torch.zeros(2)}, folder.parent / "secret.safetensors")
    (folder / "link.safetensors").symlink_to(folder.parent / "secret.safetensors")
    rewrite_index(folder, {"a": "link.safetensors"})
    with pytest.raises(ValueError, match="leads out of the folder"):
        open_checkpoint(folder)


def test_links_of_the_hub_cache_are_followed_to_its_blobs_only(folder: Path, tmp_path: Path) -> None:
    cache = tmp_path / "models--x--y"
    snapshot = cache / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (cache / "blobs").mkdir()
    for number, file in enumerate(sorted(folder.iterdir())):
        shutil.copy(file, cache / "blobs" / str(number))
        (snapshot / file.name).symlink_to(Path("..") / ".." / "blobs" / str(number))
    assert len(open_checkpoint(snapshot).headers) == len(Shape(layers=1).tensors())
    assert read_json(snapshot, "config.json")["model_type"] == "minimax_m2"
    (snapshot / "config.json").unlink()
    (snapshot / "config.json").symlink_to(folder / "config.json")
    with pytest.raises(ValueError, match="leads out"):
        read_json(snapshot, "config.json")


def test_a_relative_path_and_a_linked_folder_are_fine(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "alias").symlink_to(folder)
    assert not open_checkpoint(tmp_path / "alias").problems
    monkeypatch.chdir(folder)
    assert not open_checkpoint(locate(".")).problems


def test_what_index_and_files_disagree_about_is_listed(folder: Path) -> None:
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    name = next(name for name, header in open_checkpoint(folder).headers.items() if header.file == files[0])
    rewrite_index(folder, {name: files[1], "not.there": files[2]})
    problems = "\n".join(open_checkpoint(folder).problems)
    assert f"{name} is in {files[0]}, but the index says {files[1]}" in problems
    assert f"not.there should be in {files[2]}" in problems


def test_a_tensor_in_two_files_is_listed(folder: Path) -> None:
    (folder / INDEX).unlink()
    save_file({"lm_head.weight": torch.zeros(2)}, folder / "zz.safetensors")
    assert any("lm_head.weight is in both" in problem for problem in open_checkpoint(folder).problems)


@pytest.mark.parametrize("size", [0, 7, 100, -9])
def test_a_broken_weight_file_is_named(folder: Path, size: int) -> None:
    file = sorted(folder.glob("*.safetensors"))[0]
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(ValueError, match=r"model-00000-of-00003.safetensors is not a whole safetensors file"):
        open_checkpoint(folder)


def test_a_missing_shard_is_named(folder: Path) -> None:
    sorted(folder.glob("*.safetensors"))[1].unlink()
    with pytest.raises(ValueError, match=r"cannot read .*model-00001-of-00003.safetensors"):
        open_checkpoint(folder)


@pytest.mark.parametrize("text", ["", "{", "[1]", "\xff", '{"weight_map": 3}', '{"weight_map": {}}', '{"weight_map": {"a": 1}}'])
def test_a_broken_index_is_named(folder: Path, text: str) -> None:
    (folder / INDEX).write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match=INDEX):
        open_checkpoint(folder)


def test_no_weights_at_all(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(ValueError, match="no weights in safetensors"):
        open_checkpoint(tmp_path)


def test_a_path_is_a_folder_or_an_id(folder: Path) -> None:
    assert locate(str(folder)) == folder
    for path in (str(folder / "config.json"), str(folder / "nothing" / "there"), "a b/c", "../x/y"):
        with pytest.raises(ValueError, match="neither a folder nor a Hugging Face id"):
            locate(path)
    with pytest.raises(ValueError, match="revisions are for Hugging Face ids"):
        locate(str(folder), revision="main")


def test_without_network_the_way_out_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ValueError, match=r"cannot reach the Hugging Face hub for 'nobody/nothing'.*pass its path"):
        locate("nobody/nothing")


def test_only_weights_json_and_templates_are_fetched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked = []

    def fetch(repo: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append((repo, revision, allow_patterns))
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    assert locate("org/name", revision="v1") == tmp_path
    locate("org/name", weights=False)
    assert asked == [("org/name", "v1", ["*.json", "*.jinja", "*.safetensors"]), ("org/name", None, ["*.json", "*.jinja"])]


def test_what_the_hub_refuses_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def fetch(repo: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        raise HFValidationError("Repo id must be something else\nand more")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    with pytest.raises(ValueError, match=r"has no 'org/name' for us: Repo id must be something else$"):
        locate("org/name")
