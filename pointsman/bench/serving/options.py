"""The flags of `bench serve`. Apart from the code they steer, so that a wrong flag is told at once."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from typing import Any

from pointsman.config import flag

BACKENDS = ("openai", "openai-chat", "generate")
DATASETS = ("random", "shared-prefix", "azure", "mooncake", "sharegpt", "custom")
FILES = ("azure", "mooncake", "sharegpt", "custom")
METRICS = ("ttft", "tpot", "itl", "e2el")
HOST, PORT = "127.0.0.1", 30000
NUM_PROMPTS = 1000

# Flags that only some datasets have a use for, with what they are where they are not given.
ONLY_FOR: dict[str, dict[str, Any]] = {
    "random": {"random_input_len": 1024, "random_output_len": 1024, "random_range_ratio": 1.0},
    "shared-prefix": {
        "gsp_num_groups": 64,
        "gsp_prompts_per_group": 16,
        "gsp_system_prompt_len": 2048,
        "gsp_question_len": 128,
        "gsp_output_len": 256,
    },
    "sharegpt": {"sharegpt_output_len": None},
    "custom": {"custom_output_len": 256},
    "trace": {"trace_length_scale": 1.0, "trace_slowdown": 1.0},
}
TRACES = ("azure", "mooncake")
# What a saved run tells of every load.
DESCRIBED = (
    "use_chat_template",
    "tokenize_prompt",
    "burstiness",
    "ramp_up_strategy",
    "ramp_up_start_rps",
    "ramp_up_end_rps",
    "num_warmups",
    "temperature",
    "ignore_eos",
    "return_routed_experts",
    "seed",
)


@dataclass(frozen=True, kw_only=True)
class ServeOptions:
    """A load on an endpoint. What is None and has a default by its dataset gets it here."""

    backend: str = flag("openai", "API of the server: OpenAI's completions, its chat, or SGLang's /generate", choices=BACKENDS)
    host: str = flag(HOST, "address of the server")
    port: int = flag(PORT, "port of the server", low=1, high=65535)
    base_url: str | None = flag(None, "http(s)://host:port[/path] in place of --host and --port")
    endpoint: str | None = flag(None, "path of the API (default: that of the backend)")
    api_key: str | None = flag(None, "sent as a bearer token", secret=True)
    header: tuple[str, ...] = flag((), "further header, as NAME: VALUE; may be given several times")
    model: str | None = flag(None, "name of the model in the API (default: the first that the server lists)")
    tokenizer: str | None = flag(
        None,
        "folder or Hugging Face id of the tokenizer that counts, or `server` to let the server count "
        "(default: --model where it is one, the bundled one where the server serves that)",
    )
    trust_remote_code: bool = flag(False, "accepted and without effect: no code of a checkpoint ever runs")
    dataset_name: str = flag("random", "what is asked", choices=DATASETS)
    dataset_path: str | None = flag(None, "file of sharegpt, custom, azure or mooncake")
    num_prompts: int | None = flag(
        None, "requests to send (default: 1000, all of shared-prefix, and of a file that has fewer all)", low=1, high=10_000_000
    )
    random_input_len: int = flag(None, "most tokens of a random prompt (default: 1024)", low=1, high=1 << 24)
    random_output_len: int = flag(None, "most tokens of its answer (default: 1024)", low=1, high=1 << 24)
    random_range_ratio: float = flag(
        None, "lengths are drawn evenly from this share of the most, to the most (default: 1, all of one length)", low=0, high=1
    )
    gsp_num_groups: int = flag(None, "shared-prefix: groups (default: 64)", low=1, high=1 << 20)
    gsp_prompts_per_group: int = flag(None, "shared-prefix: prompts that share a beginning (default: 16)", low=1, high=1 << 20)
    gsp_system_prompt_len: int = flag(None, "shared-prefix: tokens that they share (default: 2048)", low=1, high=1 << 24)
    gsp_question_len: int = flag(None, "shared-prefix: further tokens of each (default: 128)", low=1, high=1 << 24)
    gsp_output_len: int = flag(None, "shared-prefix: most tokens of an answer (default: 256)", low=1, high=1 << 24)
    sharegpt_output_len: int | None = flag(None, "sharegpt: most tokens of an answer (default: as long as the file's)", low=1, high=1 << 24)
    custom_output_len: int = flag(None, "custom: most tokens of an answer that the file does not limit (default: 256)", low=1)
    trace_length_scale: float = flag(None, "azure, mooncake: multiplies every length (default: 1)", low=1e-4, high=100)
    trace_slowdown: float = flag(None, "azure, mooncake: multiplies every moment; 0 sends at once (default: 1)", low=0, high=1e6)
    use_chat_template: bool = flag(False, "wrap prompts in the tokenizer's chat template, which counts towards their length")
    tokenize_prompt: bool = flag(False, "send token ids, not text")
    request_rate: float | None = flag(None, "requests a second; inf sends all at once (default: inf, or the times of a trace)", low=1e-6)
    burstiness: float = flag(1.0, "shape of the gaps between requests: 1 Poisson, less in bursts, more steadier", low=1e-3, high=1e6)
    ramp_up_strategy: str | None = flag(None, "let the request rate grow from start to end", choices=("linear", "exponential"))
    ramp_up_start_rps: float | None = flag(None, "request rate at the first request", low=1e-6, high=1e9)
    ramp_up_end_rps: float | None = flag(None, "request rate at the last request", low=1e-6, high=1e9)
    max_concurrency: int | None = flag(None, "most requests that run at once (default: no limit)", low=1, high=1 << 20)
    sweep_max_concurrency: tuple[int, ...] = flag((), "run once for each of these instead of --max-concurrency", low=1, high=1 << 20)
    sweep_request_rate: tuple[float, ...] = flag((), "run once for each of these instead of --request-rate", low=1e-6)
    num_warmups: int = flag(0, "requests before the clock starts, besides the one that checks the server", low=0, high=1 << 20)
    temperature: float | None = flag(0.0, "0 is greedy", low=0, high=100)
    ignore_eos: bool = flag(False, "answers are as long as they may be")
    return_routed_experts: bool = flag(False, "ask for the routing record of every answer, and check it")
    extra_request_body: str | None = flag(None, "JSON object of further fields of every request")
    request_timeout: float = flag(21600.0, "most seconds of one request", low=0.1, high=1e7)
    percentile_metrics: str = flag("ttft,tpot,itl", "which of ttft, tpot, itl, e2el the table has, separated by commas")
    metric_percentiles: str = flag("99", "which percentiles of them, separated by commas")
    goodput: tuple[str, ...] = flag((), "limit in milliseconds, as ttft:200; requests that keep all limits count; several may follow")
    save_result: bool = flag(False, "write the figures to a file named after backend, load, model and time")
    save_detailed: bool = flag(False, "with a file: the times of every request too")
    output_file: str | None = flag(None, "add the figures to this file, one JSON object a line")
    compare: tuple[str, ...] = flag((), "compare saved files and send nothing")
    plot: str | None = flag(None, "with a sweep or --compare: draw latency against throughput into this SVG file")
    seed: int = flag(1, "which prompts and gaps", low=0)

    def __post_init__(self) -> None:
        if self.compare:
            self._check_alone()
        if self.base_url is not None and (self.host, self.port) != (HOST, PORT):
            raise ValueError("--base-url stands in place of --host and --port; give one")
        self._check_dataset()
        self._check_arrivals()
        self._check_reports()

    def _check_alone(self) -> None:
        """Before any default is filled in."""
        given = [field.name for field in dataclasses.fields(self) if getattr(self, field.name) != field.default]
        if others := [_typed(name) for name in given if name not in ("compare", "plot", "trust_remote_code")]:
            raise ValueError(f"--compare reads files and sends nothing; leave out {' and '.join(others)}")

    @property
    def _dataset(self) -> str:
        """Under what its own flags are in `ONLY_FOR`."""
        return "trace" if self.dataset_name in TRACES else self.dataset_name

    def _check_dataset(self) -> None:
        for dataset, defaults in ONLY_FOR.items():
            for name, default in defaults.items():
                if dataset != self._dataset and getattr(self, name) is not None:
                    which = " or ".join(TRACES) if dataset == "trace" else dataset
                    raise ValueError(f"{_typed(name)} is for --dataset-name {which}; it is {self.dataset_name}")
                if getattr(self, name) is None:
                    object.__setattr__(self, name, default)
        if (self.dataset_path is None) == (self.dataset_name in FILES):
            needs = "needs --dataset-path" if self.dataset_path is None else "has no file; leave out --dataset-path"
            raise ValueError(f"--dataset-name {self.dataset_name} {needs}")
        made = self.gsp_num_groups * self.gsp_prompts_per_group
        if self.dataset_name == "shared-prefix" and self.num_prompts not in (None, made):
            raise ValueError(f"--num-prompts is {self.num_prompts}, but the groups of shared-prefix have {made} prompts; leave it out")
        if self.num_prompts is None and self.dataset_name not in FILES:
            object.__setattr__(self, "num_prompts", made if self.dataset_name == "shared-prefix" else NUM_PROMPTS)
        if self.backend == "openai-chat" and self.tokenize_prompt:
            raise ValueError("--tokenize-prompt sends ids, which --backend openai-chat does not take")

    def _check_arrivals(self) -> None:
        ramp = (self.ramp_up_strategy, self.ramp_up_start_rps, self.ramp_up_end_rps)
        if any(part is not None for part in ramp) and any(part is None for part in ramp):
            raise ValueError("a ramp needs --ramp-up-strategy, --ramp-up-start-rps and --ramp-up-end-rps together")
        named = {
            "--request-rate": self.request_rate is not None,
            "--ramp-up-strategy": self.ramp_up_strategy is not None,
            "--sweep-request-rate": bool(self.sweep_request_rate),
        }
        given = [name for name, is_given in named.items() if is_given]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} both say when requests are sent; give one")
        if self.sweep_max_concurrency and (self.max_concurrency is not None or self.sweep_request_rate):
            raise ValueError("--sweep-max-concurrency stands in place of --max-concurrency, and there is one sweep at a time")
        if self.burstiness != 1.0 and not given:
            raise ValueError("--burstiness needs --request-rate, a ramp or --sweep-request-rate: without one all requests are sent at once")
        if self.dataset_name in TRACES and given:
            raise ValueError(f"{given[0]}: a trace has its own times; --trace-slowdown stretches them")

    def _check_reports(self) -> None:
        _ = self.metrics, self.percentiles, self.goodput_ms, self.extra, self.headers
        if self.plot is not None and not (self.is_sweep or self.compare):
            raise ValueError("--plot needs several points: --sweep-max-concurrency, --sweep-request-rate or --compare")
        if self.save_detailed and not (self.save_result or self.output_file):
            raise ValueError("--save-detailed needs --save-result or --output-file")
        if self.save_result and self.output_file:
            raise ValueError("--save-result names its file by itself; give it or --output-file")

    @property
    def described(self) -> dict[str, Any]:
        """What a saved run says of the load, beside what a sweep changes."""
        names = ["dataset_name", *(["dataset_path"] if self.dataset_name in FILES else []), *ONLY_FOR[self._dataset], *DESCRIBED]
        return {name: getattr(self, name) for name in names} | {"extra_request_body": self.extra, "goodput_ms": self.goodput_ms}

    @property
    def most_prompts(self) -> int:
        """How many requests are sent; fewer where a file has fewer and nobody has asked for more."""
        return self.num_prompts or NUM_PROMPTS

    @property
    def path(self) -> str:
        """The dataset's file."""
        assert self.dataset_path is not None
        return self.dataset_path

    @property
    def is_sweep(self) -> bool:
        return bool(self.sweep_max_concurrency or self.sweep_request_rate)

    @property
    def metrics(self) -> tuple[str, ...]:
        """Raises ValueError for one that there is not."""
        names = tuple(name.strip() for name in self.percentile_metrics.split(",") if name.strip())
        for name in names:
            if name not in METRICS:
                raise ValueError(f"--percentile-metrics has {name!r}; there are {', '.join(METRICS)}")
        return names

    @property
    def percentiles(self) -> tuple[float, ...]:
        """Raises ValueError for what is no number from 0 to 100."""
        shares = tuple(_number("--metric-percentiles", text) for text in self.metric_percentiles.split(",") if text.strip())
        for share in shares:
            if not 0 <= share <= 100:
                raise ValueError(f"--metric-percentiles has {share:g}; a percentile is from 0 to 100")
        return shares

    @property
    def goodput_ms(self) -> dict[str, float]:
        """The limits by metric. Raises ValueError for what is none."""
        limits = {}
        for text in self.goodput:
            name, colon, value = text.partition(":")
            if name not in METRICS or not colon:
                raise ValueError(f"--goodput is {text!r}; it must be METRIC:MILLISECONDS with one of {', '.join(METRICS)}")
            limits[name] = _number("--goodput", value)
            if limits[name] <= 0:
                raise ValueError(f"--goodput is {text!r}; a limit is more than 0 ms")
        return limits

    @property
    def extra(self) -> dict[str, Any]:
        """Raises ValueError where it is no JSON object."""
        if self.extra_request_body is None:
            return {}
        try:
            fields = json.loads(self.extra_request_body)
        except ValueError as error:
            raise ValueError(f"--extra-request-body is not JSON: {error}") from None
        if not isinstance(fields, dict):
            raise ValueError(f"--extra-request-body is {self.extra_request_body!r}; it must be a JSON object")
        return fields

    @property
    def headers(self) -> dict[str, str]:
        """Raises ValueError for what is no header."""
        found = {} if self.api_key is None else {"Authorization": f"Bearer {self.api_key}"}
        for text in self.header:
            name, colon, value = text.partition(":")
            if not colon or not name.strip():
                raise ValueError(f"--header is {text!r}; it must be NAME: VALUE")
            found[name.strip()] = value.strip()
        return found


def _typed(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _number(what: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ValueError(f"{what} has {text!r}, which is no number")
    return value
