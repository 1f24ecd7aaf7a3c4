"""Plans anew by measured speed, where ``auto`` had cut a model or judged offloading provisionally. Pure."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from orchestrator.deployment.preflight import Checked, by_speed
from orchestrator.event_log import Said
from placement.measured.assumed import assumed_speed
from placement.measured.speed import DeviceSpeed, NotMeasured
from placement.planning.attention import GROUP


@dataclass(frozen=True, slots=True, kw_only=True)
class Settled:
    """The plan that is served, and the words that explain how the model was cut."""

    checked: Checked
    said: Said


def settle(provisional: Checked, measured: Sequence[DeviceSpeed | NotMeasured]) -> Settled:
    """Returns the cut by measured speed, or, where a worker could not be measured, the provisional one and why.

    No speed is made up for a worker that has none. Threads, or memory, are then what is known of all of them.

    Args:
        provisional: replicas over several workers each, or a plan with attention workers or without them.
        measured: the speed of each rank of the first replica, then of the next, and of the attention workers last, or
            why it is not known; of the plan that was tried where there is one.

    Raises:
        HeterodyneError: the model directory was changed since it was first looked at.
    """
    names = provisional.config.cluster.worker_names
    trial = provisional.trial or provisional
    by_place = dict(zip((trial.workers[rank] for rank in _ranks(trial)), measured, strict=True))
    failures = [f"{names[place]} {speed.cause}" for place, speed in by_place.items() if isinstance(speed, NotMeasured)]
    if failures:
        return Settled(checked=provisional, said=_words(provisional, cause="; ".join(failures)))
    known = {place: speed for place, speed in sorted(by_place.items()) if isinstance(speed, DeviceSpeed)}
    checked = by_speed(provisional, _of_all(provisional, known))
    if not _are_kept(checked, trial):  # the workers that run were told which replica they are of
        cause = "what was measured would put workers into other replicas"
        return Settled(checked=provisional, said=_words(provisional, cause=cause))
    is_cut_by_it = checked.split_by in (None, "speed")
    said = _words(
        checked,
        cause="" if is_cut_by_it else "the model cannot be cut by what was measured",
        weights_gb_per_s=_each(names, {place: speed.weight_bytes_per_s for place, speed in known.items()}),
        prefill_gflop_per_s=_each(names, {place: speed.flops_per_s for place, speed in known.items()}),
    )
    return Settled(checked=checked, said=said)


def _ranks(checked: Checked) -> list[tuple[str, int]]:
    """Lists the ranks in the order in which they are measured: those of replicas, then attention workers."""
    ranks = [(replica.name, shard.rank) for replica in checked.plan.replicas for shard in replica.shards]
    return [*ranks, *((GROUP, shard.rank) for shard in checked.plan.attention)]


def _of_all(checked: Checked, known: Mapping[int, DeviceSpeed]) -> list[DeviceSpeed]:
    """Returns the speed of each worker; an attention worker that would hold nothing was not measured."""
    devices = {} if checked.offloading is None else checked.offloading.devices
    places = range(len(checked.config.cluster.each_worker))
    return [known[place] if place in known else assumed_speed(devices[place]) for place in places]


def _are_kept(checked: Checked, trial: Checked) -> bool:
    """Tells whether all ranks of replicas are the workers that they were started as, and all attention workers too."""
    replicas = {rank: place for rank, place in trial.workers.items() if rank[0] != GROUP}
    return replicas.items() <= checked.workers.items() <= trial.workers.items()


def _words(checked: Checked, **more: str) -> Said:
    """Says by what a model was cut, or, where it was not, that its workers were measured."""
    if checked.split_by is not None:
        return split_words(checked, **more)
    cause = more.get("cause", "")
    known = f"The workers read weights at GB/s: {more['weights_gb_per_s']}" if "weights_gb_per_s" in more else ""
    sentence = "; ".join(part for part in (known, f"What was measured is not used: {cause}" if cause else "") if part)
    return Said(event="measured", sentence=f"{sentence}.", fields=more)


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


def _each(names: Sequence[str], rates: Mapping[int, float]) -> str:
    return ", ".join(f"{names[place]} {rate / 1e9:.3g}" for place, rate in rates.items())
