"""The parallel benchmark: its figures, the steps it lays out, and a small run of every item over emulated hosts."""

import json
import math
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import psutil
import pytest

from tests.benchmarks.parallel.bench_parallel import HEADLINE, ITEMS, PEER_KEYS
from tests.benchmarks.parallel.hosts.parallel_wire import Run
from tests.benchmarks.parallel.parallel_arms import Sizes, prefill, take_turns
from tests.benchmarks.parallel.parallel_compare import ratio_of_best, tokens_of
from tests.benchmarks.parallel.parallel_figures import (
    delay_name,
    fastest,
    hidden_share,
    lines_over_delay,
    loss,
    ratio,
    share_splits,
    worst,
)
from tests.benchmarks.parallel.parallel_ours import best_of, ways, workloads
from tests.benchmarks.parallel.parallel_shares import median_of
from tests.benchmarks.parallel.parallel_steps import Workload, batches, most_ahead, num_slots, time_steps
from tests.netlab.requirements import missing
from workers.step.types import Batch, StepResult

REPOSITORY = Path(__file__).resolve().parents[3]
OURS = [item for item in ITEMS if item not in ("llamacpp", "vllm")]
SIZES = Sizes(repeats=1, delays_s=[5e-5, 1e-3, 5e-3])


def test_ratios_are_of_the_same_repeats() -> None:
    metric = ratio([4.0, 6.0, 10.0], [2.0, 2.0, 2.0])
    assert (metric.value, metric.spread, metric.samples) == (3.0, (2.0, 5.0), 3)


def test_hidden_is_the_share_of_what_sums_take() -> None:
    metric = hidden_share([10.0, 10.0], [7.0, 8.0], [6.0, 5.0])
    assert metric is not None
    assert metric.spread == (0.4, 0.75)
    assert hidden_share([10.0], [7.0], [10.5]) is None


def test_the_loss_is_against_the_fastest_and_nothing_where_that_is_picked() -> None:
    samples = {"a": [1.0, 2.0, 3.0], "b": [3.0, 2.5, 1.5]}
    assert fastest(samples) == "a"
    assert loss(samples, "a").value == 0.0
    lost = loss(samples, "b")
    assert lost.value == 0.25
    assert lost.spread == (-0.5, 2.0)


def test_the_worst_is_that_of_the_greatest_median() -> None:
    ratios = {16: ratio([1.0], [1.0]), 32: ratio([3.0], [2.0]), 64: ratio([1.0], [2.0])}
    assert worst(ratios) == (32, ratios[32])


def test_shares_follow_speeds_whichever_host_is_the_slower() -> None:
    splits = share_splits((10.0, 4.0))
    assert splits["even"] == (0.5, 0.5)
    assert splits["as speeds"] == pytest.approx((10 / 14, 4 / 14))
    assert splits["slower has 3/4 of that"] == pytest.approx((11 / 14, 3 / 14))
    assert share_splits((4.0, 10.0))["slower has 7/8 of that"] == pytest.approx((3.5 / 14, 10.5 / 14))


def test_a_hosts_speed_is_the_median_of_the_rounds_after_the_first() -> None:
    assert median_of([(9.0, 9.0), (1.0, 4.0), (2.0, 5.0), (3.0, 9.0)], 1) == 5.0


def test_lines_go_over_the_delays_in_their_order() -> None:
    samples = {("a", 1e-3): [0.002], ("a", 5e-5): [0.001, 0.003, 0.002]}
    assert lines_over_delay(samples) == {"a": [(0.05, 2.0), (1.0, 2.0)]}
    assert [delay_name(delay_s) for delay_s in SIZES.delays_s] == ["0.05ms", "1ms", "5ms"]
    assert SIZES.key_delay_s == 1e-3


def test_arms_take_turns_after_a_round_that_is_not_counted() -> None:
    order: list[str] = []

    def arm(name: str) -> Callable[[], float]:
        def run() -> float:
            order.append(name)
            return float(len(order))

        return run

    taken = take_turns({name: arm(name) for name in "ab"}, 2)
    assert "".join(order) == "abbaab"
    assert taken == {"a": [4.0, 5.0], "b": [3.0, 6.0]}


def test_decodes_have_slots_of_their_own_in_whole_blocks() -> None:
    work = Workload(phase="decode", num_tokens=30, num_sequences=3, num_steps=4, num_parts=2)
    steps = list(batches(work, 16))
    assert num_slots(work, 16) == 3 * 48
    assert [len(step.sequences) for step in steps] == [2, 1] * 5
    slots = [set(range(*run)) for step in steps[-2:] for one in step.sequences for run in one.runs]
    assert all(not one & other for one, other in pairwise(slots)) and max(map(max, slots)) < num_slots(work, 16)
    assert all(one.runs[0][0] % 16 == 0 for step in steps for one in step.sequences)
    assert [step.sequences[0].awaits_token for step in steps[:4]] == [False, False, True, True]
    assert steps[-1].sequences[0].start == 34


def test_the_pieces_of_a_chunk_are_all_of_it_and_the_last_is_sampled() -> None:
    work = prefill(100, start=28, parts=3)
    chunks = [step.sequences[0] for step in batches(work, 16)]
    assert [chunk.start for chunk in chunks] == [28, 61, 94]
    assert sum(chunk.num_tokens for chunk in chunks) == 100
    assert all(chunk.runs == ((0, chunk.start + chunk.num_tokens),) for chunk in chunks)
    assert [chunk.samples for chunk in chunks] == [False, False, True]
    assert num_slots(work, 16) == 128


def test_no_more_steps_are_dispatched_than_may_be() -> None:
    class Counting:
        """As a runner, noting how many steps are prepared and not done."""

        on_way, most, done = 0, 0, 0

        def prepare(self, batch: Batch) -> Callable[[], StepResult]:
            self.on_way += 1
            self.most = max(self.most, self.on_way)
            return self.execute

        def execute(self) -> StepResult:
            self.on_way -= 1
            self.done += 1
            return StepResult(tokens=())

    runner = Counting()
    work = SIZES.decode(8, parts=2)
    with ThreadPoolExecutor(1) as executor:
        seconds = time_steps(runner, executor, batches(work, 16), ahead=most_ahead(work, 2), num_warm=work.num_warm)
    assert seconds > 0
    assert runner.done == 2 * (SIZES.steps + 1)
    assert runner.most <= 2


def test_a_pipeline_has_as_many_batches_or_pieces_on_their_way_as_suit_it() -> None:
    assert most_ahead(SIZES.decode(1), 1) == 2
    assert most_ahead(SIZES.decode(1), 2) == 1
    assert most_ahead(prefill(512, parts=4), 2) == 3


def test_every_plan_is_compared_for_every_workload() -> None:
    found = {work.name: ways(work) for work in workloads(SIZES)}
    assert found.keys() == {"decode_b1", "decode_b8", "prefill_128", "prefill_512"}
    assert all({"tensor", "pipeline", "sequence"} <= its.keys() for its in found.values())
    assert found["decode_b8"]["pipeline"][1].num_parts == 2
    assert found["decode_b1"]["pipeline"][1].num_parts == 1
    assert "pipeline/2" in found["prefill_128"] and "pipeline/3" not in found["prefill_128"]
    best = best_of({"tensor": [2.0, 2.0], "pipeline": [1.0, 1.5]})
    assert (best.plan, best.seconds) == ("pipeline", [1.0, 1.5])


def test_a_run_is_read_as_it_was_told() -> None:
    told = {"key": "a", "workload": {"phase": "prefill", "num_tokens": 3}, "exchange": "ring"}
    assert Run.read(told) == Run(key="a", workload=prefill(3), exchange="ring")


@pytest.mark.integration
@pytest.mark.skipif((reason := missing()) is not None, reason=reason or "")
def test_ranks_end_with_a_driver_that_is_killed() -> None:
    code = (
        "import time\n"
        "from tests.benchmarks.parallel.hosts.parallel_hosts import cluster\n"
        "with cluster() as net:\n"
        "    ports = [process.ask('listen', {})['port'] for process in net._processes]\n"
        "    print(*net.pids, flush=True)\n"
        "    time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True) as driver:
        assert driver.stdout is not None
        ranks = [psutil.Process(int(pid)) for pid in driver.stdout.readline().split()]
        driver.kill()
    assert len(ranks) == 2
    assert not psutil.wait_procs(ranks, timeout=10)[1]


def test_the_best_of_each_side_are_compared() -> None:
    mine = {"tensor": [10.0, 12.0, 11.0], "pipeline": [8.0, 30.0, 9.0]}
    theirs = {"one": [5.0, 5.0, 5.5], "two": [4.0, 6.0, 4.0]}
    found = ratio_of_best(mine, theirs)
    assert (found.value, found.spread, found.samples) == (11.0 / 5.0, (2.0, 2.4), 3)


def test_a_decodes_tokens_are_one_of_each_sequence() -> None:
    assert tokens_of(Workload(phase="decode", num_tokens=64, num_sequences=8, num_steps=16)) == 8
    assert tokens_of(prefill(512)) == 512


@pytest.mark.integration
@pytest.mark.skipif((reason := missing(cpu_shares=True)) is not None, reason=reason or "")
def test_a_small_run_measures_every_item(tmp_path: Path) -> None:
    script = [sys.executable, str(REPOSITORY / "tests/benchmarks/parallel/bench_parallel.py")]
    done = subprocess.run(
        [*script, "--model=tiny", "--repeats=1", "--delays=1", "--only", *OURS], cwd=tmp_path, timeout=200, check=False,
        env={"PYTHONPATH": str(REPOSITORY), "PATH": "/usr/sbin:/usr/bin:/sbin:/bin"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "build/bench/parallel.json").read_text())
    metrics = report["metrics"]
    keys = {key for key in HEADLINE if key not in PEER_KEYS} | {"ours_decode_b1_1ms", "decode_gloo_1ms"}
    may_be_missing = {"overlap_hidden_1ms"}  # where sums took no time that could be seen
    assert keys - may_be_missing <= metrics.keys()
    assert all(math.isfinite(metric["value"]) for metric in metrics.values())
    may_be_none = {"overlap_hidden_1ms", "chooser_worst_loss"}
    assert all(metric["value"] > 0 for key, metric in metrics.items() if key not in may_be_none)
    assert set(PEER_KEYS) <= report["left_out"].keys()
    assert (tmp_path / "build/bench/parallel.png").exists()
    assert all(f"measuring: {item}" in done.stdout for item in OURS)
    assert done.stdout.rstrip().splitlines()[-1] == report["headline"]
