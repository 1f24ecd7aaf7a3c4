"""The benchmark runs, small, and writes its figures; its cuts are those that their names say."""

import json
from pathlib import Path

import pytest

from orchestrator.deployment.preflight import preflight
from tests.benchmarks import bench_memory
from tests.benchmarks.engine.engine_models import checkpoint, read_spec
from tests.support.deploying.deployment import make_config


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint("tiny", directory=tmp_path_factory.mktemp("models"))


def test_a_small_run_writes_every_ranks_ratio(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_memory, "KV_CACHE", "1MiB")
    monkeypatch.setattr(bench_memory, "checkpoint", lambda shape: tiny)
    output = tmp_path / "memory.json"
    assert bench_memory.main(["--only", "stages 3:1", "--shape", "tiny", "--output", str(output)]) == 0
    (metric,) = json.loads(output.read_text())["metrics"].values()
    assert metric["samples"] == 2
    # A process of no more than its libraries: what it takes is far from nothing, and from twice what was planned.
    assert 0.3 < metric["spread"][0] <= metric["spread"][1] < 2.0


@pytest.mark.parametrize("name", bench_memory.layouts(2))
def test_a_model_of_two_layers_can_be_cut_every_way(tiny: Path, tmp_path: Path, name: str) -> None:
    sections = bench_memory.layouts(read_spec(tiny).num_layers)[name]
    (replica,) = preflight(make_config(tmp_path, tiny, **sections)).plan.replicas
    assert sum(len(stage.layers) for stage in replica.stages) == 2
