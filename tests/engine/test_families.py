"""Engines over checkpoints of Qwen3-MoE, Mixtral and GLM-4.5: tokens and experts are those of Hugging Face's models, by whichever step."""

from __future__ import annotations

import dataclasses
import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from pointsman import LLM, SamplingParams
from pointsman.engine.candidates import reason_against_compiled
from pointsman.models.quantize import quantize_checkpoint
from pointsman.models.sharding import Shard
from pointsman.rl import replay
from pointsman.routed_experts import RoutedExperts, encode
from tests.models.families import build, forward, save
from tests.models.test_family_configs import ARCHITECTURES

VOCABULARY = 288
PROMPT = list(range(40, 60))
# stored forms are those of other tests, so that a machine without compiled steps compiles no more of them;
# the compiled step serves all but groups of experts
CASES = {"qwen": "torch", "qwen, dense layers": "compiled", "mixtral": "compiled", "glm": "compiled", "glm, groups": "torch"}
PARAMS = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True, return_routed_experts=True, logprobs=1)


@pytest.fixture(scope="module")
def models() -> dict[str, torch.nn.Module]:
    return {name: build(name, vocab_size=VOCABULARY) for name in CASES}


@pytest.fixture(scope="module")
def folders(folder: Path, models: dict[str, torch.nn.Module], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("families")
    for number, model in enumerate(models.values()):
        save(model, root / str(number), torch.float32)
        for file in ("tokenizer.json", "chat_template.jinja"):
            shutil.copy(folder / file, root / str(number))
    return {name: root / str(number) for number, name in enumerate(models)}


@contextmanager
def engine(folder: Path, step: str, **options: object) -> Iterator[LLM]:
    llm = LLM(str(folder), progress=False, cpu_step=step, context_length=128, **options)
    try:
        yield llm
    finally:
        llm.close()


@pytest.mark.parametrize("name", CASES)
def test_tokens_and_experts_are_theirs_and_their_model_replays_them(
    name: str, folders: dict[str, Path], models: dict[str, torch.nn.Module]
) -> None:
    model = models[name]
    theirs = model.generate(
        torch.tensor([PROMPT]), attention_mask=torch.ones(1, len(PROMPT)), max_new_tokens=24, do_sample=False, eos_token_id=None
    )[0].tolist()
    with engine(folders[name], CASES[name], kv_cache_dtype="float32") as llm:
        layers = llm.engine.architecture.expert_layers
        (answer,) = llm.generate([PROMPT], PARAMS)
        output = answer.outputs[0]
        ids = [*PROMPT, *output.token_ids]
        assert ids == theirs and len(set(output.token_ids)) > 3
        rows = np.asarray(output.routed_experts)
        _, _, chosen = forward(model, ids[:-1])
        assert np.array_equal(np.sort(rows), torch.stack(chosen, 1).sort(-1).values.numpy())
        record = RoutedExperts(rows_RLK=rows, num_experts=8, layers=layers)
        again = llm.generate([PROMPT], PARAMS, replay_routed_experts=encode(record))[0].outputs[0]
        assert (again.token_ids, again.routing_agreement) == (output.token_ids, 1.0)
        with pytest.raises(ValueError, match=r"of the layers .*; this model's are"):
            llm.generate(
                [PROMPT], PARAMS, replay_routed_experts=RoutedExperts(rows_RLK=rows, num_experts=8, layers=[9 + n for n in layers])
            )
    with replay(model, [record], lengths=[len(ids) - 1]) as forced, torch.no_grad():
        logits = model(torch.tensor([ids[:-1]]), use_cache=False).logits[0]
    assert forced.agreement == 1.0
    logprobs = logits.log_softmax(-1)[len(PROMPT) - 1 :].gather(-1, torch.tensor(output.token_ids)[:, None])[:, 0]
    assert output.logprobs is not None
    found = torch.tensor([entry[token].logprob for entry, token in zip(output.logprobs, output.token_ids, strict=True)])
    # sums in another order, over logits of size 4
    torch.testing.assert_close(found, logprobs, atol=1e-4, rtol=0)


def test_where_the_compiled_step_cannot_serve_it_says_why(folders: dict[str, Path], caplog: pytest.LogCaptureFixture) -> None:
    folder, reason = folders["glm, groups"], "experts come from 2 of 4 groups"
    with pytest.raises(ValueError, match=f"cpu_step 'compiled' cannot serve here: .*{reason}.*these can: torch"):
        LLM(str(folder), progress=False, cpu_step="compiled", context_length=128)
    with caplog.at_level(logging.INFO), engine(folder, "auto"):
        assert any("cpu_step: torch" in line and reason in line for line in caplog.messages)


def test_keys_that_are_not_normed_are_warned_of(folders: dict[str, Path], caplog: pytest.LogCaptureFixture) -> None:
    for name, warned in (("mixtral", True), ("qwen", False)):
        caplog.clear()
        with engine(folders[name], "torch", kv_cache_dtype="fp8_e4m3"):
            assert any("does not norm its keys" in line for line in caplog.messages) == warned


def test_what_all_tokens_take_is_not_cut_within_blocks() -> None:
    """GLM-4.5-Air has dense layers 10944 wide and experts 1408 wide: pieces of whole blocks; experts 1400 wide are not."""
    air = dataclasses.replace(ARCHITECTURES["Glm4Moe"], expert_width=1408, shared_width=1408, dense_width=10944)
    for block, width, fits in (((128, 128), 1408, True), (None, 1400, True), ((128, 128), 1400, False)):
        model = dataclasses.replace(air, quantization_block=block, expert_width=width, shared_width=width)
        reason = reason_against_compiled(Shard(model), runner="cpu", linear="cpu", dtype="float32")
        assert reason is None if fits else reason is not None and "dense layers (10944 wide)" in reason


@pytest.mark.parametrize("name", ["mixtral", "glm"])
def test_quantized_checkpoints_and_weights_that_come_later(name: str, folders: dict[str, Path], tmp_path: Path) -> None:
    """FP8 weights serve, and an update from disk is as a fresh start from it: shared and dense matrices, biases and all."""
    (old, new) = (tmp_path / name for name in ("old", "new"))
    for seed, target in enumerate((old, new)):
        quantize_checkpoint(
            save(build(name, vocab_size=VOCABULARY, seed=seed), tmp_path / f"plain {seed}"), target, block=(8, 8), progress=False
        )
    with engine(new, CASES[name], quantization="fp8") as llm:
        fresh = llm.generate([PROMPT], PARAMS)[0].outputs[0]
    with engine(old, CASES[name], quantization="fp8") as llm:
        before = llm.generate([PROMPT], PARAMS)[0].outputs[0]
        llm.update_weights_from_disk(str(new))
        after = llm.generate([PROMPT], PARAMS)[0].outputs[0]
    assert after.token_ids == fresh.token_ids != before.token_ids
    assert np.array_equal(after.routed_experts, fresh.routed_experts)


@pytest.mark.parametrize("name", CASES)
def test_random_weights_of_a_config_alone(name: str, folders: dict[str, Path], tmp_path: Path) -> None:
    for file in ("config.json", "tokenizer.json"):
        shutil.copy(folders[name] / file, tmp_path)
    with engine(tmp_path, "auto", load_format="dummy") as llm:
        assert len(llm.generate([PROMPT], PARAMS)[0].outputs[0].token_ids) == 24
