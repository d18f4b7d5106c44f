"""The compiled step as an object file, kept on disk.

Numba's own cache would do, at a price: loading from it imports numba (a third of a second), it does not notice when a function
that the cached one calls has changed, and compiling holds up the process that serves. So the step is compiled once, by a process of
its own, into an object file that holds machine code only and calls nothing of Python; whoever needs it loads that with
llvmlite in a few milliseconds. The file's name carries a digest of all that went into it (sources, compiler, processor, the stored forms
of weights and cache), so a file that exists is the right one.

    python -m pointsman.kernels.cpu_object ATTENTION EXPERTS HEAD CACHE      (each float32, bfloat16 or e4m3)
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib.metadata
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import llvmlite.binding as llvm

from pointsman import program

FORMS = ("float32", "bfloat16", "e4m3")
SYMBOL = "pointsman_step"
SOURCES = (
    "instruction",
    "vector",
    "cpu_tile",
    "cpu_record",
    "cpu_table",
    "cpu_pack",
    "cpu_threads",
    "cpu_phases",
    "cpu_attention",
    "cpu_region",
    "cpu_object",
)
OUTSIDE = {"read", "write", "sched_yield", "memset", "memcpy"}

Kinds = tuple[str, str, str, str]
StepThread = Callable[[int, int], int]


def _processor() -> tuple[str, str, str]:
    return llvm.get_default_triple(), llvm.get_host_cpu_name(), llvm.get_host_cpu_features().flatten()


@functools.cache
def _digest() -> str:
    """Of everything that decides what the object holds, the kinds apart."""
    parts = [*_processor(), importlib.metadata.version("numba"), importlib.metadata.version("llvmlite")]
    parts += [Path(__file__).with_name(f"{name}.py").read_text(encoding="utf-8") for name in SOURCES]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _places(kinds: Kinds) -> Iterator[Path]:
    """Where the object may be: beside the sources, or in the user's cache folder."""
    assert len(kinds) == 4 and set(kinds) <= set(FORMS), kinds
    name = f"cpu_step-{'-'.join(kinds)}-{_digest()}.o"
    yield Path(__file__).parent / "__pycache__" / name
    yield Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()) / "pointsman" / name


def is_cached(kinds: Kinds) -> bool:
    """Whether `load` would find the object."""
    return any(os.access(place, os.R_OK) for place in _places(kinds))


def start_compiling(kinds: Kinds) -> subprocess.Popen[str]:
    """Start a process that compiles the object and stores it; its exit code says whether it did, its stderr why not."""
    # Numba optimizes every function once for itself and again wherever it is called; here all of it is optimized once, at the end.
    environment = program.environment({"NUMBA_OPT": "0"})
    command = program.command("pointsman.kernels.cpu_object", *kinds)
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def load(kinds: Kinds) -> StepThread:
    """The compiled step; compiles it first, which takes seconds, where it is not on disk.

    Raises:
        RuntimeError: it could not be compiled, or is gone again.
    """
    if not is_cached(kinds):
        process = start_compiling(kinds)
        _, errors = process.communicate()
        if process.returncode:
            raise RuntimeError(f"compiling the step for a CPU failed: {errors.strip()[-2000:]}")
    return _link(kinds)


def _machine() -> llvm.TargetMachine:
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    triple, name, features = _processor()
    target = llvm.Target.from_triple(triple)
    return target.create_target_machine(cpu=name, features=features, opt=3, reloc="pic", codemodel="default")


@functools.cache
def _link(kinds: Kinds) -> StepThread:
    """Load the object into this process, for good."""
    place = next((place for place in _places(kinds) if os.access(place, os.R_OK)), None)
    if place is None:
        raise RuntimeError(f"the compiled step is in none of {', '.join(str(place) for place in _places(kinds))}")
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), _machine())
    engine.add_object_file(llvm.object_file.ObjectFileRef.from_data(place.read_bytes()))
    engine.finalize_object()
    function = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_int64, ctypes.c_int64)(engine.get_function_address(SYMBOL))
    function.engine = engine  # type: ignore[attr-defined]
    return function


def compile_object(kinds: Kinds) -> bytes:
    """Machine code of the step for these kinds."""
    # Numba takes a third of a second to import; only the compiling process pays for it.
    from numba import cfunc, types  # noqa: PLC0415

    from pointsman.kernels.cpu_region import entry  # noqa: PLC0415

    compiled = cfunc(types.int64(types.int64, types.int64), error_model="numpy")(entry(kinds))
    machine = _machine()
    module = llvm.parse_assembly(compiled.inspect_llvm())
    for value in (*module.functions, *module.global_variables):
        if not value.is_declaration and value.name != compiled.native_name:
            value.linkage = "internal"
    module.get_function(compiled.native_name).name = SYMBOL
    tuning = llvm.create_pipeline_tuning_options(speed_level=3)
    tuning.loop_unrolling = tuning.loop_vectorization = tuning.slp_vectorization = False
    builder = llvm.create_pass_builder(machine, tuning)
    builder.getModulePassManager().run(module, builder)
    # The pipeline finds late that no kernel raises; what would have reported it goes now.
    rest = llvm.create_new_module_pass_manager()
    for add in (rest.add_ipsccp_pass, rest.add_simplify_cfg_pass, rest.add_global_dead_code_eliminate_pass):
        add()
    rest.run(module, builder)
    outside = {function.name for function in module.functions if function.is_declaration and not function.name.startswith("llvm.")}
    assert outside <= OUTSIDE, f"compiled code calls {outside - OUTSIDE}, which only numba or Python provide"
    return bytes(machine.emit_object(module))


def _store(content: bytes, kinds: Kinds) -> Path:
    """Write the object to the first place that takes it."""
    errors = []
    for place in _places(kinds):
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=place.parent, delete=False) as file:
                file.write(content)
            os.chmod(file.name, 0o644)
            os.replace(file.name, place)
        except OSError as error:
            errors.append(f"{place.parent}: {error.strerror}")
        else:
            return place
    raise RuntimeError(f"no folder takes the compiled step: {'; '.join(errors)}")


def main(arguments: list[str]) -> None:
    """Compile and store the object for the four kinds given."""
    if len(arguments) != 4 or not set(arguments) <= set(FORMS):
        raise ValueError(f"{' '.join(arguments)!r} must be four of {', '.join(FORMS)}: attention, experts, head, cache")
    kinds = (arguments[0], arguments[1], arguments[2], arguments[3])
    _digest()  # of the sources as they are before they are compiled
    print(_store(compile_object(kinds), kinds))


if __name__ == "__main__":
    main(sys.argv[1:])
