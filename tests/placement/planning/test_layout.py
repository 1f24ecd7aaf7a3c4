"""Checks what the ranks of a layout hold."""

from dataclasses import replace

import pytest

from placement.errors import InvalidConfig
from placement.model.part import Part, Span
from placement.model.quantization import GptqLayout, LinearFormat
from placement.model.striping import Stripe
from placement.planning.layout import ReplicaLayout, StageLayout, cut
from tests.support.shapes import LLAMA_8B as MODEL

FIELD = "serving.parallelism.replicas[0]"


def stage(*weights: float, num_layers: int | None = None, speed: float = 1.0) -> StageLayout:
    return StageLayout(devices=tuple(range(len(weights))), weights=weights, num_layers=num_layers, speed=speed)


def parts(*stages: StageLayout) -> tuple[tuple[Part, ...], ...]:
    return cut(MODEL, ReplicaLayout(stages=stages), field=FIELD)


def refusal(*stages: StageLayout, linear: LinearFormat | None = None) -> InvalidConfig:
    with pytest.raises(InvalidConfig) as caught:
        cut(MODEL, ReplicaLayout(stages=stages), linear, field=FIELD)
    return caught.value


def test_one_rank_holds_all() -> None:
    assert parts(stage(1)) == ((Part.whole(MODEL),),)


def test_ranks_of_a_stage_share_every_layer_by_weight() -> None:
    ((first, second),) = parts(stage(3, 1))
    assert (first.layers, second.layers) == (Span(0, 32), Span(0, 32))
    assert (first.kv_heads, second.kv_heads) == (Span(0, 6), Span(6, 8))
    assert (first.ffn_columns, second.ffn_columns) == (Span(0, 10752), Span(10752, 14336))
    assert (first.vocab_rows, second.vocab_rows) == (Span(0, 96192), Span(96192, 128256))


def test_a_share_of_zero_holds_nothing_of_a_layer() -> None:
    ((first, second),) = parts(stage(1, 0))
    assert first == Part.whole(MODEL)
    assert [len(span) for span in (second.kv_heads, second.ffn_columns, second.vocab_rows)] == [0, 0, 0]


def test_only_the_first_stage_holds_the_vocabulary() -> None:
    first, second = parts(stage(1, num_layers=20), stage(1, 1))
    assert (first[0].layers, second[0].layers, second[1].layers) == (Span(0, 20), Span(20, 32), Span(20, 32))
    assert first[0].vocab_rows == Span(0, 128256)
    assert [len(part.vocab_rows) for part in second] == [0, 0]


def test_layers_follow_the_speed_of_stages_and_the_first_has_the_head_beside() -> None:
    """The head's 128256 x 4096 parameters are as many as those of 2.4 layers of 218 M."""
    even = parts(stage(1), stage(1))
    assert [len(ranks[0].layers) for ranks in even] == [15, 17]
    unequal = parts(stage(1, speed=3.0), stage(1, speed=1.0))
    assert [len(ranks[0].layers) for ranks in unequal] == [24, 8]
    assert [len(ranks[0].layers) for ranks in parts(stage(1, speed=1000.0), stage(1, speed=0.001))] == [31, 1]


@pytest.mark.parametrize(
    ("stages", "field", "value", "problem"),
    [
        ((stage(1, num_layers=20),) * 2, ".stages: layers", 40, "do not add up to the model's 32 layers"),
        ((stage(1, num_layers=20),), ".stages: layers", 20, "do not add up to the model's 32 layers"),
        ((stage(1, num_layers=32), stage(1)), ".stages: layers", 32, "at least one for each of 1 stages"),
        ((stage(1),) * 33, ".stages", 33, "are more than the model's 32 layers"),
        ((stage(0, 0),), ".stages[0].tensor_split", [0, 0], "gives nobody anything"),
        ((stage(1), stage(10_000, 1)), ".stages[1].tensor_split", [10_000, 1],
         "leaves rank 1 of the stage nothing: 8 KV heads are dealt out in 8 units, and 14336 FFN columns"),
    ],
)  # fmt: skip
def test_what_cannot_be_cut_is_refused_by_its_field(
    stages: tuple[StageLayout, ...], field: str, value: object, problem: str
) -> None:
    error = refusal(*stages)
    assert (error.field, error.value) == (FIELD + field, value)
    assert problem in error.problem and error.fix


def test_columns_in_another_order_are_not_cut() -> None:
    ordered = LinearFormat(bits=4, gptq=GptqLayout(group_size=128, zero_shift=1, ordered=True))
    error = refusal(stage(1, 1), linear=ordered)
    assert error.field == f"{FIELD}.stages[0].tensor_split" and "desc_act" in error.fix
    one = replace(Part.whole(MODEL), layers=Span(0, 15))
    assert cut(MODEL, ReplicaLayout(stages=(stage(1), stage(1))), ordered, field=FIELD)[0] == (one,)


def shared(*weights: float) -> StageLayout:
    return replace(stage(*weights), split="sequence")


def test_ranks_that_share_sequences_have_all_layers_and_some_slots_of_every_block() -> None:
    ((first, second, third),) = cut(MODEL, ReplicaLayout(stages=(shared(5, 0, 2),)), block_size=16, field=FIELD)
    whole = Part.whole(MODEL)
    for part in (first, second, third):
        assert (part.layers, part.kv_heads, part.ffn_columns) == (whole.layers, whole.kv_heads, whole.ffn_columns)
    assert (first.stripe, second.stripe, third.stripe) == (Stripe(0, 12, 16), Stripe(12, 12, 16), Stripe(12, 16, 16))
    assert [len(part.vocab_rows) for part in (first, second, third)] == [91616, 0, 36640]


def test_one_rank_alone_shares_nothing() -> None:
    assert parts(shared(1)) == ((Part.whole(MODEL),),)


@pytest.mark.parametrize(
    ("stages", "problem"),
    [
        ((shared(0, 0),), "gives nobody anything"),
        ((shared(0),), "gives nobody anything"),
        ((shared(40, 1),), "leaves rank 1 none of the 16 slots of a KV block"),
        ((shared(1, 1), stage(1)), "is in a replica of several stages"),
    ],
)
def test_sequences_that_cannot_be_shared_so_are_refused(stages: tuple[StageLayout, ...], problem: str) -> None:
    with pytest.raises(InvalidConfig, match=problem) as caught:
        cut(MODEL, ReplicaLayout(stages=stages), block_size=16, field=FIELD)
    assert caught.value.field == f"{FIELD}.stages[0].sequence_split"
