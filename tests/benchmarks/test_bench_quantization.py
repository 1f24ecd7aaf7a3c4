"""The benchmark reports, and the demo model rounded is nearly the demo model."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    output = tmp_path_factory.mktemp("bench") / "quantization.json"
    script = [
        sys.executable,
        "tests/benchmarks/bench_quantization.py",
        "--repeats=1",
        "--copies=2",
        "--output",
        str(output),
    ]
    environment = {"PYTHONPATH": ".", "OMP_NUM_THREADS": "1"}
    subprocess.run(script, cwd=REPOSITORY, env=environment, check=True, capture_output=True, timeout=300)
    content: dict[str, Any] = json.loads(output.read_text())
    return content


def test_bench_quantization_reports_quality_bytes_and_speed(report: dict[str, Any]) -> None:
    assert {"name", "machine", "versions", "metrics"} <= report.keys()
    keys = {
        f"{key}_{name}" for key in ("perplexity", "divergence", "weight_bytes") for name in ("bf16", "int8", "int4")
    }
    assert keys | {"int4_gain_m1", "int8_gain_m256", "bf16_gb_per_s_m4"} <= report["metrics"].keys()
    assert all({"value", "unit", "samples"} <= metric.keys() for metric in report["metrics"].values())


@pytest.mark.parametrize(("name", "tolerance", "divergence"), [("int8", 0.01, 0.002), ("int4", 0.03, 0.12)])
def test_the_rounded_demo_model_stays_near_itself(
    report: dict[str, Any], name: str, tolerance: float, divergence: float
) -> None:
    values = {key: metric["value"] for key, metric in report["metrics"].items()}
    assert values[f"perplexity_{name}"] == pytest.approx(values["perplexity_bf16"], rel=tolerance)
    assert values["divergence_bf16"] < values[f"divergence_{name}"] < divergence


def test_rounded_weights_take_a_half_and_a_third_of_the_bytes(report: dict[str, Any]) -> None:
    num_bytes = {name: report["metrics"][f"weight_bytes_{name}"]["value"] for name in ("bf16", "int8", "int4")}
    assert num_bytes["int8"] < 0.7 * num_bytes["bf16"]  # the demo's embedding, which stays, is a fifth of it
    assert num_bytes["int4"] < 0.5 * num_bytes["bf16"]
