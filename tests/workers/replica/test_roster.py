"""Who works with whom in a replica, and which replicas are refused."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from placement.errors import InvalidRequest
from placement.model.part import Part
from placement.model.specs import ModelSpec, RopeSpec
from placement.model.striping import Stripe
from placement.planning.layout import ReplicaLayout, StageLayout, cut
from protos.heterodyne.worker.v1 import worker_pb2 as pb
from workers.replica.roster import Roster, read_roster

MODEL = ModelSpec(
    architecture="llama",
    num_layers=6,
    hidden_size=64,
    num_heads=8,
    num_kv_heads=4,
    head_dim=8,
    ffn_size=256,
    vocab_size=100,
    max_context_tokens=64,
    rms_norm_eps=1e-5,
    rope=RopeSpec(),
    tied_embeddings=False,
)


def parts_of(*stage_sizes: int) -> tuple[Part, ...]:
    stages = tuple(StageLayout(devices=tuple(range(size)), weights=(1.0,) * size) for size in stage_sizes)
    return tuple(part for stage in cut(MODEL, ReplicaLayout(stages=stages), field="test") for part in stage)


def rosters(*stage_sizes: int) -> list[Roster]:
    parts = parts_of(*stage_sizes)
    return [Roster(rank=rank, parts=parts, addresses=(("h", 1),) * len(parts), token=b"") for rank in range(len(parts))]


def request(*stage_sizes: int, rank: int = 0, widths: Sequence[int] = ()) -> pb.LoadRequest:
    """Of ranks that share layers; or, with ``widths``, the slots of a block of 8 of each."""

    def span(part: Part, name: str) -> dict[str, int]:
        return {"start": getattr(part, name).start, "stop": getattr(part, name).stop}

    names = ("layers", "kv_heads", "ffn_columns", "vocab_rows")
    shards = [
        pb.Shard(rank=at, **{name: span(part, name) for name in names})
        for at, part in enumerate(parts_of(*stage_sizes))
    ]
    edges = list(accumulate(widths, initial=0))
    for shard, start, stop in zip(shards, edges, edges[1:], strict=False):
        shard.kv_heads.CopyFrom(pb.Range(stop=MODEL.num_kv_heads))
        shard.ffn_columns.CopyFrom(pb.Range(stop=MODEL.ffn_size))
        shard.slots.CopyFrom(pb.Range(start=start, stop=stop))
    members = [pb.Member(host="127.0.0.1", port=7000 + at, shard=shard) for at, shard in enumerate(shards)]
    return pb.LoadRequest(shard=shards[rank], members=members, token=bytes(32), block_size=8)


def test_one_rank_has_nobody_before_or_after_it() -> None:
    (alone,) = rosters(1)
    assert (alone.stages, alone.stage, alone.source, alone.targets) == (((0,),), 0, None, ())


def test_ranks_of_one_stage_hand_nothing_on() -> None:
    assert [(one.stage, one.source, one.targets) for one in rosters(3)] == [(0, None, ())] * 3


def test_the_last_stage_gives_back_to_the_leader() -> None:
    first, beside, second, third = rosters(2, 1, 1)
    assert first.stages == ((0, 1), (2,), (3,))
    assert [(one.source, one.targets) for one in (first, beside, second, third)] == [
        (3, (2,)), (None, ()), (0, (3,)), (2, (0,)),
    ]  # fmt: skip


@given(st.lists(st.integers(1, 4), min_size=2, max_size=4))
def test_every_rank_gets_hidden_states_from_exactly_the_rank_that_gives_them(sizes: list[int]) -> None:
    everyone = rosters(*sizes)
    given_to = [(giver.rank, taker) for giver in everyone for taker in giver.targets]
    taken_from = [(one.source, one.rank) for one in everyone if one.source is not None]
    assert sorted(given_to) == sorted(taken_from)
    assert {taker for _, taker in given_to} == {one.rank for one in everyone if one.stage or one.rank == 0}


@pytest.mark.parametrize("sizes", [(2,), (3,), (1, 1), (2, 1, 2)])
def test_a_plan_is_read_as_it_was_made(sizes: tuple[int, ...]) -> None:
    for rank in range(sum(sizes)):
        roster = read_roster(request(*sizes, rank=rank), MODEL)
        assert (roster.rank, roster.parts) == (rank, parts_of(*sizes))
        assert roster.addresses[rank] == ("127.0.0.1", 7000 + rank)


def _set(path: str, value: Any) -> Callable[[pb.LoadRequest], None]:
    def change(message: pb.LoadRequest) -> None:
        *names, last = path.split(".")
        target: Any = message
        for name in names:
            target = target[int(name)] if name.isdigit() else getattr(target, name)
        setattr(target, last, value)

    return change


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (_set("token", b"short"), "token"),
        (_set("shard.rank", 1), "shard.rank"),
        (_set("shard.rank", 7), "shard.rank"),
        (_set("members.1.port", 70000), "members[1]"),
        (_set("members.1.host", ""), "members[1]"),
        (_set("members.1.shard.layers.stop", 99), "members[1].shard.layers"),
        (_set("members.1.shard.kv_heads.start", 3), "shard.kv_heads"),
        (_set("members.1.shard.ffn_columns.start", 0), "shard.ffn_columns"),
        (_set("members.1.shard.vocab_rows.stop", 90), "shard.vocab_rows"),
        (_set("members.1.shard.layers.start", 1), "shard.layers"),
    ],
)
def test_ranks_that_are_no_replica_are_refused(change: Callable[[pb.LoadRequest], None], field: str) -> None:
    message = request(2)
    change(message)
    with pytest.raises(InvalidRequest) as caught:
        read_roster(message, MODEL)
    assert caught.value.field == field


def test_a_stage_that_is_missing_is_refused() -> None:
    message = request(1, 1, 1)
    del message.members[2]
    with pytest.raises(InvalidRequest, match=r"shard\.layers: are not all of"):
        read_roster(message, replace(MODEL))


def test_ranks_that_share_sequences_are_one_stage() -> None:
    roster = read_roster(request(3, rank=1, widths=(5, 3, 0)), MODEL)
    assert roster.stripes == (Stripe(0, 5, 8), Stripe(5, 8, 8), Stripe(8, 8, 8))
    assert roster.stages == ((0, 1, 2),)
    assert all(part.kv_heads == Part.whole(MODEL).kv_heads for part in roster.parts)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (_set("members.1.shard.slots.stop", 9), "members[1].shard.slots"),
        (_set("members.1.shard.slots.start", 4), "shard.slots"),
        (lambda message: message.members[1].shard.ClearField("slots"), "shard.slots"),
        (_set("members.1.shard.kv_heads.stop", 3), "shard.kv_heads"),
        (_set("members.1.shard.ffn_columns.stop", 99), "shard.ffn_columns"),
        (_set("members.1.shard.vocab_rows.stop", 90), "shard.vocab_rows"),
    ],
)
def test_ranks_that_share_only_some_of_a_sequence_are_refused(
    change: Callable[[pb.LoadRequest], object], field: str
) -> None:
    message = request(2, widths=(5, 3))
    change(message)
    with pytest.raises(InvalidRequest) as caught:
        read_roster(message, MODEL)
    assert caught.value.field == field


def test_stages_of_ranks_that_share_sequences_are_refused() -> None:
    with pytest.raises(InvalidRequest, match=r"shard\.slots"):
        read_roster(request(1, 1, widths=(4, 4)), MODEL)
