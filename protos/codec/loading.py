"""Says in words what a rank does until it is ready."""

from collections.abc import Mapping

from protos.heterodyne.control.v1 import control_pb2
from protos.heterodyne.worker.v1 import worker_pb2

READING = "loading"
"""A rank reads its weights, and says how many bytes are still to come."""

LOADING_WORDS: Mapping[int, str] = {
    worker_pb2.LOAD_PHASE_CONNECT: "connecting",
    worker_pb2.LOAD_PHASE_WEIGHTS: READING,
    worker_pb2.LOAD_PHASE_KV_CACHE: "allocating KV cache",
    worker_pb2.LOAD_PHASE_COMPILE: "compiling",
    worker_pb2.LOAD_PHASE_MEASURE: "measuring links",
    worker_pb2.LOAD_PHASE_WARM_UP: "warming up",
}


def doing(rank: control_pb2.Rank) -> str:
    """Says in a word or two what a rank does now, such as ``starting``, ``compiling`` or ``ready``."""
    if rank.phase == control_pb2.PHASE_LOADING and rank.load_phase in LOADING_WORDS:
        return LOADING_WORDS[rank.load_phase]
    return control_pb2.Phase.Name(rank.phase).removeprefix("PHASE_").lower()
