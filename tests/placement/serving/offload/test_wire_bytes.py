"""What the wire carries is the formula's number of bytes, to the byte."""

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from placement.model.layers import Gqa
from placement.model.specs import DType
from placement.planning.residency import head_spans
from placement.serving.offload.wire_bytes import model_token_bytes, token_range_bytes, whole_head_bytes
from tests.placement.serving.offload.paper_models import LLAMA3_70B, LLAMA_65B

BF16 = DType.BFLOAT16


@st.composite
def attentions(draw: st.DrawFn) -> Gqa:
    num_kv_heads = draw(st.integers(1, 16))
    return Gqa(
        num_heads=num_kv_heads * draw(st.integers(1, 8)),
        num_kv_heads=num_kv_heads,
        head_dim=8 * draw(st.integers(1, 32)),
    )


def formula(attention: Gqa, dtype: DType) -> Fraction:
    """(2 + 2 / G) * e * d."""
    group = Fraction(attention.num_heads, attention.num_kv_heads)
    return (2 + 2 / group) * dtype.itemsize * attention.num_heads * attention.head_dim


def test_a_token_of_the_papers_models_takes_the_papers_bytes() -> None:
    assert model_token_bytes(LLAMA3_70B, BF16) == 2_949_120
    assert model_token_bytes(LLAMA_65B, BF16) == 5_242_880


@given(
    attention=attentions(), dtype=st.sampled_from(DType), weights=st.lists(st.floats(0.1, 9), min_size=1, max_size=5)
)
def test_whole_heads_take_the_formula_however_they_are_divided(
    attention: Gqa, dtype: DType, weights: list[float]
) -> None:
    assert whole_head_bytes(attention, dtype).total == formula(attention, dtype)
    heads = [len(span) for span in head_spans(attention.num_kv_heads, weights)]
    payloads = [whole_head_bytes(attention, dtype, num_tokens=7, num_kv_heads=count) for count in heads]
    assert sum(payload.total for payload in payloads) == 7 * formula(attention, dtype)
    assert all(bool(it.total) == bool(count) for it, count in zip(payloads, heads, strict=True))


@given(attention=attentions(), dtype=st.sampled_from(DType), num_holders=st.integers(2, 9))
def test_token_ranges_take_a_query_and_a_part_of_each_holder(attention: Gqa, dtype: DType, num_holders: int) -> None:
    width, size = attention.num_heads * attention.head_dim, dtype.itemsize
    extra = (num_holders - 1) * size * width + num_holders * 4 * (width + attention.num_heads) - size * width
    parts, whole = token_range_bytes(attention, dtype, num_holders=num_holders), whole_head_bytes(attention, dtype)
    assert parts.total - whole.total == extra
    assert (parts.key, parts.value) == (whole.key, whole.value)


@pytest.mark.parametrize("num_holders", [0, 1])
def test_a_sequence_of_one_holder_costs_nothing_more(num_holders: int) -> None:
    attention = Gqa(num_heads=8, num_kv_heads=2, head_dim=64)
    assert token_range_bytes(attention, BF16, num_holders=num_holders) == whole_head_bytes(attention, BF16)
