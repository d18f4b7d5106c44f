"""The command line as it is typed: verbs, exit codes, and the flags that are promised."""

import os
import subprocess
import sys
import types

import pytest

import pointsman
from pointsman import cli
from pointsman.config import EngineConfig, ServerConfig, engine_config, flags

FLAGSHIP = """serve --model-path MiniMaxAI/MiniMax-M2.5 --reasoning-parser minimax --tool-call-parser minimax-m2
    --trust-remote-code --tp 4 --mem-fraction-static 0.9 --kv-cache-dtype fp8_e4m3 --attention-backend flashinfer
    --moe-runner-backend flashinfer_trtllm_routed --quantization fp8 --enforce-piecewise-cuda-graph"""


def test_the_flagship_command_is_understood_word_for_word():
    """Frozen: these flags and their meaning are promised."""
    command = cli.read(FLAGSHIP.split())
    assert command.name == "serve"
    config = engine_config(**command.engine)
    assert config.model.model_path == "MiniMaxAI/MiniMax-M2.5"
    assert config.model.trust_remote_code is True
    assert config.model.quantization == "fp8"
    assert config.parallel.tensor_parallel_size == 4
    assert config.cache.mem_fraction_static == 0.9
    assert config.cache.kv_cache_dtype == "fp8_e4m3"
    assert config.kernel.attention_backend == "flashinfer"
    assert config.kernel.moe_runner_backend == "flashinfer_trtllm_routed"
    assert config.kernel.enforce_piecewise_cuda_graph is True
    assert command.options == ServerConfig(reasoning_parser="minimax", tool_call_parser="minimax-m2")


def test_the_long_forms_of_sglang_are_understood():
    command = cli.read(["serve", "--tensor-parallel-size", "2", "--model", "x", "--expert-parallel-size", "2"])
    config = engine_config(**command.engine)
    assert (config.model.model_path, config.parallel.tensor_parallel_size, config.parallel.expert_parallel_size) == ("x", 2, 2)


@pytest.mark.parametrize("name", cli.VERBS)
def test_every_command_with_an_engine_takes_every_flag_of_it_and_all_have_help(name, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main([*name.split(), "--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert text.startswith(f"usage: pointsman {name}")
    if cli.VERBS[name].engine:
        for entry in flags(EngineConfig).values():
            assert entry.names[0] in text


def test_no_command_has_a_flag_of_the_engine_with_another_meaning():
    engine = flags(EngineConfig)
    for name, verb in cli.VERBS.items():
        if not verb.engine:
            continue  # `bench serve` has --model and no engine: there it is the name that a server knows it by
        own = {spelling: entry for entry in flags(cli._load(verb.options)).values() for spelling in entry.names}
        both = own.keys() & {spelling for entry in engine.values() for spelling in entry.names}
        assert both == ({"--device"} if name == "explain" else set())
        for spelling in both:  # it knows the engine's devices, and more
            assert set(own[spelling].choices) > set(engine[own[spelling].name].choices)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("srve", "pointsman: unknown command 'srve'; did you mean 'serve'?"),
        ("walk", "pointsman: unknown command 'walk'; there are serve, generate, chat, eval, bench"),
        ("eval", "pointsman: eval needs one of arithmetic, tools"),
        ("eval --seed 3", "pointsman: eval needs one of arithmetic, tools"),
        ("eval arithmetics", "pointsman: unknown command 'eval arithmetics'; did you mean 'eval arithmetic'?"),
        ("bench qqqqqqqqqqqqqqqq", "pointsman: unknown command 'bench qqqqqqqqqqqqqqqq'; there are serve, cpu, latency"),
        ("serve --moe-runer-backend cpu", "pointsman serve: unknown flag '--moe-runer-backend'; did you mean '--moe-runner-backend'?"),
        ("serve --moe-runner", "pointsman serve: unknown flag '--moe-runner'"),
        ("serve now", "pointsman serve: unexpected argument 'now'"),
        ("serve --tp 0", "pointsman serve: --tensor-parallel-size is 0; it must be from 1 to 64"),
        ("generate", "pointsman generate: there is no prompt"),
        ("generate --modle x hello", "pointsman generate: unknown flag '--modle'; did you mean '--model'?"),
        ("generate hello --temperature -1", "pointsman generate: temperature is -1.0; it must be a number from 0 to 100"),
        ("generate hello --stop=", "pointsman generate: stop '' must be a string of 1 to 1024 characters"),
        ("generate hello --raw --system x", "pointsman generate: --system needs the chat template"),
        ("generate hello --logprobs 1", "pointsman generate: --logprobs needs --json"),
    ],
)
def test_a_wrong_command_line_is_one_line_and_code_2(words, message, capsys):
    assert cli.main(words.split()) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(message)
    assert captured.err.count("\n") == 1


def test_version_and_overview(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"pointsman {pointsman.__version__}\n"
    assert cli.main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"  {name} " in text for name in cli.VERBS)
    assert cli.main([]) == 2


def with_run(monkeypatch, run):
    """Make `pointsman serve` run this function."""
    module = types.ModuleType("tests.cli.fake")
    module.run = run
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(cli.VERBS, "serve", cli.Verb("fake", "pointsman.config:ServerConfig", "tests.cli.fake:run"))


def raising(error):
    def run(engine, options):
        raise error

    return run


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (ValueError("tp is 4; this machine has 1 device"), 1, "pointsman serve: tp is 4; this machine has 1 device\n"),
        (
            FileNotFoundError(2, "No such file or directory", "x.json"),
            1,
            "pointsman serve: [Errno 2] No such file or directory: 'x.json'\n",
        ),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_what_is_refused_below_is_one_line(error, code, message, monkeypatch, capsys):
    with_run(monkeypatch, raising(error))
    assert cli.main(["serve"]) == code
    assert capsys.readouterr().err == message


def test_our_own_faults_keep_their_traceback(monkeypatch):
    with_run(monkeypatch, raising(AssertionError("ours")))
    with pytest.raises(AssertionError):
        cli.main(["serve"])


def test_the_values_reach_the_command_and_its_code_comes_back(monkeypatch, capsys):
    seen = {}

    def run(engine, options):
        seen.update(engine=engine, options=options)
        return 3

    with_run(monkeypatch, run)
    assert cli.main(["serve", "--port", "0", "--model-path", "x", "--trust-remote-code"]) == 3
    assert seen == {"engine": {"model": "x", "trust_remote_code": True}, "options": ServerConfig(port=0)}
    assert capsys.readouterr().err == "--trust-remote-code has no effect: no code of a checkpoint ever runs\n"


def test_a_wrong_flag_is_told_before_anything_slow_is_imported():
    program = "import sys; from pointsman.cli import main; main(['serve', '--prot', '1']); print(*sys.modules)"
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert not {"torch", "numpy", "rich", "fastapi", "zmq", "tokenizers", "jinja2"} & set(answer.stdout.split())


@pytest.mark.parametrize("words", ["--help", "serve --help"])
def test_a_reader_that_leaves_early_is_no_fault(words):
    read_end, write_end = os.pipe()
    os.close(read_end)
    program = "import sys; from pointsman.cli import main; sys.exit(main(sys.argv[1:]))"
    answer = subprocess.run([sys.executable, "-c", program, *words.split()], stdout=write_end, stderr=subprocess.PIPE, check=False)
    os.close(write_end)
    assert answer.stderr == b""
    assert answer.returncode in (0, cli.BROKEN_PIPE)  # argparse passes over it where its text is longer than the buffer
