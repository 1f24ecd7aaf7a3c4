"""Roles of replicas as messages."""

import pytest

from placement.errors import InvalidRequest
from placement.planning.plan import Role
from protos.codec.roles import read_role, role_message
from protos.heterodyne.control.v1 import control_pb2 as pb


@pytest.mark.parametrize("role", list(Role))
def test_a_role_is_read_as_it_was_written(role: Role) -> None:
    message = pb.Replica(role=role_message(role))
    assert read_role(pb.Replica.FromString(message.SerializeToString()).role) is role


def test_a_replica_that_says_nothing_computes_both_and_one_of_a_later_version_is_refused() -> None:
    assert read_role(pb.Replica().role) is Role.MIXED
    with pytest.raises(InvalidRequest, match=r"role: is not known"):
        read_role(pb.Replica.FromString(bytes([6 << 3, 99])).role)
