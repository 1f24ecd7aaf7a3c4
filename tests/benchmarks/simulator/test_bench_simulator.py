"""The benchmark runs, small, writes its figures, and agrees with what it is compared with."""

import json
from pathlib import Path

import pytest

from tests.benchmarks.simulator import bench_simulator, splitwise_designs, vllm_runs
from tests.benchmarks.simulator.bench_simulator import DATA


def test_a_small_run_writes_the_figures(tmp_path: Path) -> None:
    output = tmp_path / "simulator.json"
    options = ["--requests", "60", "--designs", "BA,HA", "--rate-step", "200", "--output", str(output)]
    bench_simulator.main(options)
    content = json.loads(output.read_text())
    assert content["name"] == "simulator"
    assert content["metrics"].keys() >= {
        "events_per_s",
        "vllm_ttft_mean_error",
        "vllm_tpot_mean_error",
        "vllm_latency_p99_error",
        "splitwise_quantile_error",
        "splitwise_aa_ratio",
        "splitwise_ha_ratio",
    }
    assert content["metrics"]["events_per_s"]["value"] > 0


def test_a_measured_run_is_predicted_by_what_was_fitted_to_the_other() -> None:
    run = vllm_runs.read_run(DATA / "vllm" / "rtxpro6000_llama31_8b")
    result = vllm_runs.simulate(run, 1.35e-3)  # as fitted to rtxpro6000x2_qwen3_32b
    assert len(result.served) == 300 and result.extrapolated_share == 0.0
    assert max(abs(error) for error in vllm_runs.errors(run, result).values()) < 0.03


def test_a_split_design_computes_each_prompt_alone_and_gives_a_token_a_step() -> None:
    machines = splitwise_designs.read_machines(DATA / "splitwise" / "perf_model.csv.gz")
    trace = splitwise_designs.read_trace(DATA / "splitwise" / "conversation_70.csv.gz")[:300]
    served, _ = splitwise_designs.serve(splitwise_designs.ISO_POWER["AA"], machines, trace)
    found = splitwise_designs.figures(served, machines[splitwise_designs.A100])
    assert len(served) == 300
    assert found["ttft_p99"] == pytest.approx(1.0, abs=1e-3)
    assert found["tbt_p50"] == pytest.approx(0.962, abs=0.005)


def test_the_capacity_is_the_last_rate_at_which_all_limits_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    rates: list[float] = []

    def serve(design: object, machines: object, trace: splitwise_designs.Trace) -> tuple[float, None]:
        rates.append(len(trace) / trace[-1][0])
        return rates[-1], None

    monkeypatch.setattr(splitwise_designs, "serve", serve)
    monkeypatch.setattr(splitwise_designs, "figures", lambda served, idle: served)
    monkeypatch.setattr(splitwise_designs, "meets_all", lambda rate: rate <= 47.6)
    design, machines = splitwise_designs.ISO_POWER["BA"], {splitwise_designs.A100: None}
    trace = [(float(number), 1, 1) for number in range(1, 11)]
    assert splitwise_designs.capacity(design, machines, trace, low=20.0, step=5.0) == 45.0  # type: ignore[arg-type]
    assert splitwise_designs.capacity(design, machines, trace, low=50.0, step=5.0) == 0.0  # type: ignore[arg-type]
    assert rates[:3] == pytest.approx([20.0, 25.0, 35.0])
