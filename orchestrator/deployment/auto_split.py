"""Cuts a model anew by measured speed, where ``auto`` had cut it provisionally, and says so. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass

from orchestrator.deployment.preflight import Checked, by_speed
from orchestrator.event_log import Said
from placement.measured.speed import DeviceSpeed, NotMeasured


@dataclass(frozen=True, slots=True, kw_only=True)
class Settled:
    """The plan that is served, and the words that explain how the model was cut."""

    checked: Checked
    said: Said


def settle(provisional: Checked, measured: Sequence[DeviceSpeed | NotMeasured]) -> Settled:
    """Returns the cut by measured speed, or, where a worker could not be measured, the provisional one and why.

    No speed is made up for a worker that has none. Threads, or memory, are then what is known of all of them.

    Args:
        provisional: replicas over several workers each.
        measured: the speed of each rank of the first replica, then of the next, or why it is not known.

    Raises:
        HeterodyneError: the model directory was changed since it was first looked at.
    """
    names = provisional.config.cluster.worker_names
    ranks = [(replica.name, shard.rank) for replica in provisional.plan.replicas for shard in replica.shards]
    places = [provisional.workers[rank] for rank in ranks]
    by_place = dict(zip(places, measured, strict=True))
    speeds = [speed for _, speed in sorted(by_place.items()) if isinstance(speed, DeviceSpeed)]
    failures = [f"{names[place]} {speed.cause}" for place, speed in by_place.items() if isinstance(speed, NotMeasured)]
    if failures:
        return Settled(checked=provisional, said=split_words(provisional, cause="; ".join(failures)))
    checked = by_speed(provisional, speeds)
    if checked.workers != provisional.workers:  # the workers that run were told which replica they are of
        cause = "what was measured would put workers into other replicas"
        return Settled(checked=provisional, said=split_words(provisional, cause=cause))
    cause = "" if checked.split_by == "speed" else "the model cannot be cut by what was measured"
    said = split_words(
        checked,
        cause=cause,
        weights_gb_per_s=_each(names, [speed.weight_bytes_per_s for speed in speeds]),
        prefill_gflop_per_s=_each(names, [speed.flops_per_s for speed in speeds]),
    )
    return Settled(checked=checked, said=said)


def split_words(checked: Checked, **more: str) -> Said:
    """Says by what a model was cut."""
    cause = more.get("cause", "")
    why = f", as {cause}" if cause else ""
    each = all(len(replica.shards) > 1 for replica in checked.plan.replicas)
    lacking = "No worker has" if each else "Not every worker has"
    return Said(
        event="auto_split",
        sentence=f"{lacking} memory for the whole model: it is cut by {checked.split_by}{why}.",
        fields={"by": checked.split_by, **more},
    )


def _each(names: Sequence[str], rates: Sequence[float]) -> str:
    return ", ".join(f"{name} {rate / 1e9:.3g}" for name, rate in zip(names, rates, strict=True))
