"""What the libraries' functions were called with, version by version: read from their wheels' source, never imported.

`python -m tests.moe.libraries.signatures WHEEL...` adds what these wheels have to `signatures.json` beside this file. Get the wheels by
`pip download --no-deps flashinfer-python==0.6.8` and the like. The file keeps, for each distribution and version, the parameters of each
function or method (name, kind, and default as source or null), and the members of each enumeration.
"""

from __future__ import annotations

import ast
import inspect
import json
import re
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_suffix(".json")
FUNCTIONS = {
    "flashinfer-python": {
        "trtllm_fp8_block_scale_moe": r"flashinfer/fused_moe/core\.py",
        "trtllm_fp8_block_scale_routed_moe": r"flashinfer/fused_moe/core\.py",
        "trtllm_fp8_per_tensor_scale_moe": r"flashinfer/fused_moe/core\.py",
        "cutlass_fused_moe": r"flashinfer/fused_moe/core\.py",
        "autotune": r"flashinfer/autotuner(/autotuner)?\.py",
        "BatchPrefillWithPagedKVCacheWrapper.__init__": r"flashinfer/prefill\.py",
        "BatchPrefillWithPagedKVCacheWrapper.reset_workspace_buffer": r"flashinfer/prefill\.py",
        "BatchPrefillWithPagedKVCacheWrapper.plan": r"flashinfer/prefill\.py",
        "BatchPrefillWithPagedKVCacheWrapper.run": r"flashinfer/prefill\.py",
    },
    "sgl-deep-gemm": {
        "m_grouped_fp8_fp4_gemm_nt_contiguous": r"deep_gemm/__init__\.py",
        "m_grouped_fp8_fp4_gemm_nt_masked": r"deep_gemm/__init__\.py",
    },
}
ALIASES = {"sgl-deep-gemm": r"deep_gemm/__init__\.py"}
ENUMERATIONS = ("RoutingMethodType", "WeightLayout", "Fp8QuantizationType", "ActivationType")
KINDS = {kind.name: kind for kind in inspect._ParameterKind}

Parameters = list[tuple[str, str, str | None]]


def read(wheel: Path) -> tuple[str, str, dict[str, Any]]:
    """Distribution, version, and what is known of it, of a wheel."""
    name, version = wheel.name.split("-")[:2]
    distribution = name.replace("_", "-")
    functions: dict[str, Parameters] = {}
    enumerations: dict[str, dict[str, int]] = {}
    aliases: dict[str, str] = {}
    with zipfile.ZipFile(wheel) as archive:
        for path in archive.namelist():
            wanted = [name for name, pattern in FUNCTIONS[distribution].items() if re.fullmatch(pattern, path)]
            if not wanted and not path.endswith("tllm_enums.py"):
                continue
            tree = ast.parse(archive.read(path))
            for node in top(tree.body):
                if isinstance(node, ast.FunctionDef) and node.name in wanted:
                    functions[node.name] = parameters(node.args)
                elif isinstance(node, ast.ClassDef) and node.name in ENUMERATIONS:
                    enumerations[node.name] = members(node)
                elif isinstance(node, ast.ClassDef):
                    # the last of several is the one that runs; those before it are overloads for type checkers
                    methods = [(f"{node.name}.{line.name}", line) for line in node.body if isinstance(line, ast.FunctionDef)]
                    functions |= {name: parameters(line.args) for name, line in methods if name in wanted}
                elif isinstance(node, ast.Assign) and isinstance(node.value, ast.Name) and node.value.id in wanted:
                    aliases |= {target.id: node.value.id for target in node.targets if isinstance(target, ast.Name)}
    assert functions.keys() == FUNCTIONS[distribution].keys(), functions.keys()
    return distribution, version, {"functions": functions, "enumerations": enumerations, "aliases": aliases}


def top(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """What a module defines, inside a `try` too; functions within functions may have the same names."""
    for node in body:
        yield from top(node.body) if isinstance(node, ast.Try) else (node,)


def parameters(args: ast.arguments) -> Parameters:
    plain = [*((arg, "POSITIONAL_ONLY") for arg in args.posonlyargs), *((arg, "POSITIONAL_OR_KEYWORD") for arg in args.args)]
    defaults = [None] * (len(plain) - len(args.defaults)) + [ast.unparse(value) for value in args.defaults]
    found: Parameters = [(arg.arg, kind, default) for (arg, kind), default in zip(plain, defaults, strict=True)]
    if args.vararg is not None:
        found.append((args.vararg.arg, "VAR_POSITIONAL", None))
    for arg, value in zip(args.kwonlyargs, args.kw_defaults, strict=True):
        found.append((arg.arg, "KEYWORD_ONLY", None if value is None else ast.unparse(value)))
    assert args.kwarg is None
    return found


def members(node: ast.ClassDef) -> dict[str, int]:
    """Name and number of each; some are written as a tuple of one."""
    found = {}
    for line in node.body:
        if isinstance(line, ast.Assign) and isinstance(line.targets[0], ast.Name):
            value = ast.literal_eval(line.value)
            found[line.targets[0].id] = value[0] if isinstance(value, tuple) else value
    return found


def known() -> dict[str, dict[str, dict[str, Any]]]:
    """Distribution to version to what is known of it."""
    return json.loads(FILE.read_text()) if FILE.exists() else {}


def signature(entry: list[list[Any]]) -> inspect.Signature:
    """A signature with these parameters; a default is its source."""
    empty = inspect.Parameter.empty
    return inspect.Signature(
        [inspect.Parameter(name, KINDS[kind], default=empty if default is None else default) for name, kind, default in entry]
    )


def main(wheels: list[str]) -> None:
    found = known()
    for wheel in wheels:
        distribution, version, entry = read(Path(wheel))
        found.setdefault(distribution, {})[version] = entry
    lines = json.dumps({name: dict(sorted(versions.items())) for name, versions in sorted(found.items())}, indent=1)
    FILE.write_text(re.sub(r"\[\s+([^\[\]{}]*?)\s+\]", lambda part: "[" + re.sub(r"\s*\n\s*", " ", part[1]) + "]", lines) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
