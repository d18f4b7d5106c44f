"""The flags of `generate` and `chat` besides those of the engine.

A sampling flag that is not given leaves the value to the checkpoint: its generation_config is the advice of those who trained
it, and `--temperature 0` is greedy whatever it says. Values are checked when they are typed, before any model loads.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pointsman.config import flag
from pointsman.request import SamplingParams

LOG_LEVELS = ("debug", "info", "warning", "error")


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """How tokens are chosen; None is the checkpoint's own value."""

    max_tokens: int | None = flag(None, "most tokens to generate, thinking included (default: to the end of the context)")
    min_tokens: int | None = flag(None, "fewest tokens to generate")
    temperature: float | None = flag(None, "0 is greedy (default: as the checkpoint advises, as for the flags below)")
    top_p: float | None = flag(None, "keep the likeliest tokens whose probabilities reach this")
    top_k: int | None = flag(None, "keep this many of the likeliest tokens; 0 keeps all")
    min_p: float | None = flag(None, "keep tokens at least this share as likely as the likeliest")
    repetition_penalty: float | None = flag(None, "above 1 makes tokens that were there less likely")
    presence_penalty: float | None = flag(None, "subtracted once from the logits of tokens in the answer")
    frequency_penalty: float | None = flag(None, "subtracted from the logits of tokens in the answer, once per occurrence")
    seed: int | None = flag(None, "the same seed gives the same answer")
    stop: tuple[str, ...] = flag((), "end the answer before this text; may be given several times")
    ignore_eos: bool = flag(False, "go on past the model's end-of-text tokens")

    def __post_init__(self) -> None:
        self.params({})

    def params(self, advised: Mapping[str, Any], **more: Any) -> SamplingParams:
        """What was asked for, and for the rest what the checkpoint advises."""
        given = {item.name: getattr(self, item.name) for item in dataclasses.fields(self)}
        given = {name: value for name, value in given.items() if value is not None}
        return SamplingParams(**{"max_tokens": None, **advised, **given, **more})


@dataclass(frozen=True, kw_only=True)
class GenerateOptions:
    """One prompt, one answer."""

    prompt: str = flag("", "the text to answer; - reads it from standard input")
    raw: bool = flag(False, "continue the prompt as it is, without the checkpoint's chat template")
    system: str | None = flag(None, "system message (default: the checkpoint's)")
    n: int = flag(1, "answers to the prompt", low=1, high=128)
    logprobs: int | None = flag(None, "with --json: log-probabilities of each token and of this many of the likeliest", low=0, high=64)
    json: bool = flag(False, "print one JSON object instead of text")
    hide_thinking: bool = flag(False, "print the answer alone")
    log_level: str = flag("warning", "how much to log", choices=LOG_LEVELS)
    sampling: SamplingOptions = field(default_factory=SamplingOptions)

    def __post_init__(self) -> None:
        if not self.prompt:
            raise ValueError("there is no prompt; give a text in quotes, or - to read it from standard input")
        if self.raw and self.system is not None:
            raise ValueError("--system needs the chat template, and --raw leaves it out")
        if self.logprobs is not None and not self.json:
            raise ValueError("--logprobs needs --json")


@dataclass(frozen=True, kw_only=True)
class ChatOptions:
    """A conversation."""

    system: str | None = flag(None, "system message (default: the checkpoint's)")
    hide_thinking: bool = flag(False, "print the answers alone")
    log_level: str = flag("warning", "how much to log", choices=LOG_LEVELS)
    sampling: SamplingOptions = field(default_factory=SamplingOptions)


@dataclass(frozen=True, kw_only=True)
class QuantizeOptions:
    """A checkpoint, and where its quantized form goes."""

    folders: tuple[str, ...] = flag((), "the checkpoint (a folder or a Hugging Face id), and the folder to write")
    per_tensor: bool = flag(False, "one scale for each matrix, in place of one for each block of 128 x 128")
    force: bool = flag(False, "write into a folder that is not empty; weights in it are replaced")
    json: bool = flag(False, "print one JSON object with every layer's error instead of the table")

    def __post_init__(self) -> None:
        if len(self.folders) != 2:
            raise ValueError(f"give the checkpoint and the folder to write; {len(self.folders)} are given")
