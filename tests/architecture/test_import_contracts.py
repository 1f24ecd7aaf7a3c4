"""The import contracts hold, and they catch what they are there to catch."""

import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
PACKAGES = ("orchestrator", "workers", "protos", "placement", "kernels")

IGNORED = ("__init__.py", "__pycache__", "launcher", "controller")
RAY_CONTRACT = "ray only in the orchestrator's launcher and controller"

PLANTED = [
    ("placement/planning/plan.py", "import torch", "placement is pure"),
    ("placement/planning/plan.py", "import time", "placement is pure"),
    ("kernels/reference.py", "import placement.planning.plan", "kernels are tensor maths only"),
    ("workers/engine/loop.py", "import ray", "workers never import ray"),
    ("workers/engine/loop.py", "import orchestrator.cli.app", "workers never import ray or the orchestrator"),
    ("orchestrator/deployment/preflight.py", "import torch", "the orchestrator never imports torch"),
    ("orchestrator/gateway/fleet/fleet.py", "import ray", RAY_CONTRACT),
    ("orchestrator/deployment/serve.py", "import ray", RAY_CONTRACT),
]


def lint(root: Path) -> subprocess.CompletedProcess[str]:
    command = [str(Path(sys.executable).parent / "lint-imports"), "--no-cache"]
    return subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The packages and the contracts, to be broken."""
    for package in PACKAGES:
        shutil.copytree(REPOSITORY / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(REPOSITORY / "pyproject.toml", tmp_path)
    return tmp_path


@pytest.mark.parametrize(("file", "line", "contract"), PLANTED)
def test_a_planted_violation_is_caught(copy: Path, file: str, line: str, contract: str) -> None:
    source = copy / file
    source.write_text(f"{source.read_text()}\n{line}\n")
    result = lint(copy)
    assert result.returncode == 1
    assert any(contract in row and "BROKEN" in row for row in result.stdout.splitlines()), result.stdout


def test_the_contracts_hold() -> None:
    result = lint(REPOSITORY)
    assert result.returncode == 0, result.stdout


def test_every_module_but_launcher_and_controller_is_under_the_ray_contract() -> None:
    contracts = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    (contract,) = [contract for contract in contracts if contract["name"] == RAY_CONTRACT]
    there = {path.stem for path in (REPOSITORY / "orchestrator").glob("[!.]*") if path.name not in IGNORED}
    assert {f"orchestrator.{name}" for name in there} == set(contract["source_modules"])
