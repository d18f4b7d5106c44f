"""The flags of `eval` and `bench` besides those of the engine. Apart from the code they steer, so that a wrong flag is told at once."""

from __future__ import annotations

from dataclasses import dataclass, fields

from pointsman.config import flag

LOG_LEVELS = ("debug", "info", "warning", "error")


@dataclass(frozen=True, kw_only=True)
class AccuracyOptions:
    """Held-out problems, answered greedily."""

    num_questions: int = flag(500, "problems to answer", low=1, high=100_000)
    seed: int = flag(0, "which problems", low=0)
    max_tokens: int = flag(512, "most tokens of an answer, thinking included", low=1)
    save: str | None = flag(None, "write every problem and answer to this file, one JSON object a line")
    show: int = flag(0, "print this many of the answers that were not right", low=0)
    log_level: str = flag("warning", "how much to log", choices=LOG_LEVELS)


@dataclass(frozen=True, kw_only=True)
class TableOptions:
    """The same problems for every way to run a model."""

    num_questions: int = flag(200, "problems of each kind", low=1, high=100_000)
    seed: int = flag(0, "which problems", low=0)
    max_tokens: int = flag(512, "most tokens of an answer, thinking included", low=1)
    log_level: str = flag("error", "how much to log", choices=LOG_LEVELS)


@dataclass(frozen=True, kw_only=True)
class AgreementOptions:
    """Held-out problems, answered greedily and read again by Hugging Face's model."""

    num_questions: int = flag(20, "word problems, and as many requests with tools", low=1, high=10_000)
    seed: int = flag(0, "which problems", low=0)
    max_tokens: int = flag(64, "most tokens of an answer", low=1)
    log_level: str = flag("warning", "how much to log", choices=LOG_LEVELS)


@dataclass(frozen=True, kw_only=True)
class Gsm8kOptions:
    """Few-shot GSM8K, of a server where one is named, else of an engine here."""

    data_path: str = flag("", "GSM8K's test set: JSON lines with question and answer")
    num_shots: int = flag(5, "solved problems before each question: the first of the file", low=0, high=1000)
    num_questions: int = flag(200, "problems to answer", low=1, high=1_000_000)
    shots_in_set: bool = flag(False, "leave the shots, whose answers are known, among the problems to answer, as other engines do")
    parallel: int = flag(64, "requests that run at once", low=1, high=4096)
    max_tokens: int = flag(512, "most tokens of an answer", low=1)
    host: str | None = flag(None, "address of a server to ask (default: an engine here, with its flags)")
    port: int = flag(30000, "port of that server", low=1, high=65535)
    base_url: str | None = flag(None, "http(s)://host:port[/path] in place of --host and --port")
    api_key: str | None = flag(None, "sent to the server as a bearer token", secret=True)
    save: str | None = flag(None, "write every question and answer to this file, one JSON object a line")
    log_level: str = flag("warning", "how much to log", choices=LOG_LEVELS)

    def __post_init__(self) -> None:
        if not self.data_path:
            raise ValueError("--data-path is missing: the file test.jsonl of github.com/openai/grade-school-math")
        if self.base_url is not None and (self.host is not None or self.port != 30000):
            raise ValueError("--base-url stands in place of --host and --port; give one")
        if self.port != 30000 and self.host is None:
            raise ValueError(f"--port is {self.port}, but there is no --host; give --host, as 127.0.0.1")
        if self.api_key is not None and self.host is None and self.base_url is None:
            raise ValueError("--api-key is sent to a server; name it with --host or --base-url")


@dataclass(frozen=True, kw_only=True)
class CpuOptions:
    """Several engines on the same prompts, in turn."""

    contender: tuple[str, ...] = flag((), "what to run, as `llama.cpp f16`; may be given several times (default: all)")
    batch_size: tuple[int, ...] = flag((1, 8, 32), "sequences that run at once, one or several numbers", low=1, high=64)
    input_len: int = flag(64, "tokens of a prompt", low=1, high=1024)
    output_len: int = flag(128, "tokens of an answer", low=2, high=1024)
    num_iters: int = flag(5, "rounds over all contenders, each in a new process; the median counts", low=1)
    num_repeats: int = flag(3, "batches of each size in a round, besides one that warms up; the median counts", low=1)
    threads: int | None = flag(None, "threads of each engine (default: one a core)", low=1, high=1024)
    seed: int = flag(0, "which prompts", low=0)
    log_level: str = flag("warning", "how much to log", choices=LOG_LEVELS)


@dataclass(frozen=True, kw_only=True)
class LatencyOptions:
    """Random prompts of one length, answered in full batches."""

    batch_size: tuple[int, ...] = flag((1, 8, 32), "sequences that run at once, one or several numbers", low=1, high=4096)
    input_len: int = flag(64, "tokens of a prompt", low=1)
    output_len: int = flag(128, "tokens of an answer", low=2)
    num_iters: int = flag(5, "runs of each batch size, or of the start-up; the median counts", low=1)
    num_warmups: int = flag(1, "runs before those, which do not count", low=0)
    seed: int = flag(0, "which prompts", low=0)
    start_up: bool = flag(False, "measure `pointsman serve` from the command to the first token instead")
    log_level: str = flag("warning", "how much to log", choices=LOG_LEVELS)


@dataclass(frozen=True, kw_only=True)
class KernelsOptions:
    """One layer of MiniMax-M2.5 at several sizes."""

    num_tokens: tuple[int, ...] = flag((), "tokens of a step, one or several numbers (default: powers of two to 8192)", low=1, high=65536)
    tp_sizes: tuple[int, ...] = flag((), "devices that share the experts' width, 1, 2 or 4, one or several (default: all)", low=1, high=4)
    runner: tuple[str, ...] = flag(
        (), "what to measure, as deep_gemm; may be given several times (default: all that can serve, those of libraries too)"
    )
    quick: bool = flag(False, "fewer sizes, on one device")
    seed: int = flag(0, "which weights and batches", low=0)
    plot: str | None = flag(None, "draw the shares of the read bandwidth into this SVG file")
    log_level: str = flag("warning", "how much to log", choices=LOG_LEVELS)

    def __post_init__(self) -> None:
        for size in self.tp_sizes:
            if size not in (1, 2, 4):
                raise ValueError(f"--tp-sizes is {size}; it must be 1, 2 or 4: other shares of the width are no multiple of 128")


@dataclass(frozen=True, kw_only=True)
class TuneOptions:
    """Sizes of a layer's experts; the defaults are MiniMax-M2.5's on one device."""

    num_experts: int = flag(256, "experts of a layer", low=1, high=1024)
    experts_per_token: int = flag(8, "experts of a token", low=1, high=1024)
    hidden_size: int = flag(3072, "width of the activations", low=128, high=65536)
    expert_width: int = flag(1536, "width of an expert on one device: the model's by the devices that share it", low=128, high=65536)
    plain: bool = flag(False, "bfloat16 weights instead of FP8")
    num_tokens: tuple[int, ...] = flag(
        (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192), "tokens of a step, one or several numbers", low=1, high=65536
    )
    again: bool = flag(False, "measure what has been measured before, too")
    save: str | None = flag(None, "keep the tables in this file (default: where every run on this machine finds them)")
    log_level: str = flag("warning", "how much to log", choices=LOG_LEVELS)

    def __post_init__(self) -> None:
        if self.experts_per_token > self.num_experts:
            raise ValueError(f"--experts-per-token is {self.experts_per_token}; there are {self.num_experts} experts")
        for name in ("hidden_size", "expert_width"):
            if getattr(self, name) % 128:
                raise ValueError(f"--{name.replace('_', '-')} is {getattr(self, name)}; it must be a multiple of 128")


@dataclass(frozen=True, kw_only=True)
class ScalingOptions:
    """MiniMax-M2.5 served in simulated time on GPUs that were not there, from the times of parts that were measured."""

    results: str | None = flag(None, "folder of the measured parts (default: benchmarks/results of the source tree)")
    gpu: str = flag("h100", "h100 as measured, or h200: the same with the bandwidth and the memory of that", choices=("h100", "h200"))
    gpus: tuple[int, ...] = flag((2, 4, 8, 16), "GPUs in all, one or several numbers; 8 are a host", low=1, high=256)
    layers: int = flag(62, "layers of the model; fewer fit where all do not", low=1, high=62)
    dataset_name: str = flag("random", "what is asked", choices=("random", "azure", "mooncake"))
    dataset_path: str | None = flag(None, "file of azure or mooncake")
    num_prompts: int | None = flag(None, "requests (default: random: 4 for each that runs at once; of a trace: 500)", low=1, high=1_000_000)
    max_concurrency: tuple[int, ...] = flag((1, 16, 128), "random: requests that run at once, one or several numbers", low=1, high=65536)
    random_input_len: int = flag(1024, "most tokens of a random prompt", low=1, high=131072)
    random_output_len: int = flag(1024, "most tokens of its answer", low=2, high=65536)
    random_range_ratio: float = flag(0.8, "lengths are drawn evenly from this share of the most, to the most", low=0, high=1)
    trace_slowdown: tuple[float, ...] = flag((1.0,), "azure, mooncake: multiplies every moment, one or several numbers", low=0, high=1e6)
    max_running_requests: int = flag(512, "most sequences that run at once on one copy of the model", low=1, high=4096)
    chunked_prefill_size: int = flag(512, "most tokens a step of a group of GPUs that share attention", low=1, high=1 << 20)
    plot: str | None = flag(None, "draw throughput and time per token into this PNG file")
    seed: int = flag(1, "which lengths", low=0)
    log_level: str = flag("warning", "how much to log", choices=LOG_LEVELS)

    def __post_init__(self) -> None:
        if (self.dataset_path is None) != (self.dataset_name == "random"):
            needs = "needs --dataset-path" if self.dataset_path is None else "has no file; leave out --dataset-path"
            raise ValueError(f"--dataset-name {self.dataset_name} {needs}")
        if self.dataset_name == "random" and self.trace_slowdown != (1.0,):
            raise ValueError("--trace-slowdown is for --dataset-name azure or mooncake; it is random")
        if self.dataset_name != "random":
            given = {field.name for field in fields(self) if getattr(self, field.name) != field.default}
            for name in ("max_concurrency", "random_input_len", "random_output_len", "random_range_ratio", "seed"):
                if name in given:
                    typed = f"--{name.replace('_', '-')}"
                    raise ValueError(f"{typed} is for --dataset-name random; {self.dataset_name} has its own moments and lengths")
