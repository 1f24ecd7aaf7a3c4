"""The benchmark runs, small, and writes its figures."""

import json
from pathlib import Path

import pytest

from tests.benchmarks import bench_prefix


def test_a_small_run_writes_the_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_prefix, "PREFIXES", (64, 128, 256))
    monkeypatch.setattr(bench_prefix, "COMPARED", 128)
    output = tmp_path / "prefix.json"
    bench_prefix.main(
        ["--layers", "1", "--sequences", "4", "--threads", "1", "--repeats", "2", "--output", str(output)]
    )
    content = json.loads(output.read_text())
    assert content["name"] == "prefix"
    assert content["metrics"].keys() == {"shared_gain", "growth_cost"}
    assert content["metrics"]["shared_gain"]["value"] > 0
    assert list(tmp_path.glob("*.png"))
