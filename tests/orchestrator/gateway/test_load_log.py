"""The line on the load: every ten seconds under load, and none without."""

import logging
from dataclasses import dataclass, field
from typing import cast

import pytest

from orchestrator.gateway.fleet.admission import Admission
from orchestrator.gateway.fleet.fleet import Fleet
from orchestrator.gateway.load_log import LoadLog
from protos.codec.log_record import record_of
from protos.heterodyne.worker.v1.worker_pb2 import LoadReport


@dataclass
class Reports:
    """The part of a fleet that is read."""

    second: int = 0
    num_waiting: int = 0
    last: dict[tuple[str, int], LoadReport] = field(default_factory=dict)

    def reports(self) -> dict[tuple[str, int], LoadReport]:
        return self.last

    def clock(self) -> float:
        return float(self.second)


@pytest.mark.parametrize("is_busy", [True, False])
async def test_load_is_logged_every_ten_seconds_while_there_is_any(
    is_busy: bool, caplog: pytest.LogCaptureFixture
) -> None:
    reports = Reports()
    log = LoadLog(cast(Fleet, reports), Admission(4, 4), clock=reports.clock)
    with caplog.at_level(logging.INFO):
        for second in range(25):
            reports.second = second
            report = LoadReport(free_blocks=75, total_blocks=100)
            if is_busy:
                report = LoadReport(
                    num_running=2, num_waiting=1, free_blocks=75, total_blocks=100, steps=second,
                    prompt_tokens=50 * second, output_tokens=10 * second, prefix_queries=4 * second, prefix_hits=second,
                )  # fmt: skip
            reports.last = {("replica-0", 1): report, ("replica-1", 1): report}
            log.sample()
    lines = [record_of(record, "gateway") for record in caplog.records]
    assert len(lines) == (2 if is_busy else 0)
    for line in lines:
        assert line.event == "throughput" and line.fields == {
            "running": 4, "waiting": 2, "prompt_tokens_per_s": 100.0, "generated_tokens_per_s": 20.0,
            "kv_cache_usage": 0.25, "prefix_cache_hit_rate": 0.25,
        }  # fmt: skip
        assert line.message == (
            "Load: 4 running, 2 waiting, prompts 100.0 tokens/s, generation 20.0 tokens/s, KV cache 25.0% used, "
            "prefix cache hit rate 25.0%"
        )
    rates = log.rates("replica-0", 1)
    assert rates is not None and rates.generated_tokens_per_s == (10.0 if is_busy else 0.0)
    assert log.rates("replica-0", 2) is None
