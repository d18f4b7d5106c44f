"""Answers kept to grammars by the whole engine, of a model that knows nothing: whatever it draws, the text must fit.

Oracles: Python's own json and re, a validator of schemas (tests/grammar), and each request alone for what company and setup may not change.
"""

from __future__ import annotations

import functools
import json
import os
import re
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pointsman import LLM, RequestOutput, SamplingParams
from pointsman.engine import build, grammars
from pointsman.engine.engine import Engine
from pointsman.engine.grammars import Grammars
from pointsman.grammar import Grammar, tool_call_grammar
from pointsman.request import ChoiceDelta, FinishReason, Request
from pointsman.sampling.grammar_messages import Limits
from pointsman.text import Tokenizer
from tests.engine.conftest import EOS
from tests.grammar.validation import fits

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "count": {"type": "integer", "minimum": 1, "maximum": 99},
        "kind": {"enum": ["a", "bc", None]},
        "tags": {"type": "array", "items": {"type": "string", "pattern": "^[a-c]{1,3}$"}, "maxItems": 2},
    },
    "required": ["name", "count", "kind", "tags"],
}
DATE = "(19|20)[0-9]{2}-(0[1-9]|1[0-2])"
SUM = 'root ::= term ("+" term){1,3}\nterm ::= [0-9] | "(" root ")"'
TOOLS = [
    {"name": "look", "parameters": {"type": "object", "properties": {"n": {"type": "integer", "maximum": 9}}, "required": ["n"]}},
    {"name": "stop"},
]
CALL = re.compile(
    r'<minimax:tool_call>\n(<invoke name="look">\n<parameter name="n">-?\d+</parameter>\n</invoke>\n'
    r'|<invoke name="stop">\n</invoke>\n)</minimax:tool_call>'
)
PROMPT = [5, 17, 88, 3, 200, 41]


@pytest.fixture(scope="module")
def llm(folder: Path) -> Iterator[LLM]:
    llm = LLM(str(folder), load_format="dummy", progress=False, cpu_step="compiled")
    assert llm.engine._grammars is not None and llm.engine._grammars._host is None, "no grammar, no process"
    yield llm
    llm.close()


def kept(output: RequestOutput, grammar: Grammar) -> None:
    """Every choice that ended of itself fits."""
    for choice in output.outputs:
        assert choice.finish_reason is FinishReason.STOP, choice
        assert fits_text(choice.text, grammar), choice.text


def fits_text(text: str, grammar: Grammar) -> bool:
    if grammar.kind == "regex":
        return re.fullmatch(grammar.text, text) is not None
    if grammar.kind == "ebnf":
        return text.count("(") == text.count(")") and re.fullmatch(r"[()]*[0-9][()0-9+]*", text) is not None
    if grammar.kind == "structural":
        return CALL.fullmatch(text) is not None
    value = json.loads(text)
    return fits(SCHEMA, value) if grammar.kind == "json_schema" else isinstance(value, dict)


GRAMMARS = {
    "json_schema": Grammar.json_schema(SCHEMA),
    "regex": Grammar.regex(DATE),
    "ebnf": Grammar.ebnf(SUM),
    "call": tool_call_grammar(TOOLS, "required", parallel=False),
}
WAYS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 1.0},
    {"temperature": 3.0, "presence_penalty": 1.0},
    {"temperature": 0.7, "top_k": 5},
    {"temperature": 1.5, "top_p": 0.8, "repetition_penalty": 1.2},
    {"temperature": 1.0, "min_p": 0.2},
]


@pytest.mark.parametrize("name", GRAMMARS)
def test_any_way_of_sampling_keeps_to_the_grammar(llm: LLM, name: str) -> None:
    ways = [SamplingParams(max_tokens=240, seed=seed, grammar=GRAMMARS[name], **WAYS[seed % len(WAYS)]) for seed in range(24)]
    ended = [output for output in llm.generate([PROMPT] * len(ways), ways) if output.outputs[0].finish_reason is FinishReason.STOP]
    assert len(ended) > len(ways) // 2, "too few answers end for this to be a test"
    for output in ended:
        kept(output, GRAMMARS[name])


def test_any_object_is_json_as_far_as_it_goes(llm: LLM) -> None:
    """Blanks are what ends quickest here: a model that knows nothing seldom closes a string."""
    ids = llm.engine.tokenizer.encode('{} ":,') if llm.engine.tokenizer is not None else []
    likely = SamplingParams(max_tokens=200, grammar=Grammar.json_object(), logit_bias=dict.fromkeys(ids, 6.0), n=12, seed=3)
    ended = [choice for choice in llm.generate([PROMPT], likely)[0].outputs if choice.finish_reason is FinishReason.STOP]
    assert ended and all(isinstance(json.loads(choice.text), dict) for choice in ended)


def test_each_choice_is_kept_by_itself(llm: LLM) -> None:
    output = llm.generate([PROMPT], SamplingParams(n=6, max_tokens=240, seed=1, grammar=GRAMMARS["regex"]))[0]
    kept(output, GRAMMARS["regex"])
    assert len({choice.text for choice in output.outputs}) > 3


def workload() -> list[tuple[list[int], SamplingParams]]:
    """Constrained and free requests; the free ones at the odd places."""
    requests = []
    for index in range(12):
        prompt = [(7 * index + 3 * at) % 250 for at in range(4 + 5 * index)]
        grammar = [GRAMMARS["regex"], GRAMMARS["json_schema"], GRAMMARS["ebnf"]][index // 2 % 3] if index % 2 == 0 else None
        params = SamplingParams(max_tokens=90, seed=index, grammar=grammar, logprobs=1, **WAYS[index % len(WAYS)])
        requests.append((prompt, params))
    return requests


def run(llm: LLM, requests: list[tuple[list[int], SamplingParams]]) -> list[RequestOutput]:
    return llm.generate([prompt for prompt, _ in requests], [params for _, params in requests])


def test_free_requests_are_the_same_bits_in_constrained_company(llm: LLM) -> None:
    requests = workload()
    together = run(llm, requests)
    alone = run(llm, requests[1::2])
    for mine, theirs in zip(together[1::2], alone, strict=True):
        assert mine.outputs[0].token_ids == theirs.outputs[0].token_ids
        assert mine.outputs[0].logprobs == theirs.outputs[0].logprobs


SETUPS: dict[str, dict[str, Any]] = {
    "tiny cache": {"page_size": 4, "max_total_tokens": 208, "chunked_prefill_size": 48},
    "plain order, small chunks, few lanes": {"disable_overlap_schedule": True, "chunked_prefill_size": 7, "max_running_requests": 3},
}


@pytest.mark.parametrize("setup", SETUPS.values(), ids=SETUPS.keys())
def test_setup_changes_no_constrained_answer(folder: Path, llm: LLM, setup: dict[str, Any]) -> None:
    other = LLM(str(folder), load_format="dummy", progress=False, cpu_step="compiled", **setup)
    try:
        mine, theirs = run(llm, workload()), run(other, workload())
    finally:
        other.close()
    for one, two in zip(mine, theirs, strict=True):
        assert (one.outputs[0].token_ids, one.outputs[0].logprobs) == (two.outputs[0].token_ids, two.outputs[0].logprobs)
    if "max_total_tokens" in setup:
        assert other.engine.num_preemptions > 0, "the cache was not small enough to force a preemption"


def spelled(llm: LLM, text: str) -> list[int]:
    assert llm.engine.tokenizer is not None
    return llm.engine.tokenizer.encode(text)


def test_what_comes_before_after_is_free_and_the_rest_is_kept(llm: LLM) -> None:
    """The mark is of two tokens, which are made likely; until it is complete every byte may come."""
    grammar = Grammar.regex(DATE, after="ab")
    bias = dict.fromkeys(spelled(llm, "ab"), 5.0)
    params = SamplingParams(max_tokens=240, grammar=grammar, logit_bias=bias, n=16, seed=5)
    outputs = [choice for choice in llm.generate([PROMPT], params)[0].outputs if choice.finish_reason is FinishReason.STOP]
    assert len(outputs) > 8
    for choice in outputs:
        _, mark, rest = choice.text.partition("ab")
        assert mark and re.fullmatch("\n{0,2}" + DATE, rest), choice.text
    assert any(re.search("a.*b", choice.text.partition("ab")[0], re.DOTALL) for choice in outputs), (
        "beginnings of the mark come to nothing too"
    )


def test_free_text_is_that_of_a_free_request(llm: LLM) -> None:
    never = Grammar.regex("x", after="never written")
    free = SamplingParams(max_tokens=60, seed=9, ignore_eos=True, logit_bias={EOS: -100.0})
    kept_, plain = llm.generate([PROMPT] * 2, [free.replace(grammar=never), free])
    assert kept_.outputs[0].token_ids == plain.outputs[0].token_ids


def test_the_end_waits_for_the_grammar_and_then_cannot_be_put_off(llm: LLM) -> None:
    eager = {EOS: 100.0}
    for params in (
        SamplingParams(max_tokens=50, logit_bias=eager),
        SamplingParams(max_tokens=50, min_tokens=30, ignore_eos=True),
        SamplingParams(max_tokens=50, min_tokens=50),
    ):
        output = llm.generate([PROMPT], params.replace(grammar=Grammar.regex("[0-9]{8}"), seed=2))[0].outputs[0]
        assert (output.finish_reason, len(output.token_ids), output.token_ids[-1]) == (FinishReason.STOP, 9, EOS)
        assert re.fullmatch("[0-9]{8}", output.text)


def test_min_tokens_counts_where_the_grammar_can_go_on(llm: LLM) -> None:
    params = SamplingParams(max_tokens=60, min_tokens=20, grammar=Grammar.regex("[0-9]+"), logit_bias={EOS: 100.0}, seed=2)
    output = llm.generate([PROMPT], params)[0].outputs[0]
    assert (output.finish_reason, len(output.text)) == (FinishReason.STOP, 20)


def test_own_stops(llm: LLM) -> None:
    """A stop token may end what is complete; a stop string ends the text wherever it comes."""
    (five,) = spelled(llm, "5")
    token = SamplingParams(max_tokens=60, grammar=Grammar.regex("[0-9]{4,}"), stop_token_ids=(five,), seed=1, logit_bias={five: 50.0})
    output = llm.generate([PROMPT], token)[0].outputs[0]
    assert (output.finish_reason, output.stop_reason, len(output.text)) == (FinishReason.STOP, five, 4) and "5" not in output.text
    string = SamplingParams(max_tokens=60, grammar=Grammar.regex("[0-9]{12}"), stop=("55",), seed=1, logit_bias={five: 50.0})
    output = llm.generate([PROMPT], string)[0].outputs[0]
    assert (output.finish_reason, output.stop_reason, output.text) == (FinishReason.STOP, "55", "")


def test_a_limit_cuts_what_fits_so_far(llm: LLM) -> None:
    output = llm.generate([PROMPT], SamplingParams(max_tokens=7, seed=4, grammar=Grammar.regex("[a-f]{3}-[0-9]{90}")))[0].outputs[0]
    assert output.finish_reason is FinishReason.LENGTH and re.fullmatch("[a-f]{3}-[0-9]{3}", output.text)


def test_logprobs_are_the_models_own(llm: LLM) -> None:
    """The same tokens, fed as a prompt, have the same log-probabilities. Within 2e-3: sums of other shapes round differently."""
    output = llm.generate([PROMPT], SamplingParams(max_tokens=8, seed=4, grammar=Grammar.regex("[0-9]{8}"), logprobs=0))[0].outputs[0]
    fed = llm.generate([PROMPT + output.token_ids], SamplingParams(max_tokens=1, prompt_logprobs=0))[0].prompt_logprobs
    assert fed is not None and output.logprobs is not None
    for token, drawn, scored in zip(output.token_ids, output.logprobs, fed[len(PROMPT) :], strict=True):
        assert scored is not None and drawn[token].logprob == pytest.approx(scored[token].logprob, abs=2e-3)


# What hurts, with limits small enough for a test.
LIMITS = Limits(compile_seconds=0.4, call_seconds=0.3, text_seconds=0.05, token_seconds=0.0004, memory_bytes=400 << 20)
SLOW = "too large or too complex"
COSTLY = "takes too long"
EVIL = {
    "many optional": (Grammar.regex("a?" * 7000 + "b"), f"{SLOW}|{COSTLY}"),
    "many names": (Grammar.json_schema({"type": "object", "properties": {f"p{index}": {"type": "string"} for index in range(3000)}}), SLOW),
    "long chain": (
        Grammar.ebnf("root ::= r0\n" + "\n".join(f'r{i} ::= "x" r{i + 1} | r{i + 1}' for i in range(4000)) + '\nr4000 ::= "a"'),
        SLOW,
    ),
    "nested counts": (Grammar.regex("(((a{1,90}){1,90}){1,90}){1,90}b"), COSTLY),
    "ambiguous": (Grammar.ebnf('root ::= s\ns ::= s s s | "a" | "b" s "c" | [a-z]* | ""'), COSTLY),
    "unclosed": (Grammar.regex("(a"), "parenthesis"),
    "no text": (Grammar.json_schema({"$ref": "#"}), "no text fits"),
    "no rule": (Grammar.ebnf("root ::= nothing"), "nothing"),
    "no structure": (Grammar("structural", '{"type": "triggered_tags"}'), "cannot be used"),
    "lookahead": (Grammar.regex("(?=a)b"), "Lookahead"),
    "no definition": (Grammar.json_schema({"$ref": "#/$defs/none"}), "cannot be used"),
}


@pytest.fixture(scope="module")
def guarded(folder: Path) -> Iterator[Engine]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "Grammars", functools.partial(Grammars, limits=LIMITS))
        llm = LLM(str(folder), load_format="dummy", progress=False, cpu_step="compiled")
    yield llm.engine
    llm.close()


def finish(engine: Engine, requests: list[Request]) -> dict[str, list[ChoiceDelta]]:
    """The deltas of each request, when all have ended."""
    for request in requests:
        engine.add(request)
    found: dict[str, list[ChoiceDelta]] = {request.rid: [] for request in requests}
    while engine.has_work:
        for delta in engine.step():
            found[delta.rid].append(delta)
    return found


def asked(name: str, grammar: Grammar | None, **params: Any) -> Request:
    return Request(rid=name, prompt_token_ids=tuple(PROMPT), sampling=SamplingParams(seed=1, grammar=grammar, **params))


def test_what_hurts_ends_its_own_request_alone(guarded: Engine) -> None:
    bias = dict.fromkeys(guarded.tokenizer.encode("a"), 100.0) if guarded.tokenizer is not None else {}
    evil = [asked(name, grammar, max_tokens=150, logit_bias=bias) for name, (grammar, _) in EVIL.items()]
    good = [asked("good", GRAMMARS["regex"], max_tokens=200), asked("free", None, max_tokens=200, ignore_eos=True)]
    found = finish(guarded, [*evil, *good])
    for name, (_, reason) in EVIL.items():
        last = found[name][-1]
        assert last.finish_reason is FinishReason.ERROR and last.error is not None and re.search(reason, last.error), (name, last)
        assert last.refused == (COSTLY not in last.error) and (last.refused or len(found[name]) > 1)
    assert re.fullmatch(DATE, "".join(delta.text for delta in found["good"]))
    assert sum(len(delta.token_ids) for delta in found["free"]) == 200


def test_what_was_refused_is_refused_again_at_once(guarded: Engine) -> None:
    grammar = EVIL["many names"][0]
    first = finish(guarded, [asked("first", grammar)])["first"]
    assert guarded._grammars is not None
    started = guarded._grammars._entries[grammar].since
    second = finish(guarded, [asked("second", grammar, n=3)])["second"]
    assert [delta.error for delta in second] == [first[0].error] * 3 and [delta.index for delta in second] == [0, 1, 2]
    assert guarded._grammars._entries[grammar].since == started


def test_a_process_that_is_killed_ends_its_texts_alone(guarded: Engine) -> None:
    grammar = Grammar.regex("[0-9]{100}")
    guarded.add(asked("victim", grammar, max_tokens=120))
    guarded.add(asked("witness", GRAMMARS["regex"], max_tokens=120))
    deltas: list[ChoiceDelta] = []
    while not any(delta.rid == "victim" and delta.token_ids for delta in deltas):
        deltas += guarded.step()
    assert guarded._grammars is not None and guarded._grammars._host is not None
    children = subprocess.run(
        ["ps", "-o", "pid=", "--ppid", str(guarded._grammars._host._process.pid), "--sort", "start_time"],
        capture_output=True,
        text=True,
        check=True,
    )
    os.kill(max(map(int, children.stdout.split())), signal.SIGKILL)
    while guarded.has_work:
        deltas += guarded.step()
    ends = {delta.rid: delta for delta in deltas if delta.finish_reason is not None}
    assert {ends["victim"].finish_reason, ends["witness"].finish_reason} == {FinishReason.ERROR, FinishReason.STOP}


def test_waiting_for_a_grammar_can_be_given_up(guarded: Engine) -> None:
    guarded.add(asked("waits", Grammar.regex("x" * 50), n=2))
    assert guarded.has_work and guarded.num_waiting == 2
    deltas = guarded.abort("waits")
    assert [(delta.index, delta.finish_reason, delta.refused) for delta in deltas] == [
        (0, FinishReason.ABORT, False),
        (1, FinishReason.ABORT, False),
    ]
    assert not guarded.has_work and guarded.num_waiting == 0 and guarded.step() == []


def test_as_many_grammars_are_kept_as_there_is_room_for(guarded: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammars, "MAX_GRAMMARS", 3)
    assert guarded._grammars is not None
    requests = [asked(f"{index}", Grammar.regex(f"{index}[0-9]{{9}}"), max_tokens=50) for index in range(8)]
    for request in requests:
        guarded.add(request)
    texts: dict[str, str] = {}
    while guarded.has_work:
        for delta in guarded.step():
            texts[delta.rid] = texts.get(delta.rid, "") + delta.text
        assert len(guarded._grammars) <= 3
    assert all(re.fullmatch(f"{rid}[0-9]{{9}}", text) for rid, text in texts.items()) and len(texts) == 8


def test_a_request_that_can_never_run_hears_of_it_with_its_grammar_ready(guarded: Engine) -> None:
    long = Request(rid="long", prompt_token_ids=(1,) * 300, sampling=SamplingParams(grammar=GRAMMARS["regex"]))
    (delta,) = finish(guarded, [long])["long"]
    assert delta.refused and "context" in (delta.error or "")


def test_python_callers_get_a_value_error(llm: LLM) -> None:
    with pytest.raises(ValueError, match="parenthesis is not closed"):
        llm.generate([PROMPT], SamplingParams(grammar=Grammar.regex("(a")))


def test_without_an_end_of_text_there_is_no_structured_output(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tokenizer, "eos_ids", (), raising=False)
    monkeypatch.setattr(Tokenizer, "__setattr__", lambda self, name, value: name == "eos_ids" or object.__setattr__(self, name, value))
    llm = LLM(str(folder), load_format="dummy", progress=False, cpu_step="torch")
    with pytest.raises(ValueError, match="end-of-text"):
        llm.generate([PROMPT], SamplingParams(grammar=GRAMMARS["regex"]))
    llm.close()
