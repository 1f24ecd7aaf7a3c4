"""The import contracts hold, and they catch what they are there to catch."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
PACKAGES = ("orchestrator", "workers", "protos", "placement", "kernels")

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
    ("orchestrator/deployment/serve.py", "import orchestrator.cli.app", "floors of orchestrator"),
    ("orchestrator/gateway/model.py", "import orchestrator.gateway.service", "floors of orchestrator.gateway"),
    ("orchestrator/gateway/http/answering/chat.py", "import orchestrator.gateway.http.exchange", "gateway.http"),
    ("placement/model/specs.py", "import placement.planning.plan", "floors of placement"),
    ("kernels/cuda/gpus.py", "import kernels.cpu.variant", "floors of kernels"),
    ("workers/step/runner.py", "import workers.engine.loop", "floors of workers"),
    ("protos/codec/parts.py", "import workers.step.types", "protos are the wire"),
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
