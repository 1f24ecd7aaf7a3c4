"""The gateway benchmark runs at toy size, with every process that it has at full size."""

import json
import subprocess
import sys
from pathlib import Path

from tests.benchmarks.gateway.gateway_board import FIRST_ID, NUM_STAMPS, Board

REPOSITORY = Path(__file__).resolve().parents[3]


def test_a_tokens_id_leads_to_the_end_of_its_step(tmp_path: Path) -> None:
    board, other = Board.create(tmp_path / "board"), Board(tmp_path / "board")
    assert [board.stamp(now_ns) for now_ns in (10, 20)] == [FIRST_ID, FIRST_ID + 1]
    assert (other.ended_ns(FIRST_ID), other.ended_ns(FIRST_ID + 1), other.steps) == (10, 20, 2)
    for now_ns in range(NUM_STAMPS):
        board.stamp(now_ns)
    assert other.ended_ns(FIRST_ID) == NUM_STAMPS - 2
    other.step_ns = 5
    assert board.step_ns == 5


def test_bench_gateway_measures_latency_tokens_and_requests(tmp_path: Path) -> None:
    script = [sys.executable, str(REPOSITORY / "tests/benchmarks/gateway/bench_gateway.py")]
    sizes = ["--streams", "1", "4", "--seconds=0.5", "--repeats=1", "--step-ms=2", "--token-steps-ms", "1"]
    environment = {"PYTHONPATH": str(REPOSITORY), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*script, *sizes, "--clients=2"], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "build/bench/gateway.json").read_text())
    keys = ("added_ms_p50", "added_ms_p99", "tokens_per_s", "tokens_per_message", "requests_per_s")
    assert {f"{key}_{n}" for key in keys for n in (1, 4)} <= report["metrics"].keys()
    assert report["metrics"]["tokens_per_s_max"]["value"] > 0
    assert all({"value", "unit", "samples"} <= metric.keys() for metric in report["metrics"].values())
    assert all(metric["value"] > 0 for metric in report["metrics"].values())
    assert done.stdout.rstrip().splitlines()[-1] == report["headline"]
