"""A rank's place in its replica: who the others are, and the connections with them."""

import socket
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from placement.collectives import unmeasured
from placement.errors import InvalidRequest
from placement.plan import Part
from placement.specs import ModelSpec
from protos.heterodyne.worker.v1 import worker_pb2 as pb
from workers import wire
from workers.collectives.group import TensorGroup
from workers.collectives.measure import measure
from workers.followers import Follower, Followers, FollowingRunner
from workers.transport.mesh import TOKEN_BYTES, Channel, Members, Mesh, join
from workers.transport.pulse import Pulse

JOIN_S = 30.0
"""Longest until all ranks have connected: they are told to at the same time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Roster:
    """The ranks of a replica, in their order.

    Attributes:
        rank: of this one.
        parts: what each holds.
        addresses: where each listens for the others.
    """

    rank: int
    parts: tuple[Part, ...]
    addresses: tuple[tuple[str, int], ...]
    token: bytes

    @property
    def part(self) -> Part:
        """What this rank holds."""
        return self.parts[self.rank]


class Membership:
    """The connections of a rank with all others, from joining to its end."""

    def __init__(self, *, mesh: Mesh, roster: Roster) -> None:
        """Takes the connections over, and begins to beat."""
        self._mesh = mesh
        self.pulse = Pulse(mesh.of(Channel.PULSE))
        self.steps = mesh.of(Channel.STEPS)
        self.group = TensorGroup(
            rank=roster.rank,
            links=mesh.of(Channel.COMPUTE),
            pulse=self.pulse,
            widths=[len(part.vocab_rows) for part in roster.parts],
            table=unmeasured(len(roster.parts)),
        )
        self.pulse.start()

    @classmethod
    def join(cls, listener: socket.socket, roster: Roster, *, epoch: int) -> "Membership":
        """Connect with all other ranks. Raises PeerFailed where one does not come."""
        members = Members(rank=roster.rank, addresses=roster.addresses, epoch=epoch, token=roster.token)
        return cls(mesh=join(listener, members, deadline_s=time.monotonic() + JOIN_S), roster=roster)

    def get_ready(self) -> None:
        """Once all ranks are loaded, measures how they sum best. On the thread that computes. Raises PeerFailed."""
        self.group.meet()
        self.group.table = measure(self.group)

    def followers(self) -> Followers:
        """The leader's hold on all others."""
        return Followers(links=self.steps, pulse=self.pulse, group=self.group)

    def follower(
        self, runner: FollowingRunner, executor: ThreadPoolExecutor, *, vocab_size: int, slot_limit: int
    ) -> Follower:
        """This rank as one that follows the leader."""
        return Follower(
            runner=runner,
            group=self.group,
            leader=self.steps[0],
            pulse=self.pulse,
            executor=executor,
            vocab_size=vocab_size,
            slot_limit=slot_limit,
        )

    def leave(self, cause: str) -> None:
        """Tell the others why, and end all connections."""
        self.pulse.fail(cause)
        self._mesh.close()


def read_roster(request: pb.LoadRequest, model: ModelSpec) -> Roster:
    """The ranks of the replica; of one that has one rank alone, this one, without an address.

    Raises:
        InvalidRequest: the shards are not a replica of ``model``, or this version cannot compute them.
    """
    if not request.members:
        roster = Roster(rank=0, parts=(_part(request.shard, model, "shard"),), addresses=(("", 0),), token=b"")
    else:
        shards = [member.shard for member in request.members]
        rank = request.shard.rank
        if len(request.token) != TOKEN_BYTES:
            raise _refusal("token", f"{len(request.token)} bytes", f"is not one of {TOKEN_BYTES} bytes")
        if not 0 <= rank < len(shards) or shards[rank] != request.shard:
            raise _refusal("shard.rank", rank, "is not the place of this shard among the members")
        parts = tuple(_part(shard, model, f"members[{i}].shard") for i, shard in enumerate(shards))
        addresses = tuple((member.host, member.port) for member in request.members)
        roster = Roster(rank=rank, parts=parts, addresses=addresses, token=request.token)
    _check_whole(roster.parts, model)
    return roster


def _part(shard: pb.Shard, model: ModelSpec, field: str) -> Part:
    return Part(
        layers=wire.span(shard.layers, field=f"{field}.layers", limit=model.num_layers),
        kv_heads=wire.span(shard.kv_heads, field=f"{field}.kv_heads", limit=model.num_kv_heads),
        ffn_columns=wire.span(shard.ffn_columns, field=f"{field}.ffn_columns", limit=model.ffn_size),
        vocab_rows=wire.span(shard.vocab_rows, field=f"{field}.vocab_rows", limit=model.vocab_size),
    )


def _check_whole(parts: tuple[Part, ...], model: ModelSpec) -> None:
    """The parts are all of the model, each once, cut within layers. Raises InvalidRequest."""
    whole = Part.whole(model)
    if any(part.layers != whole.layers for part in parts):
        raise _refusal("shard.layers", [str(part.layers) for part in parts], "are stages, which are not built yet")
    for name in ("kv_heads", "ffn_columns", "vocab_rows"):
        spans = [getattr(part, name) for part in parts]
        ends = [0, *(span.stop for span in spans)]
        if [span.start for span in spans] != ends[:-1] or ends[-1] != getattr(whole, name).stop:
            raise _refusal(f"shard.{name}", [str(span) for span in spans], "are not all of the model, each once")


def _refusal(field: str, value: object, problem: str) -> InvalidRequest:
    return InvalidRequest(field=field, value=value, problem=problem, fix="Send the plan's own shards, in rank order.")
