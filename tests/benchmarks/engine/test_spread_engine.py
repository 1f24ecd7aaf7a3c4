"""Figures of an engine in several layouts, of peers whose rates are told."""

import pytest

from tests.benchmarks.engine.engine_cases import Case, Sample
from tests.benchmarks.engine.engine_peers import PeerFailed
from tests.benchmarks.engine.spread_engine import (
    Engine,
    PeerFigures,
    Rates,
    Unavailable,
    Work,
    best,
    best_layouts,
    engine,
)
from tests.benchmarks.engine.spread_peer import SpreadPeer

SMALL = Work(batches=(1, 2), prompts=(8,), num_steps=3, context=4, repeats=2)


class FakePeer:
    """Stands for a loaded peer, whose rates are told."""

    def __init__(self, *rates: float) -> None:
        self.versions = {"fake": "1"}
        self.asked: list[tuple[Case, int]] = []
        self.is_closed = False
        self._rates = list(rates)

    def measure(self, case: Case, seed: int) -> Sample:
        self.asked.append((case, seed))
        if not self._rates:
            raise PeerFailed("it had enough")
        return Sample(seconds=1.0, tokens=int(self._rates.pop(0)))

    def close(self) -> None:
        self.is_closed = True


def fake_engine(**peers: FakePeer) -> Engine:
    return Engine("fake", peers, left_out={"third": "too large"})  # type: ignore[arg-type]


def test_layouts_take_turns_and_the_one_with_the_best_median_counts() -> None:
    one, two = FakePeer(10, 30, 20), FakePeer(11, 12, 90)
    rates = fake_engine(one=one, two=two).decode(batch=8, steps=5, context=7)
    assert rates == Rates(layout="one", samples={"one": (10.0, 30.0, 20.0), "two": (11.0, 12.0, 90.0)})
    assert (rates.metric.value, rates.metric.samples, rates.metric.spread) == (20.0, 3, (10.0, 30.0))
    case = Case(phase="decode", num_tokens=7, num_sequences=8, num_steps=5)
    assert one.asked == two.asked == [(case, 0), (case, 1), (case, 2)]


def test_figures_hold_every_case_and_what_was_left_out() -> None:
    figures = fake_engine(one=FakePeer(*range(1, 7))).measure(SMALL)
    assert isinstance(figures, PeerFigures)
    assert {batch: rates.samples["one"] for batch, rates in figures.decode.items()} == {1: (1.0, 2.0), 2: (3.0, 4.0)}
    assert figures.prefill[8].metric.value == 5.5
    assert (figures.versions, figures.left_out) == ({"fake": "1"}, {"third": "too large"})


def test_an_engine_that_fails_is_unavailable_and_says_why() -> None:
    assert fake_engine(one=FakePeer(1)).measure(SMALL) == Unavailable(engine="fake", reason="it had enough")


def test_layouts_that_are_never_best_can_be_ended() -> None:
    one, two, three = FakePeer(), FakePeer(), FakePeer()
    fakes = fake_engine(one=one, two=two, three=three)
    figures = PeerFigures(
        engine="fake",
        decode={1: best({"one": (2.0,), "two": (1.0,), "three": (1.0,)})},
        prefill={8: best({"one": (1.0,), "two": (1.0,), "three": (3.0,)})},
    )
    fakes.narrow(best_layouts(figures))
    assert fakes.layouts == ("one", "three")
    assert (one.is_closed, two.is_closed, three.is_closed) == (False, True, False)


def test_a_layout_that_cannot_be_loaded_is_left_out_and_none_at_all_is_a_failure() -> None:
    peer = FakePeer(1)

    def start(number: int, layout: str) -> SpreadPeer:
        if layout == "bad":
            raise PeerFailed(f"no memory for number {number}")
        return peer  # type: ignore[return-value]

    with engine("fake", {"one": "good", "two": "bad"}, start) as opened:
        assert opened.layouts == ("one",)
        assert opened.left_out == {"two": "no memory for number 1"}
    assert peer.is_closed
    with pytest.raises(PeerFailed, match=r"^one: no memory for number 0$"), engine("fake", {"one": "bad"}, start):
        pass
