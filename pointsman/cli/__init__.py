"""The command `pointsman`: one verb a command.

A row of VERBS names where a verb's flags and its code live; both are loaded only when that verb is asked for, because a person
waits for the first line of `--help` and of an error, and every import before it counts. Faults end here: an unknown word is
answered with the nearest known one (exit code 2), what the layers below refuse with their one line (1), Ctrl-C with silence
(130). A traceback is left for our own faults.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pointsman
from pointsman.cli.flags import UsageError, add_flags, build, new_parser, parse
from pointsman.config import EngineConfig, flags, nearest
from pointsman.request import RequestFailed

INTERRUPTED = 130
BROKEN_PIPE = 141


@dataclass(frozen=True)
class Verb:
    """One command.

    Attributes:
        summary: a line for the overview.
        options: "module:class" of the flags the verb has besides those of the engine.
        run: "module:function" that takes the engine's values and the options and returns the exit code.
        positional: the option that is given without its name.
        engine: the verb has an engine, and so its flags.
        understood: "module:class" of more flags, checked and said to decide nothing: those of a command that this one tells of.
    """

    summary: str
    options: str
    run: str
    positional: str | None = None
    engine: bool = True
    understood: str | None = None


VERBS = {
    "serve": Verb("answer over HTTP, with OpenAI's API", "pointsman.config:ServerConfig", "pointsman.cli.serve:run"),
    "generate": Verb("answer one prompt", "pointsman.cli.options:GenerateOptions", "pointsman.cli.generate:run", positional="prompt"),
    "chat": Verb("talk in the terminal", "pointsman.cli.options:ChatOptions", "pointsman.cli.chat:run"),
    "eval arithmetic": Verb(
        "accuracy on word problems", "pointsman.bench.options:AccuracyOptions", "pointsman.bench.accuracy:eval_arithmetic"
    ),
    "eval tools": Verb("accuracy of tool calls", "pointsman.bench.options:AccuracyOptions", "pointsman.bench.accuracy:eval_tools"),
    "eval table": Verb(
        "accuracy of every runner and cache type",
        "pointsman.bench.options:TableOptions",
        "pointsman.bench.accuracy_table:eval_table",
    ),
    "eval agreement": Verb(
        "nearness to Hugging Face's model", "pointsman.bench.options:AgreementOptions", "pointsman.bench.agreement:eval_agreement"
    ),
    "eval gsm8k": Verb("few-shot GSM8K", "pointsman.bench.options:Gsm8kOptions", "pointsman.bench.gsm8k:eval_gsm8k"),
    "bench serve": Verb(
        "load on any OpenAI endpoint", "pointsman.bench.serving.options:ServeOptions", "pointsman.bench.serving.run:run", engine=False
    ),
    "explain": Verb(
        "whether a model runs, how, and how fast at best",
        "pointsman.cli.explain.options:ExplainOptions",
        "pointsman.cli.explain.run:run",
        positional="checkpoint",
        understood="pointsman.config:ServerConfig",
    ),
    "routes": Verb(
        "load of the experts, of records or of a server",
        "pointsman.cli.routes.options:RoutesOptions",
        "pointsman.cli.routes.run:show",
        positional="files",
        engine=False,
    ),
    "routes diff": Verb(
        "where two routing records part",
        "pointsman.cli.routes.options:DiffOptions",
        "pointsman.cli.routes.run:diff",
        positional="files",
        engine=False,
    ),
    "quantize": Verb(
        "make a checkpoint's weights FP8",
        "pointsman.cli.options:QuantizeOptions",
        "pointsman.cli.quantize:run",
        positional="folders",
        engine=False,
    ),
    "bench cpu": Verb("this engine beside others on a CPU", "pointsman.bench.options:CpuOptions", "pointsman.bench.cpu.run:run"),
    "bench latency": Verb("speed and memory, offline", "pointsman.bench.options:LatencyOptions", "pointsman.bench.latency:run"),
    "bench kernels": Verb(
        "the experts' kernels on a GPU", "pointsman.bench.options:KernelsOptions", "pointsman.bench.kernels:run", engine=False
    ),
    "bench scaling": Verb(
        "what more GPUs would give, from measured parts",
        "pointsman.bench.options:ScalingOptions",
        "pointsman.bench.scaling.run:run",
        engine=False,
    ),
    "tune": Verb("find how a GPU runs experts best", "pointsman.bench.options:TuneOptions", "pointsman.bench.tune:run", engine=False),
}


@dataclass(frozen=True)
class Command:
    """What was typed: the verb, the engine's values that were given, the verb's own options, and flags that decide nothing here."""

    name: str
    engine: dict[str, Any]
    options: Any
    idle: tuple[str, ...] = ()


def read(words: Sequence[str]) -> Command:
    """Understand a command line, the program's name left out. Raises UsageError; prints and exits for `--help`."""
    name, rest = _find_verb(words)
    verb = VERBS[name]
    options = _load(verb.options)
    parser = new_parser(f"pointsman {name}", verb.summary[0].upper() + verb.summary[1:] + ".")
    add_flags(parser, options, verb.positional)
    if verb.engine:
        add_flags(parser, EngineConfig, without=flags(options))
    understood = _load(verb.understood) if verb.understood is not None else None
    if understood is not None:
        add_flags(parser, understood, without=flags(options))
    values = parse(parser, rest)
    idle = {field: values.pop(field) for field in (() if understood is None else flags(understood)) if field in values}
    own = {field: values.pop(field) for field in flags(options) if field in values}
    if "model_path" in values:
        values["model"] = values.pop("model_path")  # its name in Python
    try:
        if understood is not None:
            build(understood, idle)
        return Command(name, values, build(options, own), tuple(f"--{field.replace('_', '-')}" for field in idle))
    except ValueError as error:
        raise UsageError(str(error)) from None


def _find_verb(words: Sequence[str]) -> tuple[str, Sequence[str]]:
    first = words[0]
    if (longer := " ".join(words[:2])) in VERBS and longer != first:
        return longer, words[2:]
    if first in VERBS:
        return first, words[1:]
    families: dict[str, list[str]] = {}
    for family, _, member in (name.partition(" ") for name in VERBS):
        families.setdefault(family, []).append(member)
    if first not in families:
        raise UsageError(f"unknown command {first!r}{nearest(first, families) or '; there are ' + ', '.join(families)}")
    members = ", ".join(families[first])
    if len(words) < 2 or words[1].startswith("-"):
        raise UsageError(f"{first} needs one of {members}")
    name = f"{first} {words[1]}"
    if name not in VERBS:
        raise UsageError(f"unknown command {name!r}{nearest(name, VERBS) or '; there are ' + members}")
    return name, words[2:]


def _load(home: str) -> Any:
    module, _, name = home.partition(":")
    return getattr(importlib.import_module(module), name)


def overview() -> str:
    """What `pointsman --help` prints."""
    width = max(map(len, VERBS)) + 2
    lines = [f"  {name:{width}}{verb.summary}" for name, verb in VERBS.items()]
    return "\n".join(["usage: pointsman COMMAND [FLAGS]", "", *lines, "", "`pointsman COMMAND --help` lists the flags of a command."])


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a model writes characters that a terminal may not have
    try:
        code = _run(words)
        sys.stdout.flush()
        return code
    except UsageError as error:
        return _complain(words, str(error), 2)
    except BrokenPipeError:
        return _broken_pipe()
    except (ValueError, OSError, RequestFailed) as error:
        return _complain(words, str(error), 1)
    except KeyboardInterrupt:
        return INTERRUPTED


def _run(words: Sequence[str]) -> int:
    if not words or words[0] in ("-h", "--help"):
        print(overview())
        return 0 if words else 2
    if words[0] == "--version":
        print(f"pointsman {pointsman.__version__}")
        return 0
    command = read(words)
    if command.engine.get("trust_remote_code") or getattr(command.options, "trust_remote_code", False):
        print("--trust-remote-code has no effect: no code of a checkpoint ever runs", file=sys.stderr)
    if command.idle:
        print(f"of the server, and without effect on what is explained: {', '.join(command.idle)}", file=sys.stderr)
    with _interruptible_imports():
        run = _load(VERBS[command.name].run)
    return int(run(command.engine, command.options))


@contextlib.contextmanager
def _interruptible_imports() -> Iterator[None]:
    """While it lasts, Ctrl-C ends the process at once: raised in the middle of a library's import, it may be swallowed there."""
    ours = threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if ours:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        if ours:
            signal.signal(signal.SIGINT, signal.default_int_handler)


def _complain(words: Sequence[str], message: str, code: int) -> int:
    verb = max((name for name in VERBS if list(words[: len(name.split())]) == name.split()), key=len, default=None)
    program = f"pointsman {verb}" if verb else "pointsman"
    print(f"{program}: {message}", file=sys.stderr)
    return code


def _broken_pipe() -> int:
    """The reader of our output has gone. What is still buffered goes nowhere, so that Python does not complain at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return BROKEN_PIPE
