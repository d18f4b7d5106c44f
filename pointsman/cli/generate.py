"""`pointsman generate`: one prompt, answered offline.

The prompt goes through the checkpoint's chat template, because a model that was trained on conversations answers a bare question
badly; `--raw` continues the text as it is. A person gets the answer as it comes, a program one JSON object.
"""

from __future__ import annotations

import contextlib
import json
import logging
import sys
from collections.abc import Sequence
from typing import Any

from pointsman.cli.answer import AnswerPrinter, render, split
from pointsman.cli.options import GenerateOptions
from pointsman.engine.llm import LLM
from pointsman.request import CompletionOutput, FinishReason, RequestFailed, RequestOutput, SamplingParams


def run(engine: dict[str, Any], options: GenerateOptions) -> int:
    """Answer the prompt. Raises RequestFailed where the engine gave up on it."""
    logging.basicConfig(level=options.log_level.upper())
    prompt = sys.stdin.read() if options.prompt == "-" else options.prompt
    if not prompt.strip():
        raise ValueError("the prompt is empty")
    with contextlib.closing(LLM(**engine)) as llm:
        tokens, opened = _prompt(llm, prompt, options)
        params = options.sampling.params(llm.engine.generation_defaults, n=options.n, logprobs=options.logprobs)
        if options.json:
            print(json.dumps(_report(llm, llm.generate([tokens], params)[0], opened if not options.raw else None), allow_nan=False))
        elif options.n > 1:
            _print_choices(llm.generate([tokens], params)[0].outputs, opened, options)
        else:
            _stream(llm, tokens, params, opened, options)
    return 0


def _prompt(llm: LLM, prompt: str, options: GenerateOptions) -> tuple[list[int], bool]:
    """The prompt's tokens, and whether they end inside the thinking."""
    if llm.engine.tokenizer is None:
        raise ValueError(f"{llm.engine.model_name} has no tokenizer.json; text cannot be read or written")
    if options.raw:
        return llm.engine.tokenizer.encode(prompt), False
    if llm.engine.chat_template is None:
        raise ValueError(f"{llm.engine.model_name} has no chat template; --raw continues the text as it is")
    system = [] if options.system is None else [{"role": "system", "content": options.system}]
    return render(llm, [*system, {"role": "user", "content": prompt}])


def _stream(llm: LLM, tokens: Sequence[int], params: SamplingParams, opened: bool, options: GenerateOptions) -> None:
    printer = None if options.raw else AnswerPrinter(opened=opened, hide_thinking=options.hide_thinking, stream=sys.stdout)
    reason, error = None, None
    for delta in llm.stream(tokens, params):
        if printer is None:
            print(delta.text, end="", flush=True)
        else:
            printer.feed(delta.text)
        reason, error = delta.finish_reason, delta.error
    if printer is None:
        print()
    else:
        printer.finish()
    if error is not None:
        raise RequestFailed(f"the engine gave up: {error}")
    if reason is FinishReason.LENGTH:
        print("pointsman generate: cut off at the token limit", file=sys.stderr)


def _print_choices(outputs: Sequence[CompletionOutput], opened: bool, options: GenerateOptions) -> None:
    for output in outputs:
        print(f"[{output.index}]")
        if options.raw:
            print(output.text)
            continue
        printer = AnswerPrinter(opened=opened, hide_thinking=options.hide_thinking, stream=sys.stdout)
        printer.feed(output.text)
        printer.finish()


def _report(llm: LLM, result: RequestOutput, opened: bool | None) -> dict[str, Any]:
    """The JSON object; `reasoning` and `content` are the two parts of `text`, absent from a raw completion."""
    return {
        "model": llm.engine.model_name,
        "prompt_token_ids": result.prompt_token_ids,
        "choices": [_choice(output, opened) for output in result.outputs],
        "usage": {
            "prompt_tokens": len(result.prompt_token_ids),
            "completion_tokens": sum(len(output.token_ids) for output in result.outputs),
            "cached_tokens": result.num_cached_tokens,
        },
    }


def _choice(output: CompletionOutput, opened: bool | None) -> dict[str, Any]:
    entry: dict[str, Any] = {"index": output.index, "text": output.text}
    if opened is not None:
        part = split(output.text, opened=opened)
        entry |= {"reasoning": part.reasoning, "content": part.content}
    entry |= {"token_ids": output.token_ids, "finish_reason": output.finish_reason, "stop_reason": output.stop_reason}
    if output.logprobs is not None:
        entry["logprobs"] = [
            [{"id": token, "token": item.decoded_token, "logprob": item.logprob, "rank": item.rank} for token, item in step.items()]
            for step in output.logprobs
        ]
    return entry
