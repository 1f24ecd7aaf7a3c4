"""What the benchmark of offloaded attention makes of its samples. Pure."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from placement.model.specs import DType, ModelSpec
from placement.planning.residency import Partition
from placement.serving.offload.choice import AttentionWorker, typical_shares
from placement.serving.offload.gate import ModelDevices, Offload, offloaded_step_s, predict_alone
from placement.serving.offload.wire_bytes import whole_head_bytes
from placement.serving.offload.work import DecodeWork
from tests.benchmarks.offload.offload_arms import Sample
from tests.benchmarks.offload.offload_sizes import DELAY_S, RATE_BITS_PER_S, Sizes
from tests.benchmarks.report import Curve, Metric, Rows, median, shown

BLOCK_SIZE = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Speeds:
    """What is measured beforehand, and what predictions follow from.

    Attributes:
        steps: of decodes that attend to next to nothing, by the number of sequences.
        attended_bytes_per_s: bytes of keys and values that attention reads in a second.
    """

    steps: tuple[tuple[float, float], ...]
    attended_bytes_per_s: float


def speeds(work: DecodeWork, short: Sequence[Sample], long: Sequence[Sample]) -> Speeds:
    """Returns the speeds of a process, by its samples of short contexts and of long ones, of the same batches."""
    by_batch: dict[int, list[float]] = {}
    for sample in short:
        by_batch.setdefault(sample.ask.batch, []).append(sample.step_s)
    steps = {batch: statistics.median(found) for batch, found in sorted(by_batch.items())}
    rates = [
        sample.ask.batch
        * (work.attended_bytes(sample.ask.context) - work.attended_bytes(short[0].ask.context))
        / max(1e-6, sample.step_s - steps[sample.ask.batch])
        for sample in long
    ]
    return Speeds(steps=tuple(steps.items()), attended_bytes_per_s=statistics.median(rates))


def overhead_s(work: DecodeWork, model: Speeds, lone: Sequence[Sample]) -> float:
    """Returns the seconds of a layer that are neither computation nor the link's, by steps of a sequence alone."""
    step_s = statistics.median(sample.step_s for sample in lone)
    at_least_s = model.steps[0][1] + work.num_layers * 2 * DELAY_S
    return max(0.0, step_s - at_least_s) / work.num_layers


def predicted_gain(
    model: ModelSpec,
    sizes: Sizes,
    *,
    alone: Speeds,
    offloaded: Speeds,
    overhead_s: float,
    context: int,
    delay_s: float,
    staggered: bool = True,
) -> float:
    """Returns the tokens a second with an attention worker over those without, as the gate expects them."""
    work = DecodeWork.of(model, DType.BFLOAT16)
    devices = ModelDevices(
        memory_bytes=1 << 60, weight_bytes_per_s=1e9, flops_per_s=1e9,
        kv_bytes_per_s=alone.attended_bytes_per_s, steps=alone.steps,
    )  # fmt: skip
    without = predict_alone(work, devices, context=context, most_sequences=sizes.fitting(sizes.capped, context))
    worker = AttentionWorker(
        kv_bytes_per_s=offloaded.attended_bytes_per_s, link_bytes_per_s=RATE_BITS_PER_S / 8, kv_cache_bytes=1 << 60
    )
    shares, wire_bytes = typical_shares(
        Partition.KV_HEADS, [worker], model.layers[0].attention, DType.BFLOAT16, context, block_size=BLOCK_SIZE
    )
    offload = Offload(
        model=ModelDevices(
            memory_bytes=1 << 60, weight_bytes_per_s=1e9, flops_per_s=1e9, kv_bytes_per_s=1e9,
            links_bytes_per_s=(RATE_BITS_PER_S / 8,), steps=offloaded.steps,
        ),
        workers=(worker,),
        shares=shares,
        wire_bytes=wire_bytes,
        round_trip_s=2 * delay_s + overhead_s,
    )  # fmt: skip
    batch = sizes.fitting(sizes.held, context)
    step_s = offloaded_step_s(work, offload, context, batch, 2 if staggered and batch > 1 else 1)
    return batch / step_s / without.tokens_per_s


def wire_share(model: ModelSpec, samples: Sequence[Sample]) -> Metric:
    """Returns all bytes on the wire over those of the formula, (2 + 2 / G) e d a token and layer."""
    formula = whole_head_bytes(model.layers[0].attention, DType.BFLOAT16).total
    ratios = [(it.payload_bytes + it.frame_bytes) / (it.rows * formula) for it in samples]
    return median(ratios, "x")


def gain(above: Sequence[Sample], below: Sequence[Sample]) -> Metric:
    """Returns the tokens a second of some samples over those of others, of the same repeats."""
    return median([a.tokens_per_s / b.tokens_per_s for a, b in zip(above, below, strict=True)], "x")


Point = tuple[int, float]
"""Tokens of a context, and seconds of the link's delay."""


def sweep_curves(measured: Mapping[Point, float], predicted: Mapping[Point, float]) -> list[Curve]:
    """Returns a picture for each delay: the measured and the expected gain by context."""
    curves = []
    for delay_s in sorted({delay_s for _, delay_s in measured}):
        lines = {
            name: [(float(context), found[context, delay_s]) for context, at_s in sorted(measured) if at_s == delay_s]
            for name, found in (("measured", measured), ("predicted", predicted))
        }
        title = f"link of {1e3 * delay_s:g} ms"
        curves.append(Curve(title=title, x_label="tokens of context", y_label="tokens/s over without", lines=lines))
    return curves


def sweep_table(measured: Mapping[Point, float], predicted: Mapping[Point, float]) -> Rows:
    """Returns the same as a table."""
    rows = [
        [str(context), f"{1e3 * delay_s:g}", f"{value:.2f}", f"{predicted[context, delay_s]:.2f}",
         f"{predicted[context, delay_s] / value - 1:+.0%}"]
        for (context, delay_s), value in sorted(measured.items())
    ]  # fmt: skip
    columns = ["context", "delay ms", "measured gain", "predicted gain", "off by"]
    return Rows(title="What an attention worker brings, by context and delay of the link", columns=columns, rows=rows)


def largest_error(measured: Mapping[Point, float], predicted: Mapping[Point, float]) -> Metric:
    """Returns the greatest deviation of a prediction."""
    errors = [abs(predicted[point] / value - 1) for point, value in measured.items()]
    return Metric(value=max(errors), unit="share", samples=len(errors), spread=(min(errors), max(errors)))


def samples_table(samples: Sequence[tuple[str, Sequence[Sample]]]) -> Rows:
    """Returns what each arm did."""
    rows = [
        [
            name,
            str(found[0].ask.batch),
            str(found[0].ask.context),
            shown(median([1e3 * it.step_s for it in found], "ms")),
            shown(median([it.tokens_per_s for it in found], "tokens/s")),
        ]
        for name, found in samples
    ]
    return Rows(title="Decodes", columns=["arm", "sequences", "context", "step", "tokens/s"], rows=rows)
