"""The engine benchmark runs at toy size, through a real deployment; what it measures is not judged here."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from kernels.cpu.machine.target import runnable_targets

REPOSITORY = Path(__file__).resolve().parents[3]


def run(cwd: Path, *options: str) -> "subprocess.CompletedProcess[str]":
    script = [sys.executable, str(REPOSITORY / "tests/benchmarks/engine/bench_engine.py"), *options]
    environment = {"PYTHONPATH": str(REPOSITORY), "PATH": "/usr/bin:/bin", "HOME": str(cwd)}
    return subprocess.run(script, cwd=cwd, env=environment, capture_output=True, text=True, timeout=200, check=False)


@pytest.mark.integration
def test_bench_engine_measures_us_another_checkout_and_the_bound_and_leaves_out_missing_peers(tmp_path: Path) -> None:
    cases = ("prefill_128x1", "decode_b1", "decode_b8")
    sizes = ["--shape=tiny", f"--cases={','.join(cases)}", "--repeats=2", "--steps=4", "--context=16", "--threads=1"]
    engines = ["--engines=heterodyne,linears,llamacpp", f"--before={REPOSITORY}"]
    target = runnable_targets()[-1].name
    done = run(tmp_path, *sizes, *engines, "--set=serving.kv_cache=16MiB", f"--target={target}")
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "build/bench/engine.json").read_text())
    expected = {f"{what}_{case}" for case in cases for what in ("heterodyne", "before", "before_ratio")}
    expected |= {f"linears_{case}" for case in cases[1:]}
    assert set(report["metrics"]) == expected | {"roofline_share_b1", "roofline_share_b8"}
    assert all({"value", "unit", "samples"} <= metric.keys() for metric in report["metrics"].values())
    assert all(metric["value"] > 0 and metric["samples"] == 2 for metric in report["metrics"].values())
    assert "make bench-peers" in report["left_out"]["llamacpp"]
    assert report["target"] == target
    assert done.stdout.rstrip().splitlines()[-1] == report["headline"]
    assert (tmp_path / "build/bench/engine.png").exists()


def test_bench_engine_names_the_cases_there_are_when_asked_for_another(tmp_path: Path) -> None:
    done = run(tmp_path, "--cases=decode_b3")
    assert done.returncode == 1
    assert "'decode_b3' is not one of prefill_128x1" in done.stderr


def test_bench_engine_names_the_targets_there_are_when_asked_for_another(tmp_path: Path) -> None:
    done = run(tmp_path, "--target=sse9")
    assert done.returncode == 1
    assert "'sse9' is not a target. Use one of " in done.stderr
