"""Nearness to Hugging Face's model: the divergence against its definition, and the command on the bundled checkpoint."""

import json
import shutil
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pointsman import cli, tiny
from pointsman.bench.agreement import divergence
from pointsman.bench.oracle import load_oracle
from pointsman.request import Logprob

LOGITS = st.lists(st.floats(-8, 8), min_size=6, max_size=6)


def shares(logits):
    values = np.exp(np.asarray(logits))
    return values / values.sum()


def entries(share, tokens):
    return {token: Logprob(logprob=float(np.log(share[token])), rank=index + 1) for index, token in enumerate(tokens)}


@settings(deadline=None)
@given(LOGITS, LOGITS, st.integers(1, 6))
def test_the_divergence_is_that_of_the_definition_and_grows_with_what_is_known(theirs, ours, known):
    p, q = shares(theirs), shares(ours)
    whole = float((p * np.log(p / q)).sum())
    order = list(np.argsort(-q))
    assert divergence(np.log(p), entries(q, order)) == pytest.approx(whole, abs=1e-9)
    part = divergence(np.log(p), entries(q, order[:known]))
    assert -1e-12 <= part <= whole + 1e-9  # putting outcomes together loses divergence, never adds any


def test_without_transformers_the_command_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ValueError, match=r"this needs transformers, which is not installed .*pip install 'pointsman\[test\]'"):
        load_oracle(tiny.path())


def folder_without(tmp_path, *names):
    """The bundled checkpoint without some files."""
    for path in tiny.path().iterdir():
        if path.is_file() and path.name not in names:
            shutil.copy(path, tmp_path)
    return tmp_path


@pytest.mark.skipif(not (tiny.path() / "model.safetensors").is_file(), reason="the bundled checkpoint is not there")
@pytest.mark.parametrize("missing", [(), ("chat_template.jinja",)])
def test_in_float32_ours_is_theirs(missing, tmp_path, capsys):
    """Both in float32, cache too: they differ by the order of sums, which is 1e-5 in a logit, so 1e-8 in KL is far above it."""
    folder = folder_without(tmp_path, *missing)
    words = f"eval agreement --model-path {folder} --num-questions 1 --max-tokens 8 --kv-cache-dtype float32"
    assert cli.main(words.split()) == 0
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert summary["kl_max"] < 1e-8
    assert summary["top1_match"] == 1.0
    assert summary["routing_match"] > 0.999
    assert summary["tokens"] * 6 == summary["choices"]


def test_without_a_tokenizer_there_is_no_question_to_ask(tmp_path, capsys):
    folder = folder_without(tmp_path, "chat_template.jinja", "tokenizer.json", "tokenizer_config.json")
    assert cli.main(["eval", "agreement", "--model-path", str(folder)]) != 0
    assert "has no tokenizer; the problems that are answered are texts" in capsys.readouterr().err
