"""When the next step is put together."""

from workers.engine.pacing import Pace


def test_a_step_of_a_size_not_seen_yet_leaves_no_time() -> None:
    pace = Pace()
    pace.prepared(num_tokens=4, took_s=0.001, now_s=10.0)
    assert pace.slack_s(10.0) == 0.0


def test_the_next_step_waits_until_shortly_before_the_end_of_this_one() -> None:
    pace = Pace()
    pace.prepared(num_tokens=4, took_s=0.001, now_s=10.0)
    pace.executed(num_tokens=4, took_s=0.1, now_s=10.1)
    pace.prepared(num_tokens=4, took_s=0.001, now_s=10.1)
    assert 0.09 < pace.slack_s(10.1) < 0.1
    assert 0.04 < pace.slack_s(10.15) < 0.05
    assert pace.slack_s(10.2) == 0.0


def test_the_clock_of_a_step_starts_when_the_one_before_it_ends() -> None:
    pace = Pace()
    for at in (10.0, 10.1):
        pace.prepared(num_tokens=4, took_s=0.001, now_s=at)
        pace.executed(num_tokens=4, took_s=0.1, now_s=at + 0.1)
    pace.prepared(num_tokens=4, took_s=0.001, now_s=10.2)
    pace.prepared(num_tokens=4, took_s=0.001, now_s=10.25)
    pace.executed(num_tokens=4, took_s=0.1, now_s=10.3)
    assert 0.09 < pace.slack_s(10.3) < 0.1


def test_slow_preparation_starts_earlier() -> None:
    slow, quick = Pace(), Pace()
    for pace, took_s in ((slow, 0.02), (quick, 0.001)):
        for _ in range(20):
            pace.prepared(num_tokens=1, took_s=took_s, now_s=0.0)
            pace.executed(num_tokens=1, took_s=0.1, now_s=0.1)
        pace.prepared(num_tokens=1, took_s=took_s, now_s=0.1)
    assert slow.slack_s(0.1) < quick.slack_s(0.1) - 0.03


def test_nothing_on_its_way_leaves_no_time() -> None:
    assert Pace().slack_s(5.0) == 0.0


def test_steps_that_are_lost_are_waited_for_no_more() -> None:
    pace = Pace()
    pace.prepared(num_tokens=4, took_s=0.001, now_s=10.0)
    pace.executed(num_tokens=4, took_s=5.0, now_s=15.0)
    pace.prepared(num_tokens=4, took_s=0.001, now_s=15.0)
    assert pace.slack_s(15.0) > 4.0
    pace.lost()
    assert pace.slack_s(15.0) == 0.0
    pace.prepared(num_tokens=8, took_s=0.001, now_s=20.0)
    pace.executed(num_tokens=8, took_s=0.1, now_s=20.1)
