"""`pointsman explain` as it is typed: the answer, the tables, the object, the refusals, and that no weight is read."""

from __future__ import annotations

import json
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest

from pointsman import cli
from pointsman.cli.explain.options import GPUS
from pointsman.cli.explain.remedies import remedies
from pointsman.config import engine_config
from pointsman.engine.device_models import MODELS
from pointsman.engine.plan import plan_on
from pointsman.kernels.library import FLASHINFER, installed
from pointsman.models import architecture_of
from tests.models.test_architecture import PUBLISHED
from tests.models.test_family_configs import GLM, MIXTRAL, QWEN

M25 = Path(__file__).parents[1] / "models" / "minimax_m25.json"


def explain(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str]:
    code = cli.main(["explain", *words])
    return code, capsys.readouterr().out


def test_it_answers_whether_how_and_how_fast(capsys: pytest.CaptureFixture[str]) -> None:
    code, out = explain(capsys, str(M25), "--device", "h200", "--tp", "2", "--kv-cache-dtype", "fp8_e4m3")
    assert code == 0
    verdict, _, rest = " ".join(out.replace("│", " ").split()).partition("Memory of a rank")
    assert verdict.startswith("MiniMaxM2ForCausalLM on 2 x h200 runs: 107.25 GiB of weights and ")
    assert "A step in which 16 decode takes at least 10.9 ms" in verdict and "24 of 48 query heads" in verdict
    for words in ("graphs and compiled kernels", "routed", "sm_100", "experts hit", "4.49e+12", "vendor 4.8e12"):
        assert words in rest
    assert "pip install 'pointsman[flashinfer]'" in rest or installed(FLASHINFER), "nothing of a reason is taken for markup"


def test_one_object_has_it_all(capsys: pytest.CaptureFixture[str]) -> None:
    words = (str(M25), "--device", "h200", "--tp", "2", "--kv-cache-dtype", "fp8_e4m3", "--json", "--batch-sizes", "1", "16")
    code, out = explain(capsys, *words)
    found = json.loads(out)
    assert code == 0 and found["runs"] and found["refusals"] == found["would_run"] == []
    assert [row["batch"] for row in found["floor"]["decode"]] == [1, 16]
    saved = 62 * 3 * (6 - 0.85) / 1000  # the figures that the project was planned with, where a sum over ranks took 6 us
    for row, ms in zip(found["floor"]["decode"], (2.4 - saved, 12 - saved), strict=True):
        assert 1000 * row["seconds"] == pytest.approx(ms, rel=0.03)
        assert row["seconds"] == pytest.approx(sum(row["parts"].values())) and row["tokens_per_second"] == row["batch"] / row["seconds"]
    assert found["choices"]["experts"]["chosen"] == "routed" and "sm_100" in found["choices"]["experts"]["candidates"]["flashinfer_trtllm"]
    assert found["choices"]["attention"]["candidates"]["triton"] is None
    assert sum(found["memory"]["weights"].values()) / 2**30 == pytest.approx(107.25, abs=0.01)
    assert found["device"]["read"] == {"value": 4.49e12, "source": "measured 2026-11; vendor 4.8e12"}


def test_what_does_not_fit_is_told_what_would(capsys: pytest.CaptureFixture[str]) -> None:
    code, out = explain(capsys, str(M25), "--device", "h200", "--tp", "2", "--json")
    found = json.loads(out)
    assert code == 1 and not found["runs"] and "less than one request of 196608 tokens" in found["verdict"]
    assert "--tp 2 --kv-cache-dtype fp8_e4m3" in found["would_run"] and "--tp 4" in found["would_run"]
    for remedy in found["would_run"]:  # each is enough by itself; the last of a flag counts
        assert explain(capsys, str(M25), "--device", "h200", "--tp", "2", *remedy.split())[0] == 0, remedy
    length = int(next(remedy.split()[1] for remedy in found["would_run"] if remedy.startswith("--context-length")))
    assert explain(capsys, str(M25), "--device", "h200", "--tp", "2", "--context-length", str(length + 16))[0] == 1


def test_memory_is_no_remedy_for_another_refusal() -> None:
    plan = plan_on(engine_config(tp=4, moe_runner_backend="cpu"), architecture_of(PUBLISHED), MODELS["h200"])
    assert plan.refusals and remedies(plan, MODELS["h200"]) == []


def test_the_bundled_checkpoint_on_the_machine_at_hand(capsys: pytest.CaptureFixture[str]) -> None:
    code, out = explain(capsys, "--device", "cpu", "--json")
    assert code == 0 and json.loads(out)["memory"]["context_length"] == 2048


@pytest.mark.parametrize("config", [QWEN, MIXTRAL, GLM], ids=["qwen", "mixtral", "glm"])
def test_every_family_is_explained(config: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    code, out = explain(capsys, str(tmp_path), "--device", "h200", "--tp", "4" if config is QWEN else "8", "--json", "--batch-sizes", "1")
    found = json.loads(out)
    (floor,) = found["floor"]["decode"]
    assert code == 0, found["verdict"]
    # what is read of weights is at least those of the layers that all tokens take
    weights = found["memory"]["weights"]
    always = weights["attention"] + weights["head"] + weights["router"] + weights.get("shared experts", 0) + weights.get("dense layers", 0)
    assert always < floor["bytes"] < sum(weights.values())
    assert ("shared experts" in weights) == ("dense layers" in weights) == (config is GLM)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere/at/all"], "neither a folder nor a Hugging Face id"),
        (["missing.json"], "cannot read missing.json"),
        ([str(M25), "--device", "h20"], "--device is 'h20'; it must be one of auto, cpu, cuda, a100"),
        ([str(M25), "--device", "h200", "--context", "200000"], "context is 200000; a request has at most 196608 tokens"),
        ([str(M25), "--model-path", "x", "--device", "h200"], "the model is given twice"),
        ([str(M25), "--device", "h200", "--tp", "3"], "cannot be shared evenly by 3 ranks"),
        ([str(M25), "--device", "h200", "--batch-sizes", "0"], "--batch-sizes is 0"),
        ([str(M25), "--url", "x"], "unknown flag '--url'"),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["explain", *words]) in (1, 2)
    assert message in capsys.readouterr().err


def test_flags_of_serve_mean_the_same() -> None:
    command = cli.read(["explain", "--model", "x", "--tp", "2", "--mem-fraction-static", "0.8", "--device", "b200"])
    assert command.engine == {"model": "x", "tensor_parallel_size": 2, "mem_fraction_static": 0.8}
    assert command.options.device == "b200" and command.options.checkpoint is None


def test_the_names_of_devices_are_those_of_the_table() -> None:
    assert tuple(MODELS) == GPUS


def test_neither_weights_nor_a_server_nor_a_compiler_are_touched() -> None:
    program = (
        "import sys; from pointsman import cli; "
        f"assert cli.main(['explain', {str(M25)!r}, '--device', 'gb200', '--tp', '4', '--json']) == 0; "
        "print([name for name in ('transformers', 'fastapi', 'triton', 'numba', 'tokenizers') if name in sys.modules], file=sys.stderr)"
    )
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stderr.strip()) == (0, "[]")


def test_the_picture_has_every_rank_and_what_the_table_has(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "plan.svg"
    code, out = explain(capsys, str(M25), "--device", "h200", "--tp", "8", "--json", "--plot", str(file))
    root, svg = ElementTree.parse(file).getroot(), "{http://www.w3.org/2000/svg}"
    texts = [text.text for text in root.iter(f"{svg}text")]
    assert code == 0 and [text for text in texts if text and text.startswith("rank ")] == [f"rank {rank}" for rank in range(8)]
    assert {"experts", "keys and values", "the whole step", "links", "h200 has 139.8"} <= set(texts)
    assert len(root.findall(f".//{svg}circle")) == 5 * len(json.loads(out)["floor"]["decode"])
    assert explain(capsys, "--device", "cpu", "--plot", str(file))[0] == 0
    assert not any("cpu has" in str(text.text) for text in ElementTree.parse(file).getroot().iter(f"{svg}text")), "it fills too little"
    with pytest.raises(OSError, match="No such file"):
        cli._run(["explain", "--device", "h200", "--plot", str(tmp_path / "none" / "plan.svg")])


def test_a_command_of_the_server_is_explained_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    """The flags of the first command that the project must run: those of the server decide nothing, and are named."""
    words = "--reasoning-parser minimax --tool-call-parser minimax-m2 --trust-remote-code --tp 4 --mem-fraction-static 0.9"
    words += " --kv-cache-dtype fp8_e4m3 --quantization fp8 --enforce-piecewise-cuda-graph"
    assert cli.main(["explain", "--model-path", str(M25), "--device", "h200", *words.split()]) == 0
    told = capsys.readouterr()
    assert told.out.startswith("MiniMaxM2ForCausalLM on 4 x h200 runs")
    assert "without effect on what is explained: --reasoning-parser, --tool-call-parser" in told.err
    assert cli.main(["explain", "--reasoning-parser", "deepseek"]) == 2
    assert "it must be one of minimax" in capsys.readouterr().err
    assert cli.main(["explain", "--api-key", ""]) == 2


def test_what_is_not_asked_for_fits_the_model(capsys: pytest.CaptureFixture[str]) -> None:
    words = (str(M25), "--device", "h200", "--tp", "4", "--json", "--context-length")
    assert [json.loads(explain(capsys, *words, length)[1])["floor"]["context"] for length in ("512", "4096")] == [512, 1024]


def test_replicas_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert "on 4 x h200, each of 2 replicas, runs" in explain(capsys, str(M25), "--device", "h200", "--tp", "4", "--dp", "2")[1]
    assert cli.main(["explain", ""]) == 1 and "leave it out for the bundled checkpoint" in capsys.readouterr().err


PROGRAM = """
import contextlib, io, sys
from pointsman import cli
heavy = {"torch", "triton", "numba", "safetensors", "transformers"}
for words in (
    ["explain", sys.argv[1], "--device", "h200", "--tp", "4", "--json"],
    ["explain", "--device", "b200"],
    ["explain", "--device", "cpu"],
    ["--help"], ["serve", "--help"], ["routes", "--help"], ["bench", "serve", "--help"], ["explain", "--help"], ["quantize", "--help"],
):
    with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
        assert cli.main(words) == 0
    assert not heavy & sys.modules.keys(), (words, heavy & sys.modules.keys())
"""


def test_it_needs_no_tensors() -> None:
    """Nobody waits for torch who asks what would be chosen, or for help."""
    done = subprocess.run([sys.executable, "-c", PROGRAM, str(M25)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
