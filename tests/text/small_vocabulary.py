"""A small byte-level BPE with MiniMax-M2's special tokens, whose merges cross character borders, and a folder like a checkpoint's."""

import json
from functools import cache
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers

SPECIAL = ["]!p~[", "]~b]", "[e~[", "]!d~[", "]~!b["]
MARKS = ["<think>", "</think>", "<minimax:tool_call>", "</minimax:tool_call>"]
# Added tokens that are awkward to decode: one is outside the byte alphabet, one inside it though it is not ASCII.
ODD_SPECIAL, ODD_MARK = "▁日本", "caféx"

CORPUS = [
    "the cat saw the other cat.\n\n  Then it ran",
    "日本語のテキスト 日本日本",
    "naïve café déjà vu",
    "😀😁😂🤣 🤔🤔",
    "\ufffd\ufffd \ufffd odd",
]


@cache
def backend() -> tokenizers.Tokenizer:
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=420, initial_alphabet=alphabet, special_tokens=SPECIAL, show_progress=False)
    made.train_from_iterator(CORPUS * 5, trainer)
    made.add_tokens([AddedToken(mark, special=False, normalized=False) for mark in [*MARKS, ODD_MARK]])
    made.add_special_tokens([AddedToken(ODD_SPECIAL, special=True, normalized=False)])
    return made


def write_folder(folder: Path, **files: object) -> Path:
    """tokenizer.json, and further files by name: a text as it is, anything else as JSON."""
    backend().save(str(folder / "tokenizer.json"))
    for name, content in files.items():
        stem, _, ending = name.rpartition("_")
        text = content if isinstance(content, str) else json.dumps(content)
        (folder / f"{stem}.{ending}").write_text(text, encoding="utf-8")
    return folder
