"""Sizes are in a load request what they were in the plan."""

import pytest

from placement.errors import InvalidRequest
from placement.model.quantization import Quantization
from placement.planning.limits import ReplicaLimits
from protos.codec.limits import read_limits, set_limits
from protos.heterodyne.worker.v1 import worker_pb2 as pb


@pytest.mark.parametrize("quantization", list(Quantization))
@pytest.mark.parametrize("prefix_cache", [False, True])
@pytest.mark.parametrize("step_time_s", [None, 0.25])
def test_limits_are_read_as_they_were_written(
    quantization: Quantization, prefix_cache: bool, step_time_s: float | None
) -> None:
    limits = ReplicaLimits(
        block_size=16,
        token_budget=64,
        max_num_seqs=8,
        prefix_cache=prefix_cache,
        quantization=quantization,
        step_time_s=step_time_s,
    )
    request = pb.LoadRequest()
    set_limits(request, limits)
    assert read_limits(pb.LoadRequest.FromString(request.SerializeToString())) == limits


def test_sizes_that_cannot_work_are_refused_as_a_request() -> None:
    with pytest.raises(InvalidRequest) as caught:
        read_limits(pb.LoadRequest(block_size=16, token_budget=4, max_num_seqs=5))
    assert caught.value.field == "token_budget"
    with pytest.raises(InvalidRequest) as caught:
        read_limits(pb.LoadRequest(block_size=16, token_budget=8, max_num_seqs=5, step_time_s=float("nan")))
    assert caught.value.field == "step_time_s"
