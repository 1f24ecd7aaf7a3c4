"""Checks how a dim is dealt out to unequal ranks."""

from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from placement.model.part import Span
from placement.model.quantization import GptqLayout, LinearFormat
from placement.model.specs import ModelSpec, RopeSpec
from placement.planning.splitting import Dimension, deal, dimensions, spans
from tests.support.shapes import LLAMA_8B

WEIGHTS = st.lists(st.one_of(st.just(0.0), st.floats(0.1, 100.0)), min_size=1, max_size=4).filter(any)


@pytest.mark.parametrize(
    ("num_units", "weights", "dealt"),
    [
        (8, (1, 1), (4, 4)),
        (8, (3, 1), (6, 2)),
        (8, (5, 2, 1), (5, 2, 1)),
        (4, (5, 2, 1), (3, 1, 0)),
        (8, (1, 0), (8, 0)),
        (1, (1, 1), (1, 0)),
        (0, (1, 2), (0, 0)),
        (8, (0.003, 0.001), (6, 2)),
    ],
)
def test_units_follow_the_weights(num_units: int, weights: tuple[float, ...], dealt: tuple[int, ...]) -> None:
    assert deal(num_units, weights) == dealt


@given(num_units=st.integers(0, 9), weights=WEIGHTS)
def test_no_other_way_leaves_the_slowest_rank_less(num_units: int, weights: list[float]) -> None:
    def slowest(units: tuple[int, ...]) -> float:
        return max(count / weight for count, weight in zip(units, weights, strict=True) if weight)

    dealt = deal(num_units, weights)
    assert sum(dealt) == num_units
    assert not any(count for count, weight in zip(dealt, weights, strict=True) if not weight)
    ways = [
        way for way in product(*(range(num_units + 1 if weight else 1) for weight in weights)) if sum(way) == num_units
    ]
    assert slowest(dealt) <= min(map(slowest, ways)) * (1 + 1e-9)


def test_who_has_something_beforehand_gets_less() -> None:
    assert deal(10, (1, 1), before=(2.5, 0)) == (4, 6)


@given(size=st.integers(0, 500), unit=st.integers(1, 40), weights=WEIGHTS)
def test_spans_tile_the_dimension_at_its_units(size: int, unit: int, weights: list[float]) -> None:
    dim = Dimension(name="columns", size=size, unit=unit)
    cut = spans(dim, deal(dim.num_units, weights))
    assert [span.start for span in cut] == [0, *(span.stop for span in cut[:-1])] and cut[-1].stop == size
    assert all(span.start % unit == 0 or span.start == size for span in cut)


def test_kernels_get_whole_vectors() -> None:
    dims = dimensions(LLAMA_8B, 3)
    assert [(dim.num_units, dim.unit) for dim in dims.all] == [(8, 1), (448, 32), (8016, 16)]


def test_groups_of_rounded_columns_are_not_cut() -> None:
    for linear in (
        LinearFormat(bits=4),
        LinearFormat(bits=4, gptq=GptqLayout(group_size=1024, zero_shift=1, ordered=False)),
    ):
        dims = dimensions(LLAMA_8B, 2, linear)
        size = linear.group_size(14336)
        assert size is not None and dims.ffn_columns.unit % size == 0
        assert dims.kv_heads.unit * 4 * 128 % size == 0


def test_a_group_of_all_columns_leaves_one_unit() -> None:
    linear = LinearFormat(bits=4, gptq=GptqLayout(group_size=None, zero_shift=1, ordered=False))
    dims = dimensions(LLAMA_8B, 2, linear)
    assert (dims.kv_heads.num_units, dims.ffn_columns.num_units) == (1, 1)
    assert spans(dims.ffn_columns, deal(1, (1, 1))) == (Span(0, 14336), Span(14336, 14336))


def test_small_dims_are_dealt_out_in_smaller_units() -> None:
    assert Dimension(name="x", size=96, unit=4).num_units == 24
    small = dimensions(
        ModelSpec(
            architecture="llama", num_layers=2, hidden_size=60, num_heads=4, num_kv_heads=2, head_dim=15,
            ffn_size=96, vocab_size=509, max_context_tokens=64, rms_norm_eps=1e-5, rope=RopeSpec(),
            tied_embeddings=True,
        ),
        2,
    )  # fmt: skip
    assert [(dim.num_units, dim.unit) for dim in small.all] == [(2, 1), (24, 4), (32, 16)]
