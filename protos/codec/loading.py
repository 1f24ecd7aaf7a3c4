"""Says in words what a rank does until it is ready."""

from collections.abc import Mapping
from enum import Enum

from protos.heterodyne.control.v1 import control_pb2
from protos.heterodyne.worker.v1 import worker_pb2


class Loading(Enum):
    """These are the parts of a load, by the words in which each is told."""

    CONNECT = "connecting"
    WEIGHTS = "loading"
    KV_CACHE = "allocating KV cache"
    COMPILE = "compiling"
    MEASURE = "measuring links"
    WARM_UP = "warming up"


LOAD_PHASES: Mapping[Loading, worker_pb2.LoadPhase.ValueType] = {
    part: worker_pb2.LoadPhase.Value(f"LOAD_PHASE_{part.name}") for part in Loading
}
"""How a worker says on the wire which part it is at."""

_PARTS = {phase: part for part, phase in LOAD_PHASES.items()}
READING = Loading.WEIGHTS.value
"""A rank reads its weights, and says how many bytes are still to come."""


def part_of(phase: worker_pb2.LoadPhase.ValueType) -> Loading | None:
    """Returns the part of a load that a phase on the wire is; None where it is none."""
    return _PARTS.get(phase)


def part_of_rank(rank: control_pb2.Rank) -> Loading | None:
    """Returns the part of its load that a rank is at; None where it is not loading, or does not say."""
    return part_of(rank.load_phase) if rank.phase == control_pb2.PHASE_LOADING else None


def doing(rank: control_pb2.Rank) -> str:
    """Says in a word or two what a rank does now, such as ``starting``, ``compiling`` or ``ready``."""
    part = part_of_rank(rank)
    return control_pb2.Phase.Name(rank.phase).removeprefix("PHASE_").lower() if part is None else part.value
