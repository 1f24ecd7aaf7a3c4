"""The benchmark of split serving: its figures, what it sends, and a small run of every item."""

import dataclasses
import json
import math
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from orchestrator.cli.replay.outcome import OK, Outcome
from orchestrator.cli.replay.slo import IdlePoint
from orchestrator.cli.replay.trace import read_trace
from tests.benchmarks.disaggregation import split_exposed, split_gaps, split_goodput, split_routing
from tests.benchmarks.disaggregation.bench_disaggregation import HEADLINE, ITEMS, parse, sizes_of
from tests.benchmarks.disaggregation.split_driver import Arm, Sample, Seat, Setup, request_of
from tests.benchmarks.disaggregation.split_goodput import Turn
from tests.benchmarks.disaggregation.split_sizes import Sizes, quick
from tests.benchmarks.engine.engine_models import checkpoint
from tests.netlab.requirements import missing

REPOSITORY = Path(__file__).resolve().parents[3]
IDLE = [IdlePoint(prompt_tokens=100, ttft_s=1.0, tbt_s=0.1)]


def sample(way: str, num_tokens: int, *, budget: str = "512", exposed_s: float = 0.0) -> Sample:
    arm = Arm(way=way, budget=budget, num_tokens=num_tokens)
    return Sample(
        arm=arm, num_bytes=1 << 20, queue_s=0.0, prefill_s=2.0, exposed_s=exposed_s, first_token_s=2 + exposed_s
    )


def outcome(*times_s: float, code: str = OK) -> Outcome:
    ended_s = times_s[-1] if times_s else 0.0
    return Outcome(
        index=0, due_s=0.0, sent_s=0.0, ended_s=ended_s, code=code, token_times_s=times_s, prompt_tokens=100
    )  # fmt: skip


def test_every_length_is_sent_both_ways_and_those_of_the_headline_in_every_way() -> None:
    found = split_exposed.arms(Sizes(shape="tiny", repeats=1))
    assert len(set(found)) == len(found)
    assert {arm.num_tokens for arm in found if arm.way == "in one piece"} == {16, 32, 64, 128, 256, 512, 1024, 2048}
    assert {(arm.budget, arm.num_tokens) for arm in found if arm.way == "int8 by layer"} == {
        (budget, num_tokens) for budget in ("512", "auto") for num_tokens in (512, 2048)
    }


def test_exposed_is_a_share_of_the_computation_and_ways_are_compared_by_first_tokens() -> None:
    sizes = Sizes(shape="tiny", repeats=1, lengths=(512,), headline_lengths=(512,))
    samples = {
        ("by layer", "512", 512): [sample("by layer", 512, exposed_s=0.1)],
        ("in one piece", "512", 512): [sample("in one piece", 512, exposed_s=1.15)],
        ("by layer", "auto", 512): [sample("by layer", 512, budget="auto", exposed_s=0.2)],
    }
    metrics = split_exposed.findings(samples, sizes, 0.1).metrics
    assert metrics["exposed_share_512"].value == pytest.approx(0.05)
    assert metrics["exposed_share_512_auto"].value == pytest.approx(0.1)
    assert metrics["one_piece_over_by_layer_512"].value == pytest.approx(1.5)


def test_the_line_rate_is_that_of_the_link() -> None:
    assert split_exposed.line_rate_s(125_000_000) == pytest.approx(1.0002)


def test_a_setup_and_a_sample_are_read_as_they_were_told() -> None:
    seat = Seat(address="a:1", host="a", ranks_port=2, epoch=41)
    arm = Arm(way="by layer", budget="512", num_tokens=16)
    setup = Setup(model="m", way="w", seats={"512": seat}, arms=[arm], repeats=1, most_tokens=32)
    plain = {"model": "m", "way": "w", "repeats": 1, "most_tokens": 32}
    told = plain | {"seats": {"512": vars_of(seat)}, "arms": [vars_of(arm)]}
    assert Setup.read(json.loads(json.dumps(told))) == setup
    found = sample("by layer", 16)
    assert Sample.read(vars_of(found) | {"arm": vars_of(found.arm)}) == found


def vars_of(record: Any) -> dict[str, object]:
    return {field.name: getattr(record, field.name) for field in dataclasses.fields(record)}


def test_workers_load_the_budget_and_the_format_that_their_names_say(tmp_path: Path) -> None:
    model = checkpoint("tiny", directory=tmp_path)
    seat = Seat(address="a:1", host="a", ranks_port=2, epoch=41)
    setup = Setup(model=str(model), way="w", seats={}, arms=[], repeats=1, most_tokens=100)
    requests = {name: request_of(name, seat, setup) for name in ("512", "auto", "native", "int8")}
    assert requests["512"].token_budget == 512 and not requests["512"].HasField("step_time_s")
    assert requests["auto"].step_time_s == 0.5
    assert requests["int8"].kv_format != requests["native"].kv_format
    assert requests["512"].members[0].port == 2 and requests["512"].num_blocks == 14


def test_gaps_are_those_of_tokens_within_the_window_in_their_order_of_size() -> None:
    found = split_gaps.gaps_in([outcome(0.0, 1.0, 4.0, 5.0), outcome(3.5, 4.5, 9.0)], 2.0, 6.0)
    assert found == [1.0, 1.0, 3.0]


def test_gaps_are_compared_with_those_of_the_split_deployment() -> None:
    gaps = {"split": [[0.1, 0.1]], "unchunked": [[0.1, 0.5]], "chunked": [[0.2, 0.2]], "small_chunks": [[0.2, 0.2]]}
    metrics = split_gaps.findings(
        gaps, {"split": [4.0], "unchunked": [2.0], "chunked": [], "small_chunks": []}, 1.0
    ).metrics
    assert metrics["gap_max_vs_unchunked"].value == pytest.approx(5.0)
    assert metrics["gap_p99_vs_chunked"].value == pytest.approx(2.0)
    assert metrics["long_prompt_first_token_over_unchunked"].value == 2.0
    assert "long_prompt_first_token_over_chunked" not in metrics


def test_a_prompt_is_one_step_where_it_is_not_to_be_chunked() -> None:
    sizes = Sizes(shape="tiny", repeats=1)
    unchunked = {arm.name: arm for arm in split_gaps.arms(sizes)}["unchunked"]
    assert unchunked.serving["token_budget"] >= sizes.long_prompt + sizes.num_streams


def test_all_deployments_of_an_item_have_as_many_threads() -> None:
    for arms in (split_gaps.arms(quick()), split_goodput.ARMS, split_routing.ARMS):
        assert {sum(arm.workers.values()) for arm in arms} == {2}


def test_a_longer_trace_is_drawn_from_the_excerpt_and_the_same_each_time() -> None:
    excerpt = read_trace(split_goodput.EXCERPT)
    found = split_goodput.drawn(excerpt, 200, seed=1)
    assert found == split_goodput.drawn(excerpt, 200, seed=1) and len(found) == 200
    lengths = {(it.prompt_tokens, it.answer_tokens) for it in excerpt}
    assert {(it.prompt_tokens, it.answer_tokens) for it in found} <= lengths
    assert all(before.at_s <= after.at_s for before, after in pairwise(found))


def test_a_request_keeps_the_limits_of_a_column_where_none_of_its_slowdowns_is_above_them() -> None:
    kept = outcome(1.5, 1.6, 1.7)
    assert split_goodput.is_kept(kept, IDLE, 90)
    assert not split_goodput.is_kept(outcome(3.5, 3.6, 3.7), IDLE, 90)
    assert split_goodput.is_kept(outcome(1.4, 1.5, 1.65), IDLE, 90)
    assert not split_goodput.is_kept(outcome(1.0, 1.2, 1.4), IDLE, 90)  # its tokens are twice as slow
    assert split_goodput.is_kept(outcome(1.0, 1.2, 1.4), IDLE, 99)
    assert not split_goodput.is_kept(outcome(code="UNAVAILABLE"), IDLE, 99)


def test_goodput_is_judged_by_the_kept_requests_until_the_last_has_ended() -> None:
    turn = split_goodput.judged([outcome(1.0, 1.1), outcome(3.9, 4.0)], IDLE)
    assert turn.per_s == {50: 0.25, 90: 0.25, 99: 0.5} and turn.share == {50: 0.5, 90: 0.5, 99: 1.0}


def test_the_best_rate_of_each_repeat_counts_and_nothing_is_divided_by_none() -> None:
    sizes = Sizes(shape="tiny", repeats=2, rates=(1.0, 2.0))
    turns = [
        Turn(per_s=dict.fromkeys((50, 90, 99), value), share=dict.fromkeys((50, 90, 99), 0.5), num_limits=9)
        for value in (1.0, 2.0, 0.0)
    ]
    found = {
        ("split", 1.0): [turns[0], turns[0]], ("split", 2.0): [turns[1], turns[0]],
        ("mixed", 1.0): [turns[0], turns[0]], ("mixed", 2.0): [turns[2], turns[2]],
    }  # fmt: skip
    made = split_goodput.findings(
        {"equal": found, "unequal": found | {("mixed", 1.0): [turns[2], turns[2]]}}, sizes, {}
    )
    assert made.metrics["goodput_split_over_mixed_equal"].spread == (1.0, 2.0)
    assert "goodput_split_over_mixed_unequal" in made.left_out


def test_prompts_that_are_routed_are_the_wanted_load_of_both_replicas() -> None:
    sizes = Sizes(shape="tiny", repeats=1, load=0.5, routed_share=0.25, num_routed=2000)
    rate = split_routing.rate_of(sizes, alone_s=0.1)
    assert rate == pytest.approx(6.25)
    found = split_routing.arrivals(sizes, rate, seed=0)
    assert found[-1].due_s == pytest.approx(2000 / rate, rel=0.1)
    assert found == split_routing.arrivals(sizes, rate, seed=0)


def test_the_gain_of_routing_by_time_is_that_of_the_99th_percentile() -> None:
    metrics = split_routing.findings({"by time": [[1.0, 2.0]], "by tokens": [[1.0, 4.0]]}, 1.0).metrics
    assert metrics["routing_by_time_gain"].value == pytest.approx(3.97 / 1.99)
    assert metrics["routing_by_time_gain_p50"].value == pytest.approx(2.5 / 1.5)


def test_options_change_what_is_measured() -> None:
    found = sizes_of(parse(["--rates", "1", "2", "--requests", "7", "--repeats", "4"]))
    assert (found.rates, found.num_requests, found.repeats, found.shape) == ((1.0, 2.0), 7, 4, "smollm-135m")


def test_an_item_that_there_is_not_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(["--items", "speed"])
    assert "'speed' is not one of exposed, gaps, goodput, routing" in capsys.readouterr().err


@pytest.mark.integration
@pytest.mark.timeout(600)
@pytest.mark.skipif((reason := missing(cpu_shares=True)) is not None, reason=reason or "")
def test_a_small_run_measures_every_item(tmp_path: Path) -> None:
    script = [sys.executable, str(REPOSITORY / "tests/benchmarks/disaggregation/bench_disaggregation.py"), "--quick"]
    done = subprocess.run(
        script, cwd=tmp_path, timeout=550, check=False, capture_output=True, text=True,
        env={"PYTHONPATH": str(REPOSITORY), "PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "HOME": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "build/bench/disaggregation.json").read_text())
    lengths = quick().headline_lengths
    keys = {key for key in HEADLINE if not key.startswith("exposed_")} | {f"exposed_share_{n}" for n in lengths}
    assert keys <= report["metrics"].keys() | report["left_out"].keys()  # the tiny model may keep no limit at all
    assert all(key.startswith("goodput_") for key in report["left_out"])
    assert all(math.isfinite(metric["value"]) and metric["value"] >= 0 for metric in report["metrics"].values())
    assert (tmp_path / "build/bench/disaggregation.png").exists()
    assert all(f"measuring: {item}" in done.stdout for item in ITEMS)
    assert done.stdout.rstrip().splitlines()[-1] == report["headline"]
