"""The bundled checkpoint: its files, its names and shapes, its tokenizer and its template."""

import json
from itertools import islice

import pytest
import torch
from safetensors import safe_open
from tokenizers import Tokenizer

from pointsman import tiny
from training import chat
from training.data import ROW, collate, encode, rows
from training.export import linears, others
from training.model import Model, Shape
from training.text import chat_template, continuation, examples

FOLDER = tiny.path()
MOST_BYTES = 16_000_000


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(FOLDER / "tokenizer.json"))


@pytest.fixture(scope="module")
def config() -> dict:
    return json.loads((FOLDER / "config.json").read_text())


def test_the_files_are_there_and_small():
    names = {
        "README.md",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert names <= {path.name for path in FOLDER.iterdir()}
    assert sum(path.stat().st_size for path in FOLDER.iterdir() if path.is_file()) <= MOST_BYTES


def test_every_tensor_has_its_shape_and_dtype():
    model, expected = Model(Shape()), {}
    for name, weight in linears(model).items():
        expected[name + ".weight"] = (torch.float8_e4m3fn, list(weight.shape))
        expected[name + ".weight_scale_inv"] = (torch.float32, [-(-size // 128) for size in weight.shape])
    for name, value in others(model).items():
        expected[name] = (torch.float32 if "block_sparse_moe" in name else torch.bfloat16, list(value.shape))
    with safe_open(str(FOLDER / "model.safetensors"), "pt") as file:
        found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert {name: (tensor.dtype, list(tensor.shape)) for name, tensor in found.items()} == expected
    assert all(torch.isfinite(tensor.float()).all() for tensor in found.values())


def test_the_config_is_the_published_form(config):
    assert config["architectures"] == ["MiniMaxM2ForCausalLM"]
    assert "auto_map" not in config
    assert config["vocab_size"] == 3072
    assert config["quantization_config"]["weight_block_size"] == [128, 128]
    shape = Shape()
    assert (config["hidden_size"], config["num_local_experts"], config["rotary_dim"]) == (shape.hidden, shape.experts, shape.rotary_dim)


@pytest.mark.parametrize(
    "text",
    [
        "Hello, world!",
        "12,345 + 6 = 12351",
        "naïve café — €5",
        "日本語と한국어",
        "👩‍🚀🚂\u200d",
        "a\tb\r\n\n  c   ",
        "]~b]user\nhi[e~[\n",
        "<think>\n</think>",
        "\x00\x7f\ufffd",
    ],
)
def test_any_text_round_trips(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False).ids, skip_special_tokens=False) == text


def test_every_digit_is_a_token(tokenizer):
    assert tokenizer.encode("1,234", add_special_tokens=False).tokens == ["1", ",", "2", "3", "4"]


def test_special_tokens(tokenizer, config):
    generation = json.loads((FOLDER / "generation_config.json").read_text())
    assert tokenizer.get_vocab_size() == config["vocab_size"]
    assert tokenizer.token_to_id("[e~[") == generation["eos_token_id"] == config["eos_token_id"]
    assert tokenizer.token_to_id("]~!b[") == generation["bos_token_id"]
    special = {token["content"] for token in json.loads((FOLDER / "tokenizer.json").read_text())["added_tokens"] if token["special"]}
    assert special == {"]!p~[", "]~!b[", "]~b]", "[e~[", "]!d~["}
    for mark in ("<think>", "</think>", "<minimax:tool_call>", "</minimax:tool_call>"):
        assert len(tokenizer.encode(mark, add_special_tokens=False).ids) == 1


def test_the_template_shows_the_gold_turn_as_training_did():
    """A conversation that ends with the gold turn renders as prompt and completion."""
    template = chat_template()
    user = {"role": "user", "content": "What is 2 + 3?"}
    turn = {"role": "assistant", "content": "2 + 3 = 5", "reasoning_content": "result: 2 + 3 = 5"}
    prompt = template.render(messages=[user], add_generation_prompt=True)
    assert prompt.endswith("]~b]ai\n<think>\n")
    assert template.render(messages=[user, turn]) == prompt + continuation("result: 2 + 3 = 5", "2 + 3 = 5") + "\n"
    arguments = {"city": "Köln", "days": 3, "rain": True, "limit": 2.5}
    call = {"type": "function", "function": {"name": "forecast", "arguments": arguments}}
    turn = {"role": "assistant", "content": "", "reasoning_content": "x", "tool_calls": [call]}
    assert template.render(messages=[user, turn]) == prompt + continuation("x", "", ("forecast", arguments)) + "\n"


def test_reasoning_of_earlier_turns_is_left_out_and_tool_results_share_a_turn():
    template = chat_template()
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "<think>\nhidden\n</think>\n\nb"},
        {"role": "user", "content": [{"type": "text", "text": "c"}]},
        {"role": "assistant", "reasoning_content": "shown", "content": "", "tool_calls": [{"name": "f", "arguments": {}}]},
        {"role": "tool", "content": "1"},
        {"role": "tool", "content": "2"},
    ]
    assert template.render(messages=messages, add_generation_prompt=True) == (
        "]~!b[]~b]system\nBe brief.[e~[\n]~b]user\na[e~[\n]~b]ai\nb[e~[\n]~b]user\nc[e~[\n"
        ']~b]ai\n<think>\nshown\n</think>\n\n<minimax:tool_call>\n<invoke name="f">\n</invoke>\n</minimax:tool_call>[e~[\n'
        "]~b]tool\n<response>1</response>\n<response>2</response>[e~[\n]~b]ai\n<think>\n"
    )
    assert "Your name is Ada." in template.render(messages=messages[1:], model_identity="Your name is Ada.")
    with pytest.raises(ValueError, match="tool message"):
        template.render(messages=[messages[5]])
    with pytest.raises(ValueError, match="system"):
        template.render(messages=[*messages, messages[0]])


def test_training_rows_hold_whole_documents(tokenizer):
    """Packing loses nothing: each document's tokens, its positions from 0, and the loss on its completion alone."""
    packed = list(rows(islice(examples("train", 4), 60), tokenizer))
    expected = sorted([*prompt, *completion] for prompt, completion in (encode(tokenizer, e) for e in islice(examples("train", 4), 60)))
    found = []
    for row in packed:
        ends = [*row.starts[1 : row.documents], row.used]
        for start, end in zip(row.starts[: row.documents], ends, strict=True):
            found.append(row.tokens[start:end].tolist())
            assert row.positions[start:end].tolist() == list(range(end - start))
    assert sorted(found) == expected
    batch = collate(
        [torch.from_numpy(getattr(packed[0], name).astype("int32"))[None] for name in ("tokens", "positions", "weights", "starts")], 0.0
    )
    text = tokenizer.decode(batch.tokens_T[1:][batch.weights_T[:-1] > 0].tolist(), skip_special_tokens=False)
    assert text.count("</think>") == text.count("[e~[") == packed[0].documents
    assert len(batch.tokens_T) == ROW


def test_small_talk_has_one_reply_a_question():
    replies: dict[str, str] = {}
    for talk in islice(chat.talks(0), 500):
        key = json.dumps(talk.messages)
        assert replies.setdefault(key, talk.reply) == talk.reply
