"""The ranks of a replica, as each of them is told: what each holds, where it listens, and its neighbours. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass

from placement.errors import InvalidRequest
from placement.model.part import Part, Span
from placement.model.specs import ModelSpec
from placement.model.striping import Stripe
from protos.codec.parts import read_part
from protos.heterodyne.worker.v1 import worker_pb2 as pb
from workers.transport.mesh import TOKEN_BYTES


@dataclass(frozen=True, slots=True, kw_only=True)
class Roster:
    """The ranks of a replica, in rank order.

    Attributes:
        rank: the number of this rank.
        parts: what each rank holds of the model.
        addresses: where each rank listens for the others, as (host, port).
        token: the secret that the ranks present to each other.
    """

    rank: int
    parts: tuple[Part, ...]
    addresses: tuple[tuple[str, int], ...]
    token: bytes

    @property
    def stages(self) -> tuple[tuple[int, ...], ...]:
        """Returns the ranks of each stage, in the order of the layers."""
        stages: dict[Span, list[int]] = {}
        for rank, part in enumerate(self.parts):
            stages.setdefault(part.layers, []).append(rank)
        return tuple(map(tuple, stages.values()))

    @property
    def stage(self) -> int:
        """Returns the index of this rank's stage."""
        return next(index for index, ranks in enumerate(self.stages) if self.rank in ranks)

    @property
    def source(self) -> int | None:
        """Returns the rank that sends hidden states to this one, or None where none does.

        It is a rank of the stage before; to the leader of a pipeline it is the first rank of the last stage.
        """
        stages, place = self.stages, self.stages[self.stage].index(self.rank)
        if self.stage:
            ranks = stages[self.stage - 1]
            return ranks[place % len(ranks)]
        return stages[-1][0] if self.rank == 0 and len(stages) > 1 else None

    @property
    def targets(self) -> tuple[int, ...]:
        """Returns the ranks that this one sends hidden states to."""
        stages, ranks = self.stages, self.stages[self.stage]
        place = ranks.index(self.rank)
        if self.stage + 1 < len(stages):
            return tuple(rank for at, rank in enumerate(stages[self.stage + 1]) if at % len(ranks) == place)
        return (0,) if len(stages) > 1 and place == 0 else ()

    @property
    def stripes(self) -> tuple[Stripe, ...]:
        """Returns the stripes of the ranks that share sequences; empty where no ranks do."""
        return tuple(part.stripe for part in self.parts if part.stripe is not None)

    @property
    def part(self) -> Part:
        """Returns what this rank holds of the model."""
        return self.parts[self.rank]


def read_roster(request: pb.LoadRequest, model: ModelSpec) -> Roster:
    """Reads the roster in a load request. A replica of one rank has no address and no token.

    Raises:
        InvalidRequest: the shards are not a replica of ``model``, or this version cannot compute them.
    """
    if request.members:
        roster = _read_members(request, model)
    else:
        part = read_part(request.shard, model, request.block_size, "shard")
        roster = Roster(rank=0, parts=(part,), addresses=(("", 0),), token=b"")
    _check_whole(roster, model)
    return roster


def _read_members(request: pb.LoadRequest, model: ModelSpec) -> Roster:
    """Reads the roster of several ranks. Raises InvalidRequest."""
    shards = [member.shard for member in request.members]
    rank = request.shard.rank
    if len(request.token) != TOKEN_BYTES:
        raise _refusal("token", f"{len(request.token)} bytes", f"is not one of {TOKEN_BYTES} bytes")
    if not 0 <= rank < len(shards) or shards[rank] != request.shard:
        raise _refusal("shard.rank", rank, "is not the place of this shard among the members")
    block_size = request.block_size
    parts = tuple(read_part(shard, model, block_size, f"members[{i}].shard") for i, shard in enumerate(shards))
    for i, member in enumerate(request.members):
        if not member.host or not 0 < member.port < 2**16:
            raise _refusal(f"members[{i}]", f"{member.host}:{member.port}", "is no address")
    addresses = tuple((member.host, member.port) for member in request.members)
    return Roster(rank=rank, parts=parts, addresses=addresses, token=request.token)


def _check_whole(roster: Roster, model: ModelSpec) -> None:
    """Checks that the stages, and the parts within each, make up the model exactly once. Raises InvalidRequest."""
    whole = Part.whole(model)
    stages = [[roster.parts[rank] for rank in ranks] for ranks in roster.stages]
    _check_cover([stage[0].layers for stage in stages], whole.layers, "layers")
    for index, stage in enumerate(stages):
        if any(part.stripe is not None for part in stage):
            _check_shared(stage, whole)
            continue
        _check_cover([part.kv_heads for part in stage], whole.kv_heads, "kv_heads")
        _check_cover([part.ffn_columns for part in stage], whole.ffn_columns, "ffn_columns")
        _check_cover([part.vocab_rows for part in stage], Span(0, 0) if index else whole.vocab_rows, "vocab_rows")


def _check_shared(stage: Sequence[Part], whole: Part) -> None:
    """Checks ranks that share sequences: all hold all layers, and stripes make up a block. Raises InvalidRequest."""
    stripes = [part.stripe for part in stage if part.stripe is not None]
    if len(stripes) < len(stage) or any(part.layers != whole.layers for part in stage):
        raise _refusal("shard.slots", len(stripes), f"are not those of all {len(stage)} ranks of the only stage")
    _check_cover([Span(stripe.start, stripe.stop) for stripe in stripes], Span(0, stripes[0].block_size), "slots")
    _check_cover([part.vocab_rows for part in stage], whole.vocab_rows, "vocab_rows")
    for part in stage:
        _check_cover([part.kv_heads], whole.kv_heads, "kv_heads")
        _check_cover([part.ffn_columns], whole.ffn_columns, "ffn_columns")


def _check_cover(spans: Sequence[Span], whole: Span, name: str) -> None:
    """Checks that the spans follow each other and make up ``whole``. Raises InvalidRequest."""
    ends = [0, *(span.stop for span in spans)]
    if any(len(span) and span.start != end for span, end in zip(spans, ends, strict=False)) or ends[-1] != whole.stop:
        raise _refusal(f"shard.{name}", [str(span) for span in spans], f"are not all of {whole}, each once")


def _refusal(field: str, value: object, problem: str) -> InvalidRequest:
    return InvalidRequest(field=field, value=value, problem=problem, fix="Send the plan's own shards, in rank order.")
