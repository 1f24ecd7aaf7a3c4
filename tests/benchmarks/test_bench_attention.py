"""The benchmark runs and reports in the form that all of them share; what it measures is not judged here."""

import json
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]


def test_bench_attention_reports_every_arm(tmp_path: Path) -> None:
    output = tmp_path / "attention.json"
    script = [
        sys.executable,
        "tests/benchmarks/bench_attention.py",
        "--repeats=2",
        "--warm-up=0",
        "--output",
        str(output),
    ]
    subprocess.run(script, cwd=REPOSITORY, env={"PYTHONPATH": "."}, check=True, capture_output=True, timeout=200)
    report = json.loads(output.read_text())
    assert {"name", "machine", "versions", "metrics"} <= report.keys()
    assert len(report["metrics"]) == 24 * 3 + 12 * 2 + 12 * 2 + 1
    assert all({"value", "unit", "samples"} <= metric.keys() for metric in report["metrics"].values())
