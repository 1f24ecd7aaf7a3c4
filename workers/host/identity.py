"""Says what this process is: which code it runs, and for which kind of processor it computes."""

import hashlib
from functools import cache
from pathlib import Path

import torch

from kernels.cpu.machine import target
from placement.errors import InvalidConfig

_ROOT = Path(__file__).resolve().parents[2]
# What a rank runs. Generated code and tests are left out, and so is the orchestrator, which no worker imports.
_PACKAGES = ("kernels", "placement", "protos/codec", "workers")
_DIGEST_DIGITS = 12


@cache
def code_digest() -> str:
    """Returns a digest of the Python files that a rank runs."""
    digest = hashlib.sha256()
    for path in sorted(path for package in _PACKAGES for path in (_ROOT / package).rglob("*.py")):
        digest.update(f"{path.relative_to(_ROOT).as_posix()}\0".encode())
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:_DIGEST_DIGITS]


def cpu_target() -> str:
    """Returns the name of the CPU target that code is generated for.

    Raises:
        InvalidConfig: the environment names a target that there is not, or that this CPU can't execute.
    """
    try:
        return target.chosen().name
    except target.BadTarget as error:
        names = ", ".join(runnable.name for runnable in target.runnable_targets())
        problem = str(error).partition(". ")[0].removeprefix(f"{target.VARIABLE}: ")
        raise InvalidConfig(
            field=f"environment variable {target.VARIABLE}",
            problem=problem,
            fix=f"Set it to one of {names} on this machine, or unset it.",
        ) from error


def target_of(device: torch.device) -> str:
    """Returns what code is generated for on a device: the CPU target, or ``cuda`` and the name of the GPU.

    Raises:
        InvalidConfig: see :func:`cpu_target`.
    """
    return f"cuda {torch.cuda.get_device_name(device)}" if device.type == "cuda" else cpu_target()
