"""The benchmark of offloaded attention: its figures, what it decodes, and a small run of every item."""

import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from placement.model.specs import DType, ModelSpec
from placement.serving.offload.wire_bytes import whole_head_bytes
from placement.serving.offload.work import DecodeWork
from tests.benchmarks.engine.engine_models import checkpoint, read_spec
from tests.benchmarks.offload import offload_figures as figures
from tests.benchmarks.offload.bench_offload import HEADLINE, ITEMS, parse, sizes_of
from tests.benchmarks.offload.offload_arms import Arm, Ask, Sample
from tests.benchmarks.offload.offload_driver import BLOCK_SIZE, batch_of, load_request
from tests.benchmarks.offload.offload_figures import Speeds
from tests.benchmarks.offload.offload_sizes import DELAY_S, Sizes, quick
from tests.netlab.requirements import missing

REPOSITORY = Path(__file__).resolve().parents[3]
SPEEDS = Speeds(steps=((1, 0.01), (2, 0.01), (4, 0.01), (32, 0.02)), attended_bytes_per_s=1e9)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelSpec:
    return read_spec(checkpoint("tiny", directory=tmp_path_factory.mktemp("models")))


def sample(
    step_s: float, *, batch: int = 1, context: int = 16, payload: int = 0, frames: int = 0, rows: int = 0
) -> Sample:
    ask = Ask(arm="a", batch=batch, context=context, steps=2)
    return Sample(ask=ask, step_s=step_s, payload_bytes=payload, frame_bytes=frames, rows=rows)


def expected_gain(model: ModelSpec, *, offloaded: Speeds = SPEEDS, context: int = 2048, delay_s: float = 5e-5) -> float:
    return figures.predicted_gain(
        model, Sizes(), alone=SPEEDS, offloaded=offloaded, overhead_s=0.0, context=context, delay_s=delay_s
    )  # fmt: skip


def test_a_gain_is_that_of_tokens_a_second_in_the_same_repeats() -> None:
    below = [sample(1.0, batch=4), sample(2.0, batch=4), sample(1.0, batch=4)]
    above = [sample(2.0, batch=32), sample(2.0, batch=32), sample(4.0, batch=32)]
    found = figures.gain(above, below)
    assert found.value == pytest.approx(4.0) and found.spread == pytest.approx((2.0, 8.0))


def test_a_gain_is_of_as_many_samples_on_both_sides() -> None:
    with pytest.raises(ValueError, match="zip"):
        figures.gain([sample(1.0)], [])


def test_bytes_of_the_wire_are_those_of_messages_and_their_headers(model: ModelSpec) -> None:
    formula = whole_head_bytes(model.layers[0].attention, DType.BFLOAT16).total
    found = figures.wire_share(model, [sample(1.0, payload=10 * formula, frames=formula, rows=10)])
    assert found.value == pytest.approx(1.1)


def test_speeds_are_medians_of_steps_and_what_a_context_adds_to_them(model: ModelSpec) -> None:
    work = DecodeWork.of(model, DType.BFLOAT16)
    short = [sample(value, batch=batch) for batch in (2, 1) for value in (0.1, 0.3, 0.2)]
    found = figures.speeds(work, short, [sample(0.7, batch=2, context=128)])
    assert found.steps == ((1, 0.2), (2, 0.2))
    added = 2 * (work.attended_bytes(128) - work.attended_bytes(16))
    assert found.attended_bytes_per_s == pytest.approx(added / 0.5)


def test_what_the_link_does_not_explain_is_overhead_and_never_less_than_none(model: ModelSpec) -> None:
    work = DecodeWork.of(model, DType.BFLOAT16)
    explained_s = 0.01 + 2 * DELAY_S * work.num_layers
    found = figures.overhead_s(work, SPEEDS, [sample(explained_s + 0.001 * work.num_layers)])
    assert found == pytest.approx(0.001)
    assert figures.overhead_s(work, SPEEDS, [sample(0.001)]) == 0.0


def test_a_slower_link_is_expected_to_bring_less(model: ModelSpec) -> None:
    gains = [expected_gain(model, delay_s=delay_s) for delay_s in (5e-5, 1e-3, 5e-3)]
    assert gains == sorted(gains, reverse=True) and gains[0] > gains[-1] > 0


def test_a_slower_attention_worker_is_expected_to_bring_less(model: ModelSpec) -> None:
    slow = dataclasses.replace(SPEEDS, attended_bytes_per_s=1e6)
    assert expected_gain(model, offloaded=slow) < expected_gain(model)


def test_the_largest_error_is_a_share_of_what_was_measured() -> None:
    measured = {(64, 1e-3): 2.0, (128, 1e-3): 4.0}
    found = figures.largest_error(measured, {(64, 1e-3): 1.0, (128, 1e-3): 4.4})
    assert found.value == pytest.approx(0.5) and found.spread == pytest.approx((0.1, 0.5))


def test_there_is_a_curve_for_each_delay_and_a_row_for_each_point() -> None:
    measured = {(128, 1e-3): 2.0, (64, 1e-3): 1.0, (64, 5e-5): 3.0}
    predicted = {point: 1.1 * value for point, value in measured.items()}
    curves = figures.sweep_curves(measured, predicted)
    assert [curve.title for curve in curves] == ["link of 0.05 ms", "link of 1 ms"]
    assert curves[1].lines["measured"] == [(64.0, 1.0), (128.0, 2.0)]
    table = figures.sweep_table(measured, predicted)
    assert table.rows[0] == ["64", "0.05", "3.00", "3.30", "+10%"] and len(table.rows) == 3


def test_a_sample_is_read_as_it_was_told() -> None:
    found = sample(0.5, batch=4, context=32, payload=3, frames=2, rows=1)
    assert Sample.read(json.loads(json.dumps(dataclasses.asdict(found)))) == found
    assert found.tokens_per_s == 8.0


def test_as_many_sequences_fit_as_have_their_tokens_and_at_least_one() -> None:
    sizes = Sizes(context=2048, capped=4, held=32, most_sequences=64)
    assert [sizes.fitting(sizes.capped, context) for context in (256, 2048, 8192, 1 << 20)] == [32, 4, 1, 1]
    assert sizes.fitting(sizes.held, 256) == 64


def test_sequences_of_a_batch_have_blocks_of_their_own() -> None:
    found = batch_of(Ask(arm="a", batch=3, context=40, steps=1), first_id=7).sequences
    assert [it.sequence_id for it in found] == [7, 8, 9]
    slots = [set(range(first, stop)) for it in found for first, stop in it.runs]
    assert [len(it) for it in slots] == [41] * 3 and not slots[0] & slots[1] and not slots[1] & slots[2]
    assert all(min(it) % BLOCK_SIZE == 0 for it in slots)


def test_an_attention_worker_holds_all_blocks_and_heads_or_none() -> None:
    alone = load_request(Arm(name="alone", shape="tiny", threads=2, num_blocks=9))
    assert alone.num_blocks == 9 and not alone.HasField("residency")
    arm = Arm(name="away", shape="tiny", threads=1, num_blocks=9, host="h", port=7, q_first=True, staggered=False)
    said = load_request(arm).residency
    assert [(it.host, it.port) for it in said.workers] == [("h", 7)]
    assert (said.regions[0].blocks.start, said.regions[0].blocks.stop) == (0, 9)
    assert said.q_first and not said.staggered and said.replica == "away"


def test_options_change_what_is_measured() -> None:
    found = sizes_of(parse(["--contexts", "64", "128", "--delays-ms", "0.5", "--repeats", "4", "--capped", "2"]))
    assert (found.contexts, found.delays_s, found.repeats, found.capped) == ((64, 128), (5e-4,), 4, 2)
    assert found.held == Sizes().held and found.shape == "smollm-135m"
    assert sizes_of(parse(["--quick"])) == quick()


def test_an_item_that_there_is_not_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(["--items", "speed"])
    assert "'speed' is not one of gain, overlap" in capsys.readouterr().err


@pytest.mark.integration
@pytest.mark.timeout(600)
@pytest.mark.skipif((reason := missing()) is not None, reason=reason or "")
def test_a_small_run_measures_every_item(tmp_path: Path) -> None:
    script = [sys.executable, str(REPOSITORY / "tests/benchmarks/offload/bench_offload.py"), "--quick"]
    done = subprocess.run(
        script, cwd=tmp_path, timeout=550, check=False, capture_output=True, text=True,
        env={"PYTHONPATH": str(REPOSITORY), "PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "HOME": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "build/bench/offload.json").read_text())
    assert not report["left_out"] and set(HEADLINE) <= report["metrics"].keys()
    assert all(math.isfinite(metric["value"]) and metric["value"] >= 0 for metric in report["metrics"].values())
    assert report["metrics"]["wire_bytes_over_formula"]["value"] > 1
    assert (tmp_path / "build/bench/offload.png").exists()
    assert all(f"measuring: {item}" in done.stdout for item in ITEMS)
    assert done.stdout.rstrip().splitlines()[-1] == report["headline"]
