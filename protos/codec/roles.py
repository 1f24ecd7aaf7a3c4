"""Converts the roles of replicas to messages of the control protocol and back. Pure."""

from placement.errors import InvalidRequest
from placement.planning.plan import Role
from protos.heterodyne.control.v1 import control_pb2 as pb

_ROLES = {Role.MIXED: pb.ROLE_MIXED, Role.PREFILL: pb.ROLE_PREFILL, Role.DECODE: pb.ROLE_DECODE}
_ROLE_OF = {number: role for role, number in _ROLES.items()}


def role_message(role: Role) -> pb.Role.ValueType:
    """Returns the message of a role."""
    return _ROLES[role]


def read_role(number: pb.Role.ValueType) -> Role:
    """Returns the role in a message; MIXED where none is set. Raises InvalidRequest for one that is not known."""
    if number == pb.ROLE_UNSPECIFIED:
        return Role.MIXED
    if number not in _ROLE_OF:
        raise InvalidRequest(field="role", value=number, problem="is not known", fix="Run the same version everywhere.")
    return _ROLE_OF[number]
