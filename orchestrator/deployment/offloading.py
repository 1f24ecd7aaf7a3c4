"""Decides whether attention workers hold the keys and values, and puts the decision into words. Pure."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from orchestrator.config.attention import AttentionConfig
from orchestrator.config.attention_checks import attention_workers
from orchestrator.config.document import Config
from orchestrator.deployment.known_cluster import KnownCluster, seats_of, without
from orchestrator.event_log import LogLevel, Said
from placement.errors import NotEnoughMemory
from placement.measured.assumed import (
    LINK_BYTES_PER_S,
    LOCAL_BYTES_PER_S,
    LOCAL_ROUND_TRIP_S,
    ROUND_TRIP_S,
    assumed_speed,
)
from placement.measured.speed import DeviceSpeed
from placement.model.specs import DeviceSpec, DType, ModelSpec, NodeSpec
from placement.planning.attention import AttentionSetup
from placement.planning.auto import Choice
from placement.planning.plan import Plan
from placement.planning.residency import Partition
from placement.serving.offload.choice import PartitionChoice
from placement.serving.offload.planned import Rates, judge_plan, suitable_partition, typical_context
from placement.serving.offload.verdict import Verdict

PlanWith = Callable[[KnownCluster, AttentionSetup | None], Choice]
"""Plans a model on the workers that compute it, with attention workers or without."""
_Seats = tuple[tuple[NodeSpec, DeviceSpec], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Offloading:
    """Holds what was decided about the attention workers of a deployment.

    Attributes:
        devices: the device of each attention worker, by its place in ``config.cluster.each_worker``.
        is_used: whether they hold keys and values; else all of them stay idle.
        is_asked: whether the configuration leaves no choice.
        idle: the names of those that hold nothing, as all of them do where attention is not offloaded.
        partition: how attention is divided among them, or would be.
        verdict: what is expected of it; None: their memory is too little, and ``cause`` says so.
        cause: why no plan with them could be made.
        basis: the speeds that all of this goes by, in words.
        trial: the plan with attention workers, by which all are started and measured before it is decided; None where
            nothing depends on that, or all are measured.
    """

    devices: Mapping[int, DeviceSpec]
    is_used: bool
    is_asked: bool
    idle: tuple[str, ...]
    partition: PartitionChoice
    verdict: Verdict | None
    cause: str
    basis: str
    trial: Plan | None = None


def decide(
    config: Config,
    model: ModelSpec,
    dtype: DType,
    cluster: KnownCluster,
    speeds: Sequence[DeviceSpeed] | None,
    plan_with: PlanWith,
) -> tuple[KnownCluster, Choice, Offloading]:
    """Plans with attention workers where they are expected to pay, or are asked for, and else without.

    Returns:
        the workers that compute the model, their plan, and what was decided.

    Raises:
        HeterodyneError: neither plan can be made, or the one that is asked for.
    """
    attention = config.serving.attention
    assert attention is not None
    names = config.cluster.worker_names
    places = [names.index(name) for name in attention_workers(attention, config.cluster.named_workers)]
    seats, computing = seats_of(cluster, places), without(cluster, places)
    rates, basis = _rates(attention, names, cluster, speeds)
    partition = _partition(config, attention, model, dtype, seats, rates)
    setup = _setup(attention, seats, rates, partition.partition)
    options = _options(computing, setup, plan_with, must=attention.offload == "always")
    verdict = _verdict(options, rates, setup.partition, attention.typical_context)
    is_used = options.must or (verdict is not None and verdict.is_accepted)
    chosen = options.chosen(is_used)
    decided = Offloading(
        devices={place: device for place, (_, device) in zip(places, seats, strict=True)},
        is_used=is_used,
        is_asked=options.must,
        idle=_idle(seats, chosen),
        partition=partition,
        verdict=verdict,
        cause="" if options.error is None else str(options.error),
        basis=basis,
        trial=_trial(options) if speeds is None and (len(places) > 1 or not options.must) else None,
    )
    return computing, chosen, decided


def _idle(seats: _Seats, chosen: Choice) -> tuple[str, ...]:
    holding = {shard.device.worker for shard in chosen.plan.attention}
    return tuple(device.worker for _, device in seats if device.worker not in holding)


def _setup(attention: AttentionConfig, seats: _Seats, rates: Rates, partition: Partition) -> AttentionSetup:
    return AttentionSetup(
        places=seats,
        weights=tuple(rates.speed_of(device).weight_bytes_per_s for _, device in seats),
        partition=partition,
        kv_cache_bytes=attention.kv_cache,
        local_kv_cache_bytes=attention.local_kv_cache,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Options:
    """The plans without attention workers and with them, or why there is none. There is one that may be chosen."""

    alone: Choice | None
    alone_error: NotEnoughMemory | None
    offloaded: Choice | None
    error: NotEnoughMemory | None
    must: bool

    def chosen(self, is_used: bool) -> Choice:
        """Returns the plan that is served. Raises NotEnoughMemory where it could not be made."""
        choice, error = (self.offloaded, self.error) if is_used else (self.alone, self.alone_error)
        if choice is None:
            assert error is not None
            raise error
        return choice


def _options(computing: KnownCluster, setup: AttentionSetup, plan_with: PlanWith, *, must: bool) -> _Options:
    """Makes both plans. Raises NotEnoughMemory where the one that is asked for cannot be made, or none."""
    alone, alone_error = _tried(computing, None, plan_with)
    offloaded, error = _tried(computing, setup, plan_with)
    if error is not None and (must or alone is None):
        raise error
    return _Options(alone=alone, alone_error=alone_error, offloaded=offloaded, error=error, must=must)


def _verdict(options: _Options, rates: Rates, partition: Partition, asked_context: int | None) -> Verdict | None:
    """Judges the plan with attention workers; None where there is none."""
    if options.offloaded is None:
        return None
    plan = options.offloaded.plan
    context = typical_context(plan.model.max_context_tokens, asked_context)
    alone = None if options.alone is None else options.alone.plan
    return judge_plan(plan, alone, rates, partition=partition, context=context)


def _trial(options: _Options) -> Plan | None:
    """Returns the plan by which workers are started early: each must be the same rank whatever is decided then."""
    alone, offloaded = options.alone, options.offloaded
    if offloaded is None or (alone is not None and _devices(alone) != _devices(offloaded)):
        return None
    return offloaded.plan


def _devices(choice: Choice) -> list[tuple[int, ...]]:
    return [layout.devices for layout in choice.layouts]


def _tried(
    computing: KnownCluster, setup: AttentionSetup | None, plan_with: PlanWith
) -> tuple[Choice | None, NotEnoughMemory | None]:
    try:
        return plan_with(computing, setup), None
    except NotEnoughMemory as error:
        return None, error


def _partition(
    config: Config, attention: AttentionConfig, model: ModelSpec, dtype: DType, seats: _Seats, rates: Rates
) -> PartitionChoice:
    most = min(config.model.max_context_tokens or model.max_context_tokens, model.max_context_tokens)
    return suitable_partition(
        [device for _, device in seats],
        rates,
        model.layers[0].attention,
        dtype,
        [typical_context(most, attention.typical_context)] * config.serving.max_num_seqs,
        block_size=config.serving.block_size,
        asked=attention.asked_partition,
    )


def _rates(
    attention: AttentionConfig, names: Sequence[str], cluster: KnownCluster, speeds: Sequence[DeviceSpeed] | None
) -> tuple[Rates, str]:
    """Returns the speeds to go by, and says which of them are known and which assumed."""
    measured = {} if speeds is None else dict(zip(names, speeds, strict=True))
    is_one = len(cluster.spec.nodes) == 1
    link = attention.link_speed or (LOCAL_BYTES_PER_S if is_one else LINK_BYTES_PER_S)
    rates = Rates(
        speed_of=lambda device: measured.get(device.worker) or assumed_speed(device),
        link_bytes_per_s=link,
        round_trip_s=LOCAL_ROUND_TRIP_S if is_one else ROUND_TRIP_S,
    )
    devices = "measured" if measured else "assumed by kind and threads, as nothing is measured before workers run"
    said = "by serving.attention.link_speed" if attention.link_speed else "assumed"
    where = "within this machine" if is_one else "of each network interface"
    return rates, f"speeds of devices are {devices}; {link / 1e9:.3g} GB/s {where} are {said}"


def offloading_events(decided: Offloading | None) -> Iterator[Said]:
    """Yields what was decided, with the numbers that led to it, and who stays idle."""
    if decided is None:
        return
    parts = [_decision(decided), decided.partition.reason if decided.is_used else "", decided.basis]
    sentence = "; ".join(part for part in parts if part)
    yield Said(
        event="attention_offload",
        sentence=f"{sentence[0].upper()}{sentence[1:]}.",
        fields={"offloaded": str(decided.is_used).lower(), **_numbers(decided.verdict), **_choice(decided)},
        level=LogLevel.INFO if decided.verdict is not None and decided.verdict.is_accepted else LogLevel.WARNING,
    )
    if decided.idle:
        yield Said(
            event="attention_idle",
            sentence=f"Idle: {', '.join(decided.idle)}. Attention workers with nothing to hold do not run.",
            fields={"workers": ",".join(decided.idle)},
            level=LogLevel.WARNING,
        )


def _decision(decided: Offloading) -> str:
    """Says in a clause what was decided, and why."""
    if decided.verdict is None:
        return f"attention is not offloaded: {decided.cause.removesuffix('.')}"
    if decided.is_asked and not decided.verdict.is_accepted:
        return f"attention is offloaded, as serving.attention.offload says, though {_against(decided.verdict)}"
    return decided.verdict.reason


def _against(verdict: Verdict) -> str:
    return verdict.reason.partition(": ")[2]


def _numbers(verdict: Verdict | None) -> dict[str, object]:
    if verdict is None:
        return {}
    return {
        "context": verdict.context,
        "gain": f"{verdict.gain:.3f}",
        "sequences": verdict.offloaded.num_sequences,
        "sequences_without": verdict.alone.num_sequences,
        "min_gb_per_s": ",".join(f"{rate / 1e9:.3g}" for rate in verdict.needed_bytes_per_s),
        "link_gb_per_s": ",".join(f"{rate / 1e9:.3g}" for rate in verdict.links_bytes_per_s),
        "refusal": "" if verdict.refusal is None else verdict.refusal.value,
    }


def _choice(decided: Offloading) -> dict[str, object]:
    return {"partition": decided.partition.partition.value, "cause": decided.cause, "basis": decided.basis}
