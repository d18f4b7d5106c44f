"""The flags of the load client: those that are promised, and what does not go together."""

import math
from pathlib import Path

import pytest

from pointsman import cli
from pointsman.bench.serving import backends, datasets, metrics, options
from pointsman.bench.serving.options import ServeOptions

PROMISED = """bench serve --backend openai --host 0.0.0.0 --port 30000 --model MiniMaxAI/MiniMax-M2.5 --num-prompts 1280
    --trust-remote-code --ignore-eos --max-concurrency 128 --random-input-len 1024 --random-output-len 1024
    --random-range-ratio 0.8 --use-chat-template --dataset-name random"""


RATES = "--request-rate inf --sweep-max-concurrency 1 8 --goodput ttft:200 tpot:5.5"


def test_the_benchmark_command_is_understood_word_for_word():
    """Frozen: these flags and their meaning are promised."""
    command = cli.read(PROMISED.split())
    assert (command.name, command.engine) == ("bench serve", {})
    assert command.options == ServeOptions(
        backend="openai",
        host="0.0.0.0",
        port=30000,
        model="MiniMaxAI/MiniMax-M2.5",
        num_prompts=1280,
        trust_remote_code=True,
        ignore_eos=True,
        max_concurrency=128,
        random_input_len=1024,
        random_output_len=1024,
        random_range_ratio=0.8,
        use_chat_template=True,
        dataset_name="random",
    )


def test_what_is_not_said_is_as_in_the_field():
    """All prompts at once, of one length, greedy; one seed."""
    made = ServeOptions()
    assert (made.backend, made.dataset_name, made.num_prompts, made.request_rate, made.max_concurrency) == (
        "openai",
        "random",
        1000,
        None,
        None,
    )
    assert (made.random_input_len, made.random_output_len, made.random_range_ratio, made.temperature) == (1024, 1024, 1.0, 0.0)
    assert (made.metrics, made.percentiles) == (("ttft", "tpot", "itl"), (99.0,))


def test_an_endless_rate_and_lists_are_read():
    made = cli.read(f"bench serve {RATES}".split()).options
    assert math.isinf(made.request_rate)
    assert (made.sweep_max_concurrency, made.goodput_ms) == ((1, 8), {"ttft": 200.0, "tpot": 5.5})
    made = cli.read(["bench", "serve", "--header", "X-A: b: c", "--api-key", "k", "--extra-request-body", '{"top_p": 0.5}']).options
    assert (made.headers, made.extra) == ({"Authorization": "Bearer k", "X-A": "b: c"}, {"top_p": 0.5})
    assert "k'" not in repr(made)


def test_a_run_says_what_it_was_loaded_with_and_no_more():
    words = "--dataset-name azure --dataset-path a.csv --trace-slowdown 2 --goodput ttft:200 --ignore-eos"
    told = cli.read(f"bench serve {words}".split()).options.described
    assert (told["dataset_path"], told["trace_slowdown"], told["trace_length_scale"]) == ("a.csv", 2.0, 1.0)
    assert (told["goodput_ms"], told["ignore_eos"], told["seed"]) == ({"ttft": 200.0}, True, 1)
    assert not [name for name in told if name.startswith(("random_", "gsp_", "custom_"))]
    ramp = "--ramp-up-strategy linear --ramp-up-start-rps 1 --ramp-up-end-rps 2 --burstiness 3"
    told = cli.read(f"bench serve {ramp}".split()).options.described
    assert (told["ramp_up_strategy"], told["ramp_up_start_rps"], told["ramp_up_end_rps"], told["burstiness"]) == ("linear", 1.0, 2.0, 3.0)
    assert told["random_input_len"] == 1024 and "trace_slowdown" not in told


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--random-input-len 5 --dataset-name shared-prefix", "--random-input-len is for --dataset-name random; it is shared-prefix"),
        ("--trace-slowdown 2", "--trace-slowdown is for --dataset-name azure or mooncake; it is random"),
        ("--dataset-name custom", "--dataset-name custom needs --dataset-path"),
        ("--dataset-path x", "--dataset-name random has no file; leave out --dataset-path"),
        ("--dataset-name shared-prefix --num-prompts 3", "--num-prompts is 3, but the groups of shared-prefix have 1024 prompts"),
        ("--backend openai-chat --tokenize-prompt", "--tokenize-prompt sends ids"),
        ("--ramp-up-start-rps 3", "a ramp needs --ramp-up-strategy"),
        ("--request-rate 1 --sweep-request-rate 2", "--request-rate and --sweep-request-rate both say when"),
        ("--max-concurrency 1 --sweep-max-concurrency 2", "--sweep-max-concurrency stands in place of --max-concurrency"),
        ("--burstiness 2", "--burstiness needs --request-rate"),
        ("--dataset-name azure --dataset-path x --request-rate 1", "--request-rate: a trace has its own times"),
        ("--percentile-metrics ttft,speed", "--percentile-metrics has 'speed'; there are ttft, tpot, itl, e2el"),
        ("--metric-percentiles 99,x", "--metric-percentiles has 'x', which is no number"),
        ("--metric-percentiles 101", "--metric-percentiles has 101; a percentile is from 0 to 100"),
        ("--goodput speed:1", "--goodput is 'speed:1'; it must be METRIC:MILLISECONDS"),
        ("--goodput ttft:nan", "--goodput has 'nan', which is no number"),
        ("--goodput ttft:-5", "--goodput is 'ttft:-5'; a limit is more than 0 ms"),
        ("--base-url http://a:1 --port 5", "--base-url stands in place of --host and --port; give one"),
        ("--compare x --num-prompts 5 --seed 2", "--compare reads files and sends nothing; leave out --num-prompts and --seed"),
        ("--extra-request-body [1]", "--extra-request-body is '[1]'; it must be a JSON object"),
        ("--extra-request-body {", "--extra-request-body is not JSON"),
        ("--header x", "--header is 'x'; it must be NAME: VALUE"),
        ("--plot x.svg", "--plot needs several points"),
        ("--save-detailed", "--save-detailed needs --save-result or --output-file"),
        ("--save-result --output-file x", "--save-result names its file by itself"),
        ("--tp 2", "unknown flag '--tp'"),
        ("--backend vllm", "--backend is 'vllm'; it must be one of openai, openai-chat, generate"),
    ],
)
def test_what_does_not_go_together_is_refused(words, message, capsys):
    assert cli.main(["bench", "serve", *words.split()]) == 2
    assert capsys.readouterr().err.startswith(f"pointsman bench serve: {message}")


def test_the_words_of_flags_are_those_of_the_code():
    assert set(options.BACKENDS) == set(backends.BACKENDS)
    assert set(options.METRICS) == set(metrics.NAMES)
    source = Path(datasets.__file__).read_text()
    for name in options.DATASETS:
        assert f'"{name}": self._' in source
