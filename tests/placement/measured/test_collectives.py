"""Checks which all-reduce algorithm is chosen for which size."""

import pytest

from placement.measured.collectives import AllReduceTable, MeasuredSum, fastest, unmeasured

TABLE = AllReduceTable(sizes=(1024, 4096, 65536), names=("direct", "star", "scatter"))


@pytest.mark.parametrize(
    ("num_bytes", "name"),
    [(1, "direct"), (1024, "direct"), (2047, "direct"), (2048, "star"), (4096, "star"), (16383, "star"),
     (16384, "scatter"), (65536, "scatter"), (10**9, "scatter")],
)  # fmt: skip
def test_a_size_has_the_algorithm_of_the_nearest_measured_one(num_bytes: int, name: str) -> None:
    assert TABLE.choose(num_bytes) == name


def test_the_fastest_is_chosen_and_the_first_of_equals() -> None:
    table = fastest({"direct": [1.0, 3.0], "star": [1.0, 2.0], "scatter": [2.0, 2.5]}, sizes=(10, 20))
    assert (table.sizes, table.names, table.seconds) == ((10, 20), ("direct", "star"), (1.0, 2.0))
    assert table.measured == (
        MeasuredSum(num_bytes=10, algorithm="direct", duration_s=1.0),
        MeasuredSum(num_bytes=20, algorithm="star", duration_s=2.0),
    )


def test_what_has_no_checksums_is_taken_where_it_saves_a_tenth() -> None:
    measured_s = {"direct": [1.0, 1.0], "gloo": [0.95, 0.85]}
    assert fastest(measured_s, sizes=(10, 20), unchecked=("gloo",)).names == ("direct", "gloo")
    assert fastest(measured_s, sizes=(10, 20)).names == ("gloo", "gloo")


def test_what_was_not_measured_has_no_durations() -> None:
    assert TABLE.measured == unmeasured(2).measured == ()


@pytest.mark.parametrize(("num_ranks", "name"), [(2, "direct"), (4, "direct"), (5, "scatter")])
def test_before_anything_is_measured_few_ranks_save_latencies(num_ranks: int, name: str) -> None:
    assert unmeasured(num_ranks).choose(12345) == name


LINK = AllReduceTable(sizes=(1000, 11_000, 101_000), names=("direct",) * 3, seconds=(0.001, 0.002, 0.012))


@pytest.mark.parametrize(
    ("num_bytes", "most", "strips"),
    [
        (1000, 8, 1),
        (2000, 8, 1),  # 0.1 ms beyond the least
        (3000, 8, 2),  # 0.2 ms, in two halves of 0.1 ms
        (9100, 8, 4),
        (20_000, 8, 4),
        (101_000, 8, 8),
        (101_000, 4, 4),
        (10**7, 8, 8),
        (1, 8, 1),
    ],
)
def test_a_sum_has_as_many_strips_as_its_transfer_is_worth_messages(num_bytes: int, most: int, strips: int) -> None:
    assert LINK.num_strips(num_bytes, most) == strips


def test_sums_that_were_not_measured_are_whole() -> None:
    assert TABLE.num_strips(10**9, 8) == unmeasured(2).num_strips(10**9, 8) == 1


def test_a_table_of_one_size_knows_no_rate() -> None:
    assert AllReduceTable(sizes=(1,), names=("direct",), seconds=(1.0,)).num_strips(10**9, 8) == 1
