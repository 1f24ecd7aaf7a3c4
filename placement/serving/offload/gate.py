"""Decides whether attention is offloaded at all: only where links carry it, and where it serves more tokens a second.

With attention workers, model workers read no keys and values, and batches are as large as the attention workers'
memory. The price is that model workers wait for what passes the links, or read their weights once for each of several
smaller micro-batches. So it pays where contexts are long and the keys and values of a token are large, and loses where
batches are limited by computation anyway, such as with grouped heads and short contexts.

The step is predicted by a roofline (Williams et al. 2009): products take as long as their operations or their weights,
whichever is longer, and attention as long as its keys and values are read. Speeds are measured ones, so that they
contain what kernels attain. A link must carry minBW = (2 + 2 / G) e d B L / (alpha [t_model(B) + t_attention(B, l)]),
so that messages take at most the share alpha of the computation (Lamina, Chen et al. 2024).
"""

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

from placement.serving.offload.choice import AttentionWorker
from placement.serving.offload.rotation import MOST_MICRO_BATCHES, period_s
from placement.serving.offload.verdict import Prediction, Refusal, Verdict
from placement.serving.offload.work import DecodeWork

ALPHA = 0.2
"""The share of the time of computation that messages may take, as in the paper."""
LEAST_GAIN = 0.03
"""The gain below which attention stays where it is: predictions are not more exact than that."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelDevices:
    """The devices that compute one replica of the model together.

    Attributes:
        memory_bytes: the memory for weights, keys and values.
        weight_bytes_per_s: bytes of weights that they read in a second.
        flops_per_s: floating-point operations in a second.
        kv_bytes_per_s: bytes of keys and values that they attend to in a second.
        links_bytes_per_s: bytes that each network interface carries in a second. They share the messages equally.
        steps: steps that were measured without attention, as sequences and seconds, ascending; with two or more of them
            steps take what lies on the lines between them, and beyond the last on its line, and no roofline is needed.
    """

    memory_bytes: int
    weight_bytes_per_s: float
    flops_per_s: float
    kv_bytes_per_s: float
    links_bytes_per_s: tuple[float, ...] = ()
    steps: tuple[tuple[float, float], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Offload:
    """Model replicas with attention workers.

    Attributes:
        model: the devices of each replica.
        workers: the attention workers that the replicas share.
        shares: the share of each sequence's KV heads or tokens that each worker has, or of all sequences; 1 in all.
        wire_bytes: the payload of a token and layer of each worker, both ways.
        round_trip_s: the least seconds from a query to its answer, with no attention between.
        num_replicas: the replicas of the model; one micro-batch more is on its way.
        alpha: the share of the time of computation that messages may take.
    """

    model: ModelDevices
    workers: tuple[AttentionWorker, ...]
    shares: tuple[float, ...]
    wire_bytes: tuple[float, ...]
    round_trip_s: float = 0.0
    num_replicas: int = 1
    alpha: float = ALPHA

    def __post_init__(self) -> None:
        assert len(self.workers) == len(self.shares) == len(self.wire_bytes) > 0, self
        assert math.isclose(sum(self.shares), 1) and 1 <= self.num_replicas < MOST_MICRO_BATCHES, self
        assert self.model.links_bytes_per_s, self

    @property
    def links_bytes_per_s(self) -> tuple[float, ...]:
        """Lists what each link carries in a second: those of a model replica, and then the attention workers'."""
        return (*self.model.links_bytes_per_s, *(worker.link_bytes_per_s for worker in self.workers))


def judge(
    work: DecodeWork, *, without: ModelDevices, offload: Offload, context: int, most_sequences: int | None = None
) -> Verdict:
    """Decides whether attention is offloaded.

    Args:
        without: the devices that would serve alone instead, such as those of both sides, or others of the same price.
        context: the tokens of a typical sequence, midway through its answer.
        most_sequences: the most sequences that there are to serve; None: as many as fit.
    """
    assert context >= 1, context
    alone = predict_alone(work, without, context=context, most_sequences=most_sequences)
    num_fitting = _limited(largest_batch(work, offload, context), most_sequences)
    num_carried = _most_carried(work, offload, context, num_fitting)
    offloaded = predict_offloaded(work, offload, context=context, batch=num_carried)
    gain = _gain(alone, offloaded)
    refusal, lacking = None, (0, 0)
    if work.weight_bytes > offload.model.memory_bytes:
        refusal, lacking = Refusal.WEIGHTS, (work.weight_bytes, offload.model.memory_bytes)
    elif not num_fitting:
        refusal, lacking = Refusal.NO_ROOM, (work.kv_bytes(context), sum(it.kv_cache_bytes for it in offload.workers))
    elif not num_carried or (gain < LEAST_GAIN and num_carried < num_fitting):
        refusal = Refusal.LINKS
    elif gain < LEAST_GAIN:
        refusal = Refusal.LOSES
    return Verdict(
        refusal=refusal,
        alone=alone,
        offloaded=offloaded,
        gain=gain,
        context=context,
        num_fitting=num_fitting,
        needed_bytes_per_s=least_link_bytes_per_s(work, offload, context=context, num_sequences=max(1, num_carried)),
        links_bytes_per_s=offload.links_bytes_per_s,
        needed_bytes=lacking[0],
        available_bytes=lacking[1],
    )


def predict_alone(
    work: DecodeWork, devices: ModelDevices, *, context: int, most_sequences: int | None = None
) -> Prediction:
    """Predicts decodes where the devices hold weights and keys and values, with the largest batch that fits."""
    room = devices.memory_bytes - work.weight_bytes
    batch = _limited(max(0, room) // work.kv_bytes(context), most_sequences)
    step_s = _model_s(work, devices, batch) + batch * work.attended_bytes(context) / devices.kv_bytes_per_s
    return Prediction(num_sequences=batch, num_micro_batches=1, step_s=step_s)


def predict_offloaded(work: DecodeWork, offload: Offload, *, context: int, batch: int) -> Prediction:
    """Predicts decodes of ``batch`` sequences with attention workers.

    One replica takes one micro-batch or two, whichever is faster; more replicas take one more than they are.
    """
    usual = offload.num_replicas + 1
    options = [
        Prediction(
            num_sequences=batch, num_micro_batches=count, step_s=offloaded_step_s(work, offload, context, batch, count)
        )
        for count in ((usual, 1) if offload.num_replicas == 1 else (usual,))
    ]
    return min(options, key=lambda it: it.step_s)


def offloaded_step_s(work: DecodeWork, offload: Offload, context: int, batch: int, num_micro_batches: int) -> float:
    """Predicts the seconds until each of ``batch`` sequences has a token more, in so many micro-batches."""
    layers = work.num_layers
    size = batch / num_micro_batches
    model_s = _model_s(work, offload.model, size) / layers
    attention_s = _attention_s(work, offload, context, size) / layers
    own_s, workers_s = (size * seconds for seconds in _carried_s(offload))
    slice_s = period_s(
        model_s=model_s,
        attention_s=attention_s,
        wire_s=max(own_s, workers_s) + offload.round_trip_s,
        num_micro_batches=num_micro_batches,
    )
    # Links are shared as devices are: a replica's by some micro-batches, the attention workers' by all.
    busiest_s = num_micro_batches * max(own_s / offload.num_replicas, workers_s)
    return layers * max(slice_s, busiest_s)


def least_link_bytes_per_s(
    work: DecodeWork, offload: Offload, *, context: int, num_sequences: int
) -> tuple[float, ...]:
    """Returns minBW of each link, by the module's formula: those of a model replica, and then the attention workers'.

    B are the sequences of all micro-batches. A replica takes its part of them; an attention worker's link carries what
    the worker has of all.
    """
    model_s = _model_s(work, offload.model, num_sequences / offload.num_replicas)
    computed_s = offload.alpha * (model_s + _attention_s(work, offload, context, num_sequences))
    links = offload.model.links_bytes_per_s
    own = sum(offload.wire_bytes) / len(links) / offload.num_replicas
    per_token = [own] * len(links) + list(offload.wire_bytes)
    return tuple(num_sequences * work.num_layers * num_bytes / computed_s for num_bytes in per_token)


def _model_s(work: DecodeWork, devices: ModelDevices, batch: float) -> float:
    """Predicts the products of a step: by what was measured, or by the roofline."""
    if len(devices.steps) >= 2:
        return _on_lines(devices.steps, batch)
    computed_s = batch * work.flops_per_token / devices.flops_per_s
    return max(computed_s, work.read_bytes / devices.weight_bytes_per_s)


def _on_lines(points: Sequence[tuple[float, float]], at: float) -> float:
    """Returns what lies at a place on the lines between points; beyond the last one on the last line."""
    after = min(max(1, bisect_left(points, at, key=lambda point: point[0])), len(points) - 1)
    (left, low), (right, high) = points[after - 1], points[after]
    return max(0.0, low + (at - left) * (high - low) / (right - left))


def _attention_s(work: DecodeWork, offload: Offload, context: int, batch: float) -> float:
    """Predicts the attention of a step at the slowest worker."""
    pairs = zip(offload.workers, offload.shares, strict=True)
    return batch * work.attended_bytes(context) * max(share / worker.kv_bytes_per_s for worker, share in pairs)


def _carried_s(offload: Offload) -> tuple[float, float]:
    """Predicts how long a token's messages of a layer take the busiest link of a replica, and of the attention workers.

    Both ways are added up, as minBW does, though most links carry both at once.
    """
    links = offload.model.links_bytes_per_s
    pairs = zip(offload.workers, offload.wire_bytes, strict=True)
    own_s = max(sum(offload.wire_bytes) / len(links) / link for link in links)
    return own_s, max(num_bytes / worker.link_bytes_per_s for worker, num_bytes in pairs)


def largest_batch(work: DecodeWork, offload: Offload, context: int) -> int:
    """Counts the sequences whose keys and values fit into the attention workers' memory; 0 where weights do not fit."""
    if work.weight_bytes > offload.model.memory_bytes:
        return 0
    pairs = zip(offload.workers, offload.shares, strict=True)
    rooms = [worker.kv_cache_bytes / (share * work.kv_bytes(context)) for worker, share in pairs if share]
    return math.floor(min(rooms))


def _most_carried(work: DecodeWork, offload: Offload, context: int, most: int) -> int:
    """Counts the sequences whose messages the links carry, at most ``most``.

    A search by halves finds them, since a larger batch needs no less of a link: its messages grow in proportion to it,
    and its computation at the most so.
    """

    def is_carried(batch: int) -> bool:
        needed = least_link_bytes_per_s(work, offload, context=context, num_sequences=batch)
        return all(need <= link for need, link in zip(needed, offload.links_bytes_per_s, strict=True))

    return bisect_left(range(1, most + 1), True, key=lambda batch: not is_carried(batch))


def _limited(batch: int, most: int | None) -> int:
    return batch if most is None else min(batch, most)


def _gain(alone: Prediction, offloaded: Prediction) -> float:
    if not alone.num_sequences:
        return math.inf if offloaded.num_sequences else 0.0
    return offloaded.tokens_per_s / alone.tokens_per_s - 1
