"""The comparison of CPU engines: its arithmetic by hand, its weights against the loader, and the contenders that need no other engine."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from pointsman import cli, tiny
from pointsman.bench.cpu import run
from pointsman.bench.cpu.gguf_file import tensors, write_gguf
from pointsman.bench.cpu.llama import LlamaServer
from pointsman.bench.cpu.run import agreements, decode_rate, ratios, summarize, tree_memory_mb
from pointsman.bench.machine import peak_memory_mb
from pointsman.bench.serving.query import Outcome, Query
from pointsman.models import architecture_of
from pointsman.models.checkpoint import open_checkpoint
from pointsman.models.folder import read_json

BUNDLED = pytest.mark.skipif(not (tiny.path() / "model.safetensors").is_file(), reason="the bundled checkpoint is not there")

SERVE = ("xllamacpp", lambda path: LlamaServer("x", 1, 8, 1))
WRITE = ("gguf", lambda path: write_gguf(path, path / "x", "F16"))


def result(rate, start=1.0):
    return {"start_up_s": start, "sizes": {"1": {"decode_tokens_per_s": rate, "prefill_s": 0.1, "peak_memory_mb": 5.0}}}


def test_a_row_is_the_median_of_its_rounds():
    row = summarize([result(100.0, 1.0), result(300.0, 3.0), result(120.0, 2.0)], 64)
    assert row["start_up_s"] == 2.0
    rates = {"decode_tokens_per_s": 120.0, "prefill_s": 0.1, "prefill_tokens_per_s": 640}
    assert row["sizes"]["1"] == rates | {"peak_memory_mb": 5.0, "spread": 1.667}


def test_ours_is_measured_by_the_best_of_the_same_kind():
    rates = {"pointsman": 300.0, "pointsman http": 90.0, "llama.cpp f16": 150.0, "llama.cpp q8_0": 200.0, "llama.cpp f16 http": 100.0}
    rows = {name: summarize([result(rate)], 64) for name, rate in rates.items()}
    assert ratios(rows) == {"pointsman": {"1": 1.5}, "pointsman http": {"1": 0.9}}
    assert ratios({"pointsman": rows["pointsman"]}) == {}


def test_tokens_count_up_to_the_first_that_is_another():
    oracle = {"answers": [[1, 2, 3, 4], [5, 6]]}
    assert agreements({"answers": [[1, 2, 9, 4], [5, 6]]}, {"transformers": [oracle]}) == pytest.approx(4 / 6, abs=1e-4)
    assert agreements(oracle, {"transformers": [oracle]}) == 1.0


@pytest.mark.parametrize(("pieces", "rate"), [([1.0, 1.5, 3.0], 2.0), ([3.0, 3.0], 1.6), ([3.0], 1.6)])
def test_tokens_that_come_at_once_make_no_speed_of_their_own(pieces, rate):
    query = Query(ids=(1,), input_len=1, output_len=5)
    assert decode_rate(Outcome(query=query, sent_s=0.5, piece_s=pieces, output_tokens=5)) == rate


def test_memory_of_this_process_is_some():

    assert 1 < tree_memory_mb(os.getpid()) < 1e6


def test_memory_is_that_of_a_process_and_not_of_who_started_it():
    ballast = bytes(400) * 10**6
    program = "from pointsman.bench.machine import peak_memory_mb; print(peak_memory_mb())"
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert 1 < float(found) < len(ballast) / 1e6 < peak_memory_mb()


@BUNDLED
def test_the_weights_of_the_file_are_those_of_the_checkpoint():
    """Every block times its scale, written out; and nothing of the checkpoint is left behind."""
    folder = tiny.path()
    architecture = architecture_of(read_json(folder, "config.json"))
    found = dict(tensors(folder, architecture))
    checkpoint = open_checkpoint(folder)
    raw = {name: tensor.clone() for name, tensor in checkpoint.tensors(checkpoint.headers)}
    name = "model.layers.2.block_sparse_moe.experts.3.w2.weight"
    weight, scale = raw[name].float(), raw[f"{name}_scale_inv"]
    for row in range(scale.shape[0]):
        for column in range(scale.shape[1]):
            weight[128 * row : 128 * (row + 1), 128 * column : 128 * (column + 1)] *= scale[row, column]
    assert np.array_equal(found["blk.2.ffn_down_exps.weight"][3], weight.numpy())
    elements = sum(tensor.numel() for name, tensor in raw.items() if not name.endswith("_scale_inv"))
    assert sum(array.size for array in found.values()) == elements
    assert torch.equal(torch.from_numpy(found["blk.0.exp_probs_b.bias"]), raw["model.layers.0.block_sparse_moe.e_score_correction_bias"])


@pytest.mark.parametrize(
    ("module", "call"), [("xllamacpp", lambda path: LlamaServer("x", 1, 8, 1)), ("gguf", lambda path: write_gguf(path, path / "x", "F16"))]
)
def test_what_is_not_installed_is_named(module, call, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ValueError, match=f"pip install {module}"):
        call(tmp_path)


def test_contenders_that_there_are_not_or_cannot_run_are_refused(monkeypatch, capsys):
    assert cli.main(["bench", "cpu", "--contender", "ollama"]) == 1
    assert "--contender is 'ollama'; there are pointsman, transformers, llama.cpp f16" in capsys.readouterr().err
    monkeypatch.setitem(run.NEEDS, "llama.cpp", ("surely_not_installed",))
    assert cli.main(["bench", "cpu"]) == 1
    assert "llama.cpp f16 needs surely_not_installed: pip install surely_not_installed, or leave it out" in capsys.readouterr().err


@BUNDLED
def test_our_own_two_are_measured(capsys):
    words = "bench cpu --contender pointsman --contender _ --num-iters 1 --num-repeats 1 --batch-size 1 2 --input-len 8 --output-len 4"
    assert cli.main([word.replace("_", "pointsman http") for word in words.split()]) == 0
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert list(summary["rows"]) == ["pointsman", "pointsman http"]
    for row in summary["rows"].values():
        assert row["start_up_s"] > 0
        assert all(entry["decode_tokens_per_s"] > 0 and entry["peak_memory_mb"] > 1 for entry in row["sizes"].values())
