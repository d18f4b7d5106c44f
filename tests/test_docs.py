"""What the documents promise is there: commands, flags, names, paths, routes and examples."""

import ast
import pkgutil
import re
import shlex
from pathlib import Path

import pytest

from benchmarks import figures
from pointsman import cli, tiny
from pointsman.config import EngineConfig, flags

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "pointsman"
DOCUMENTS = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
FENCE = re.compile(r"^```(\w+)\n(.*?)^```", re.DOTALL | re.MULTILINE)
SPAN = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
DOTTED = re.compile(r"\bpointsman(?:\.\w+)+")
EXTENSIONS = (".py", ".md", ".ini", ".toml", ".json", ".jinja")

documents = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: document.name)


def blocks(document, language):
    return [text for kind, text in FENCE.findall(document.read_text()) if kind == language]


def spans(document):
    return SPAN.findall(FENCE.sub("", document.read_text()))


def commands(document):
    """Every `pointsman ...` in shell blocks and in the text, as words; what a pipe or a chain adds is left out."""
    lines = [line for block in blocks(document, "sh") for line in block.replace("\\\n", " ").splitlines()]
    for line in [*lines, *spans(document)]:
        for part in re.split(r"&&|\|(?!\|)|;", line):
            words = part.split("#")[0].strip()
            if words.startswith("pointsman "):
                yield shlex.split(words)[1:]


@documents
def test_every_command_is_understood(document):
    for words in commands(document):
        if words[0] == "COMMAND":
            continue
        try:
            cli.read(words)
        except SystemExit as leaving:
            assert "--help" in words and leaving.code == 0


@documents
def test_every_flag_exists(document):
    known = {"--help", "--version"}
    for verb in cli.VERBS.values():
        for config in (EngineConfig, cli._load(verb.options)):
            known |= {spelling for entry in flags(config).values() for spelling in entry.names}
    named = {word.split("=")[0] for span in spans(document) for word in span.split() if word.startswith("--")}
    assert named <= known


@documents
def test_every_name_exists(document):
    for name in set(DOTTED.findall(document.read_text())):
        if not name.endswith(tuple(extension.lstrip(".") for extension in EXTENSIONS)):
            assert pkgutil.resolve_name(name) is not None


@documents
def test_every_path_exists(document):
    named = {span for span in spans(document) if re.fullmatch(r"[\w./-]+", span)}
    paths = {span for span in named if not span.startswith(("/", "-")) and ("/" in span or span.endswith(EXTENSIONS))}
    paths |= {line.split()[0] for block in blocks(document, "text") for line in block.splitlines() if "/" in line.split()[0]}
    paths -= {"config.json", "pointsman/", "kernels/__pycache__"}
    tree = {line.split()[0] for block in blocks(document, "text") if "pointsman/\n" in block for line in block.splitlines()}
    for path in paths | tree:
        assert any((folder / path).exists() for folder in (ROOT, PACKAGE, PACKAGE / "models")), path


@documents
def test_every_link_leads_somewhere(document):
    for target in re.findall(r"\]\(([^)#]+)\)", document.read_text()):
        assert target.startswith("http") or (document.parent / target).exists(), target


@documents
def test_every_route_exists(document):
    source = "".join(path.read_text() for path in (PACKAGE / "server").glob("*.py"))
    for span in spans(document):
        if re.fullmatch(r"/[a-z]\w*(/\w+)*", span):
            assert f'"{span}"' in source, span


@documents
def test_every_python_example_compiles(document):
    for block in blocks(document, "python"):
        ast.parse(block)


def test_the_tree_of_the_readme_is_the_package():
    block = next(block for block in blocks(ROOT / "README.md", "text") if block.startswith("pointsman/\n"))
    listed = {line.split()[0] for line in block.splitlines() if line.startswith("  ")}
    folders = {f"{path.name}/" for path in PACKAGE.iterdir() if path.is_dir() and (path / "__init__.py").exists()}
    modules = {path.name for path in PACKAGE.glob("*.py") if not path.name.startswith("__")}
    assert listed == folders | modules


def test_the_layers_of_the_architecture_are_those_of_the_linter():
    """Those that exist: the contract names some that are to come."""
    contract = re.search(r"^layers =\n((?:    .*\n)+)", (ROOT / "importlinter.ini").read_text(), re.MULTILINE)[1]
    present = {path.stem for path in PACKAGE.iterdir()}
    layers = [[name for name in re.findall(r"\w+", line) if name in present] for line in contract.splitlines()]
    block = next(block for block in blocks(ROOT / "docs" / "architecture.md", "text") if block.startswith("cli\n"))
    assert [re.findall(r"\w+", line) for line in block.splitlines()] == [layer for layer in layers if layer]


@pytest.mark.skipif(not figures.COMMANDS.keys() <= figures.kept().keys(), reason="not everything has been measured")
def test_the_figures_are_those_that_were_measured():
    for path, text in figures.documents(figures.kept()).items():
        assert path.read_text() == text


@pytest.mark.skipif(not list(tiny.path().glob("*.safetensors")), reason="the bundled checkpoint is not there")
@pytest.mark.parametrize("document", ["README.md", "docs/routing.md"])
def test_the_python_examples_run(document, capsys):
    for block in blocks(ROOT / document, "python"):
        if "from openai" not in block:
            exec(compile(block, document, "exec"), {})
    if document == "README.md":
        out = capsys.readouterr().out
        assert "42" in out
        assert "180" in out
