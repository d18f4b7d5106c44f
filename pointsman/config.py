"""How an engine is set up: one frozen dataclass per owner, and the flags derived from their fields.

A field is a flag: `moe_runner_backend` is `--moe-runner-backend` on the command line and `moe_runner_backend=` of `LLM`.
Names follow SGLang where it has one. "auto" is a wish; what became of it is decided once, by whoever owns the choice, and
logged with the reason.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from dataclasses import dataclass, field
from typing import Any

DTYPES = ("auto", "bfloat16", "float32")
KV_DTYPES = ("auto", "bfloat16", "float32", "fp8_e4m3")
LOAD_FORMATS = ("auto", "safetensors", "dummy")
EXECUTORS = ("auto", "uni", "mp", "ray")
MOE_RUNNERS = (
    "auto",
    "reference",
    "cpu",
    "triton",
    "fused",
    "routed",
    "deep_gemm",
    "flashinfer_trtllm",
    "flashinfer_trtllm_routed",
    "flashinfer_cutlass",
)


def flag(
    default: Any,
    help: str,
    *,
    names: tuple[str, ...] = (),
    choices: tuple[str, ...] | None = None,
    low: float | None = None,
    high: float | None = None,
    secret: bool = False,
) -> Any:
    """A field that is a flag: its help, further names for it, and the values it may take."""
    metadata = {"help": help, "names": names, "choices": choices, "low": low, "high": high}
    return field(default=default, metadata=metadata, repr=not secret)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Which model, and how its weights are read."""

    model_path: str | None = flag(None, "folder or Hugging Face id of the checkpoint (default: the bundled one)", names=("--model",))
    revision: str | None = flag(None, "branch, tag or commit of a Hugging Face id")
    load_format: str = flag("auto", "dummy: random weights that route evenly, no weight files needed", choices=LOAD_FORMATS)
    dtype: str = flag("auto", "type the model computes in; on a CPU auto is float32", choices=DTYPES)
    quantization: str | None = flag(None, "must agree with the checkpoint; fp8: scales for blocks or for a matrix", choices=("fp8",))
    context_length: int | None = flag(None, "most tokens of prompt and answer (default: the model's)", low=1)
    served_model_name: str | None = flag(None, "name of the model in the API (default: the model path)")
    trust_remote_code: bool = flag(False, "accepted and without effect: no code of a checkpoint ever runs")
    random_seed: int = flag(0, "seed of dummy weights, and of requests that bring none", low=0)


@dataclass(frozen=True, kw_only=True)
class CacheConfig:
    """Keys, values and routing rows of past tokens."""

    kv_cache_dtype: str = flag("auto", "auto: bfloat16, or float32 where --dtype float32 is asked for", choices=KV_DTYPES)
    page_size: int = flag(16, "tokens a page; prefixes are shared by whole pages", low=1, high=1024)
    mem_fraction_static: float | None = flag(
        None, "share of memory for weights and cache together (default: 0.5 of a machine's, 0.9 of a GPU's)", low=0.01, high=0.99
    )
    max_total_tokens: int | None = flag(None, "tokens the cache holds (default: what the memory share allows)", low=1)
    disable_radix_cache: bool = flag(False, "do not share the prefixes of prompts")
    enable_return_routed_experts: bool = flag(False, "accepted and without effect: routing is always recorded, requests ask for it")


@dataclass(frozen=True, kw_only=True)
class SchedulerConfig:
    """What runs together in a step."""

    max_running_requests: int = flag(64, "most sequences that run at once", low=1, high=4096)
    chunked_prefill_size: int = flag(512, "most tokens a step, decode and prefill together", low=1, high=1 << 20)
    max_queued_requests: int = flag(4096, "most requests that wait; more are refused", low=1)
    disable_overlap_schedule: bool = flag(False, "plan a step only when the one before is done")


@dataclass(frozen=True, kw_only=True)
class KernelConfig:
    """What computes a step."""

    device: str = flag("auto", "where the model runs; auto: a GPU where there is one", choices=("auto", "cpu", "cuda"))
    moe_runner_backend: str = flag("auto", "what runs the experts", choices=MOE_RUNNERS)
    disable_flashinfer_autotune: bool = flag(False, "start without timing FlashInfer's kernels for the experts; it takes what it guesses")
    fp8_gemm_backend: str = flag("auto", "what runs the FP8 linear layers", choices=("auto", "triton", "cpu", "reference"))
    attention_backend: str = flag("auto", "what runs attention", choices=("auto", "triton", "reference", "flashinfer"))
    cpu_step: str = flag("auto", "a step on a CPU: compiled as one region, or torch op by op", choices=("auto", "torch", "compiled"))
    num_threads: int | None = flag(None, "threads of a step on a CPU (default: one a core)", low=1, high=1024)
    disable_cuda_graph: bool = flag(False, "launch the kernels of a step one by one")
    cuda_graph_max_bs: int | None = flag(None, "most tokens of a step that is a CUDA graph (default: the chunk size)", low=1, high=1 << 20)
    enforce_piecewise_cuda_graph: bool = flag(False, "CUDA graphs at every size, prefill too: this is so where graphs are on")
    enable_deterministic_inference: bool = flag(False, "the same bits for a request whatever shares its steps, at some speed")


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How the model is spread over devices."""

    tensor_parallel_size: int = flag(1, "devices that share every layer", names=("--tp", "--tp-size"), low=1, high=64)
    expert_parallel_size: int = flag(1, "groups of devices with whole experts", names=("--ep", "--ep-size"), low=1, high=64)
    data_parallel_size: int = flag(
        1, "replicas of all that behind one address, by Ray Serve (only for serve)", names=("--dp", "--dp-size"), low=1, high=1024
    )
    distributed_executor_backend: str = flag(
        "auto",
        "what runs the ranks past the first; mp: processes of this machine (auto), ray: actors of a Ray cluster, uni: there are none",
        choices=EXECUTORS,
    )


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """All that an engine needs to know."""

    model: ModelConfig = field(default_factory=ModelConfig)
    cache: CacheConfig = field(default_factory=CacheConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    kernel: KernelConfig = field(default_factory=KernelConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """The HTTP side."""

    host: str = flag("127.0.0.1", "address to listen on")
    port: int = flag(30000, "port to listen on", low=0, high=65535)
    api_key: str | None = flag(None, "clients must send it as a bearer token", secret=True)
    admin_api_key: str | None = flag(None, "key for admin routes (default: the API key; without one, this machine alone)", secret=True)
    cors_origin: tuple[str, ...] = flag((), "origin whose pages may ask from a browser; may be given several times, * is all")
    request_timeout: float = flag(3600.0, "seconds a request may take, waiting included", low=0.1, high=1e6)
    drain_timeout: float = flag(20.0, "seconds that running answers may take when the server is asked to end", low=0, high=1e6)
    watchdog_timeout: float = flag(300.0, "seconds in one step after which the engine counts as stuck and the server ends", low=1, high=1e6)
    restart_engine: bool = flag(False, "start the engine anew when it has failed; 3 times in 10 minutes, then the server ends")
    reasoning_parser: str | None = flag(
        None,
        "tells thinking from the answer (default: what the checkpoint calls for)",
        choices=("minimax", "minimax-append-think", "none"),
    )
    tool_call_parser: str | None = flag(
        None, "form of the model's tool calls (default: what the checkpoint calls for)", choices=("minimax-m2", "none")
    )
    log_level: str = flag("info", "how much to log", choices=("debug", "info", "warning", "error"))
    log_requests: bool = flag(False, "write a line of JSON to standard error for each request that has ended")

    def __post_init__(self) -> None:
        for name in ("api_key", "admin_api_key"):
            if getattr(self, name) == "":
                raise ValueError(f"--{name.replace('_', '-')} is empty; leave it out, or give a key")


@dataclass(frozen=True)
class Flag:
    """One flag: where its value belongs, its names, type and bounds."""

    section: str
    name: str
    names: tuple[str, ...]
    type: type
    default: Any
    help: str
    choices: tuple[str, ...] | None
    low: float | None
    high: float | None

    def check(self, value: Any) -> Any:
        """Return the value as its type, or raise ValueError that names it and what would be right."""
        if value is None:
            return self.default
        if self.type is bool and not isinstance(value, bool):
            raise ValueError(f"{self.name} is {value!r}; it must be True or False")
        if self.type in (int, float) and (isinstance(value, bool) or not isinstance(value, (int, float))):
            raise ValueError(f"{self.name} is {value!r}; it must be a number")
        if self.type is int and isinstance(value, float) and not value.is_integer():
            raise ValueError(f"{self.name} is {value!r}; it must be a whole number")
        if self.type is str and not isinstance(value, str):
            raise ValueError(f"{self.name} is {value!r}; it must be a string")
        if self.choices and value not in self.choices:
            raise ValueError(f"{self.name} is {value!r}; it must be one of {', '.join(self.choices)}")
        if (self.low is not None and not value >= self.low) or (self.high is not None and not value <= self.high):
            bounds = f"at least {self.low:g}" if self.high is None else f"from {self.low:g} to {self.high:g}"
            raise ValueError(f"{self.name} is {value!r}; it must be {bounds}")
        return self.type(value) if self.type in (int, float) else value


def flags(config: type) -> dict[str, Flag]:
    """The flags of a configuration class by field name, those of its sections included."""
    found: dict[str, Flag] = {}
    hints = typing.get_type_hints(config)
    for item in dataclasses.fields(config):
        if dataclasses.is_dataclass(hints[item.name]):
            section = typing.cast(type, hints[item.name])
            found |= {name: dataclasses.replace(entry, section=item.name) for name, entry in flags(section).items()}
        else:
            data = item.metadata
            kind = _plain_type(hints[item.name])
            names = (f"--{item.name.replace('_', '-')}", *data["names"])
            found[item.name] = Flag("", item.name, names, kind, item.default, data["help"], data["choices"], data["low"], data["high"])
    return found


def _plain_type(hint: Any) -> type:
    if isinstance(hint, types.UnionType):
        hint = next(option for option in hint.__args__ if option is not type(None))
    return typing.cast(type, hint)


def engine_config(**values: Any) -> EngineConfig:
    """An EngineConfig from flat keywords, named as the flags with underscores; `model`, `tp` and `ep` work too.

    Raises:
        ValueError: an unknown keyword (the message names the nearest), or a value out of range.
    """
    known = flags(EngineConfig)
    aliases = {alias.lstrip("-").replace("-", "_"): name for name, entry in known.items() for alias in entry.names}
    sections: dict[str, dict[str, Any]] = {}
    for keyword, value in values.items():
        if keyword not in aliases:
            raise ValueError(f"unknown option {keyword!r}{nearest(keyword, aliases)}")
        entry = known[aliases[keyword]]
        sections.setdefault(entry.section, {})[entry.name] = entry.check(value)
    hints = typing.get_type_hints(EngineConfig)
    return EngineConfig(**{section: hints[section](**content) for section, content in sections.items()})


def nearest(word: str, known: typing.Iterable[str]) -> str:
    """`; did you mean 'x'?`, or nothing where no known word is near."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
