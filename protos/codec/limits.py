"""The sizes that a replica serves within, in the messages that have its ranks load. Pure."""

from placement.errors import InvalidConfig, InvalidRequest
from placement.planning.limits import ReplicaLimits
from protos.codec.formats import quantization_message, read_quantization
from protos.heterodyne.worker.v1 import worker_pb2 as pb


def set_limits(request: pb.LoadRequest, limits: ReplicaLimits) -> None:
    """Writes the sizes into a request."""
    request.block_size = limits.block_size
    request.token_budget = limits.token_budget
    request.max_num_seqs = limits.max_num_seqs
    request.prefix_cache = limits.prefix_cache
    request.quantization = quantization_message(limits.quantization)
    if limits.step_time_s is not None:
        request.step_time_s = limits.step_time_s


def read_limits(request: pb.LoadRequest) -> ReplicaLimits:
    """Returns the sizes in a request. Raises InvalidRequest for sizes that cannot work."""
    try:
        return ReplicaLimits(
            block_size=request.block_size,
            token_budget=request.token_budget,
            max_num_seqs=request.max_num_seqs,
            prefix_cache=request.prefix_cache,
            quantization=read_quantization(request.quantization),
            step_time_s=request.step_time_s if request.HasField("step_time_s") else None,
        )
    except InvalidConfig as error:
        field = error.field.removeprefix("serving.")
        raise InvalidRequest(field=field, value=error.value, problem=error.problem, fix=error.fix) from error
