"""Every benchmark reports in one form."""

import json
import os
from pathlib import Path

import pytest

from kernels.cpu.machine.target import chosen
from tests.benchmarks.report import Curve, Metric, Report, Rows, median, publish, shown


def test_median_keeps_the_range_of_its_samples() -> None:
    assert median([3.0, 1.0, 2.0], "x") == Metric(value=2.0, unit="x", samples=3, spread=(1.0, 3.0))
    assert median([4.0], "ms") == Metric(value=4.0, unit="ms", samples=1)


def test_figures_are_shown_with_unit_and_range() -> None:
    assert shown(median([1.0, 1.5, 1.25], "x")) == "1.25x (1.00-1.50)"
    assert shown(Metric(value=3.0, unit="ms"), 0) == "3 ms"


def test_report_is_json_with_machine_versions_and_metrics_and_ends_with_the_headline(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = Report(
        name="toy",
        headline="toy: twice as fast",
        metrics={"ratio": median([2.0, 2.5, 1.5], "x")},
        tables=[Rows(title="toys", columns=["toy", "speed"], rows=[["car", "1.0"]])],
        curves=[Curve(title="toys", x_label="n", y_label="per s", lines={"car": [(1, 2.0), (8, 9.0)]})],
        versions={"peer": "1.2"},
        left_out={"train": "not installed"},
    )
    output = tmp_path / "bench" / "toy.json"
    publish(report, load_at_start=os.getloadavg(), output=output)
    content = json.loads(output.read_text())
    assert {"name", "machine", "versions", "metrics", "left_out"} <= content.keys()
    assert content["target"] == chosen().name
    assert {"cpu", "cores", "memory_bytes", "load_average_start", "load_average_end"} <= content["machine"].keys()
    assert {"python", "torch", "heterodyne", "peer"} <= content["versions"].keys()
    assert content["metrics"]["ratio"] == {"value": 2.0, "unit": "x", "samples": 3, "spread": [1.5, 2.5]}
    assert (tmp_path / "bench" / "toy.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "car" in printed
    assert "train: not installed" in printed
    assert printed.rstrip().splitlines()[-1] == "toy: twice as fast"


def test_a_report_names_the_kind_of_cpu_that_code_was_compiled_for(tmp_path: Path) -> None:
    report = Report(name="toy", headline="", metrics={}, tables=[], target="avx2")
    publish(report, load_at_start=os.getloadavg(), output=tmp_path / "toy.json")
    assert json.loads((tmp_path / "toy.json").read_text())["target"] == "avx2"


def test_a_figure_that_is_no_number_is_refused(tmp_path: Path) -> None:
    report = Report(name="toy", headline="", metrics={"ratio": Metric(value=float("nan"), unit="x")}, tables=[])
    with pytest.raises(ValueError, match="not JSON compliant"):
        publish(report, load_at_start=os.getloadavg(), output=tmp_path / "toy.json")
