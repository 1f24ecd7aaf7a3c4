"""Rates of the last seconds, from counters that only grow."""

from orchestrator.gateway.fleet.throughput import NOTHING, Throughput
from protos.heterodyne.worker.v1.worker_pb2 import LoadReport

KEY = ("replica-0", 1)


def report(second: int, **fields: int) -> LoadReport:
    return LoadReport(prompt_tokens=100 * second, output_tokens=20 * second, steps=second, **fields)


def test_rates_are_those_of_the_last_seconds_alone() -> None:
    throughput = Throughput(10.0)
    for second in range(30):
        fast = report(second) if second < 15 else report(15 + 2 * (second - 15))
        throughput.sample(float(second), {KEY: fast})
        assert (throughput.rates(KEY) is None) == (second < 10), "not known before"
    rates = throughput.rates(KEY)
    assert rates is not None
    assert (rates.prompt_tokens_per_s, rates.generated_tokens_per_s) == (200.0, 40.0)
    assert rates.prefix_cache_hit_rate is None, "nothing was looked up"


def test_the_hit_rate_is_that_of_what_was_looked_up() -> None:
    throughput = Throughput(1.0)
    throughput.sample(0.0, {KEY: LoadReport(prefix_queries=100, prefix_hits=100)})
    throughput.sample(1.0, {KEY: LoadReport(prefix_queries=300, prefix_hits=150)})
    rates = throughput.rates(KEY)
    assert rates is not None and rates.prefix_cache_hit_rate == 0.25
    assert sum([rates, rates], NOTHING).prefix_cache_hit_rate == 0.25


def test_another_incarnation_is_not_measured_by_what_the_last_one_counted() -> None:
    throughput = Throughput(1.0)
    throughput.sample(0.0, {KEY: report(1000)})
    again = ("replica-0", 2)
    throughput.sample(1.0, {again: report(1)})
    assert throughput.rates(KEY) is None and throughput.rates(again) is None


def test_it_was_busy_where_something_ran_waited_or_was_computed() -> None:
    for busy in (LoadReport(num_running=1), LoadReport(num_waiting=1), LoadReport(steps=1)):
        throughput = Throughput(1.0)
        throughput.sample(0.0, {KEY: LoadReport()})
        assert not throughput.was_busy
        throughput.sample(0.5, {KEY: busy})
        assert throughput.was_busy
        for second in range(1, 4):
            throughput.sample(float(second), {KEY: LoadReport(steps=busy.steps)})
        assert not throughput.was_busy
