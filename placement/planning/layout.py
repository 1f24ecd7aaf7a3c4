"""Decides what each device of a replica holds, given the replica's layout. Owns the refusal of what cannot be cut."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from placement.errors import InvalidConfig
from placement.model.part import Part, Span
from placement.model.quantization import LinearFormat
from placement.model.specs import ClusterSpec, ModelSpec
from placement.model.striping import Stripe
from placement.model.weights import EMBEDDING, FINAL_NORM, HEAD, shard_tensors
from placement.planning.pools import EVERYONE, Pool
from placement.planning.splitting import Dimension, deal, dimensions, spans

Split = Literal["tensor", "sequence"]

_NOTHING = Span(0, 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class StageLayout:
    """A stage as it is asked for.

    Attributes:
        devices: the places of its devices among those of the cluster, in the order of nodes and devices.
        weights: the share of each device, on any scale; a share of 0 is nothing.
        split: what the devices share: every layer's heads and columns, or every sequence's tokens.
        num_layers: the number of layers; None: the stages that do not say share the rest by ``speed``.
        speed: the speed of the whole stage, on the scale of the other stages.
    """

    devices: tuple[int, ...]
    weights: tuple[float, ...]
    split: Split = "tensor"
    num_layers: int | None = None
    speed: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaLayout:
    """A replica as it is asked for, and the pool that it is in."""

    stages: tuple[StageLayout, ...]
    pool: Pool = EVERYONE

    @property
    def devices(self) -> tuple[int, ...]:
        """Lists the devices of all stages in the order of ranks."""
        return tuple(device for stage in self.stages for device in stage.devices)


def one_each(cluster: ClusterSpec) -> tuple[ReplicaLayout, ...]:
    """Lays a replica on every device of the cluster."""
    num_devices = sum(len(node.devices) for node in cluster.nodes)
    return tuple(
        ReplicaLayout(stages=(StageLayout(devices=(device,), weights=(1.0,)),)) for device in range(num_devices)
    )


def cut(
    model: ModelSpec,
    layout: ReplicaLayout,
    linear: LinearFormat | None = None,
    *,
    block_size: int = 1,
    field: str,
) -> tuple[tuple[Part, ...], ...]:
    """Cuts the model: it returns the part of every rank of every stage.

    Args:
        linear: the format of linear layers.
        block_size: slots of a KV block, which ranks share where they share sequences.
        field: the name of the layout in the configuration, for errors.

    Raises:
        InvalidConfig: the layers of the stages are not as many as the model's, or a dim, which is named, cannot be
            dealt out in these shares.
    """
    layers = _cut_layers(model, layout.stages, field)
    if model.ladder and len(layout.stages) > 1:
        problem = "are stages of a ladder-residual model, whose layers begin before those before them have ended"
        raise _refusal(f"{field}.stages", len(layout.stages), problem, "Use one stage.")
    for index, stage in enumerate(layout.stages):
        if stage.split == "sequence" and len(stage.devices) > 1 < len(layout.stages):
            problem = "is in a replica of several stages, which share layers only"
            fix = "Use one stage, or tensor_split."
            raise _refusal(f"{field}.stages[{index}].sequence_split", list(stage.weights), problem, fix)
    slots = _Slots(block_size=block_size, field=layout.pool.block_size_field)
    return tuple(
        _cut_sequences(model, stage, stage_layers, linear, slots, field=f"{field}.stages[{index}]")
        if stage.split == "sequence"
        else _cut_stage(model, stage, stage_layers, linear, field=f"{field}.stages[{index}]")
        for index, (stage, stage_layers) in enumerate(zip(layout.stages, layers, strict=True))
    )


def _cut_layers(model: ModelSpec, stages: Sequence[StageLayout], field: str) -> tuple[Span, ...]:
    """Deals the layers out to the stages."""
    if len(stages) > model.num_layers:
        problem = f"are more than the model's {model.num_layers} layers"
        raise _refusal(f"{field}.stages", len(stages), problem, "Use fewer stages.")
    counts = [stage.num_layers or 0 for stage in stages]
    free = [index for index, stage in enumerate(stages) if stage.num_layers is None]
    left = model.num_layers - sum(counts) - len(free)
    if left < 0 or (left and not free):
        problem = f"do not add up to the model's {model.num_layers} layers"
        if free:
            problem += f", with at least one for each of {len(free)} stages that do not say"
        fix = f"Make layers add up to {model.num_layers}, or leave them out."
        raise _refusal(f"{field}.stages: layers", sum(counts), problem, fix)
    if free:
        # The first stage computes the output head too, as if it had some layers more.
        before = [1.0 + (_head_layers(model) if index == 0 else 0.0) for index in free]
        for index, count in zip(free, deal(left, [stages[i].speed for i in free], before), strict=True):
            counts[index] = 1 + count
    return spans(Dimension(name="layers", size=model.num_layers), counts)


def _head_layers(model: ModelSpec) -> float:
    """Returns the output head's cost in layers: the ratio of the parameters that a step reads of both."""
    whole = Part.whole(model)
    slices = shard_tensors(model, whole)
    ends = (EMBEDDING, FINAL_NORM, HEAD)
    layers = sum(slice_.num_elements for slice_ in slices if slice_.name not in ends)
    return model.vocab_size * model.hidden_size * model.num_layers / layers


def _cut_stage(
    model: ModelSpec, stage: StageLayout, layers: Span, linear: LinearFormat | None, *, field: str
) -> tuple[Part, ...]:
    """Gives each rank of a stage its share of every layer's KV heads and columns, and of the vocabulary."""
    num_ranks = len(stage.devices)
    assert num_ranks == len(stage.weights) > 0, stage
    if not any(stage.weights):
        fix = "Give at least one rank a share."
        raise _refusal(f"{field}.tensor_split", list(stage.weights), "gives nobody anything", fix)
    if num_ranks > 1 and linear is not None and linear.gptq is not None and linear.gptq.ordered:
        problem = "cuts the columns of o_proj and down_proj, whose groups are not neighbours in this GPTQ checkpoint"
        fix = "Give each stage one rank, or use a checkpoint made without desc_act."
        raise _refusal(f"{field}.tensor_split", list(stage.weights), problem, fix)
    dims = dimensions(model, num_ranks, linear)
    heads, columns, rows = (spans(dim, deal(dim.num_units, stage.weights)) for dim in dims.all)
    if layers.start:
        rows = (_NOTHING,) * num_ranks
    for rank, weight in enumerate(stage.weights):
        if weight and not (len(heads[rank]) or len(columns[rank])):
            problem = (
                f"leaves rank {rank} of the stage nothing: {_units(dims.kv_heads)}, and {_units(dims.ffn_columns)}"
            )
            fix = "Give it a larger share, or 0, or leave it out."
            raise _refusal(f"{field}.tensor_split", list(stage.weights), problem, fix)
    return tuple(
        Part(layers=layers, kv_heads=heads[rank], ffn_columns=columns[rank], vocab_rows=rows[rank])
        for rank in range(num_ranks)
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Slots:
    """The slots of a KV block, and the key of the configuration that sets how many they are."""

    block_size: int
    field: str


def _cut_sequences(
    model: ModelSpec,
    stage: StageLayout,
    layers: Span,
    linear: LinearFormat | None,
    slots: _Slots,
    *,
    field: str,
) -> tuple[Part, ...]:
    """Gives each rank of a stage its layers whole, and its share of every KV block and of the output head."""
    field = f"{field}.sequence_split"
    if not any(stage.weights):
        raise _refusal(field, list(stage.weights), "gives nobody anything", "Give at least one rank a share.")
    if len(stage.devices) == 1:
        return _cut_stage(model, stage, layers, linear, field=field)
    of_block = Dimension(name="slots of a KV block", size=slots.block_size)
    widths = deal(slots.block_size, stage.weights)
    for rank, weight in enumerate(stage.weights):
        if weight and not widths[rank]:
            problem = f"leaves rank {rank} none of the {slots.block_size} slots of a KV block"
            fix = f"Give it a larger share, or 0, or raise {slots.field}."
            raise _refusal(field, list(stage.weights), problem, fix)
    rows = dimensions(model, len(stage.devices), linear).vocab_rows
    rows_of = spans(rows, deal(rows.num_units, stage.weights))
    whole = Part.whole(model)
    return tuple(
        dataclasses.replace(
            whole,
            layers=layers,
            vocab_rows=rows_of[rank],
            stripe=Stripe(slot.start, slot.stop, slots.block_size),
        )
        for rank, slot in enumerate(spans(of_block, widths))
    )


def _units(dim: Dimension) -> str:
    return f"{dim.size} {dim.name} are dealt out in {dim.num_units} units"


def _refusal(field: str, value: object, problem: str, fix: str) -> InvalidConfig:
    return InvalidConfig(field=field, value=value, problem=problem, fix=fix)
