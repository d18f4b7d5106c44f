"""A small model with random weights and a tokenizer of bytes: everything the engine needs, made in a moment."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from tests.exchange import answers, folders, scored

__all__ = ["answers", "folders", "scored"]

PUBLISHED = Path(__file__).parents[1] / "models" / "minimax_m25.json"
CONFIG = json.loads(PUBLISHED.read_text()) | {
    "attn_type_list": [1, 1, 1],
    "hidden_size": 96,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rotary_dim": 8,
    "rope_theta": 10000,
    "max_position_embeddings": 256,
    "num_local_experts": 10,
    "num_experts_per_tok": 3,
    "vocab_size": 288,
    "quantization_config": {"quant_method": "fp8", "fmt": "float8_e4m3fn", "activation_scheme": "dynamic", "weight_block_size": [32, 48]},
}
EOS = 256


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint folder for `load_format="dummy"`."""
    path = tmp_path_factory.mktemp("model")
    (path / "config.json").write_text(json.dumps(CONFIG))
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": EOS, "temperature": 0.5, "do_sample": True}))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({character: index for index, character in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<end>"])
    tokenizer.save(str(path / "tokenizer.json"))
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}ai: {% endif %}"
    (path / "chat_template.jinja").write_text(template)
    return path
