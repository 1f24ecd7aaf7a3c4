"""Logs a line on the load every ten seconds while there is any, and knows the rates that the status shows."""

import asyncio
import logging
import time
from collections.abc import Callable, Mapping

from orchestrator.gateway.fleet.admission import Admission
from orchestrator.gateway.fleet.fleet import Fleet
from orchestrator.gateway.fleet.throughput import NOTHING, WINDOW_S, Rates, ReplicaKey, Throughput
from protos.codec.log_record import said
from protos.heterodyne.worker.v1 import worker_pb2

logger = logging.getLogger(__name__)

_SAMPLE_S = 1.0


class LoadLog:
    """Samples the load of all replicas. Lives on one event loop."""

    def __init__(self, fleet: Fleet, admission: Admission, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._fleet = fleet
        self._admission = admission
        self._clock = clock
        self._throughput = Throughput()
        self._logged_s = clock()

    async def run(self) -> None:
        """Samples for as long as the gateway lives."""
        while True:
            self.sample()
            await asyncio.sleep(_SAMPLE_S)

    def rates(self, replica: str, epoch: int) -> Rates | None:
        """Returns what a replica did in the last seconds; None where that is not known."""
        return self._throughput.rates((replica, epoch))

    def sample(self) -> None:
        """Takes in what replicas reported last, and logs the load where a line is due."""
        now_s, reports = self._clock(), self._fleet.reports()
        self._throughput.sample(now_s, reports)
        if now_s - self._logged_s >= WINDOW_S:
            self._logged_s = now_s
            if self._throughput.was_busy or self._admission.queued or self._fleet.num_waiting:
                self._log(reports)

    def _log(self, reports: Mapping[ReplicaKey, worker_pb2.LoadReport]) -> None:
        known = [rates for key in reports if (rates := self._throughput.rates(key)) is not None]
        running = sum(report.num_running for report in reports.values())
        waiting = sum(report.num_waiting for report in reports.values())
        waiting += self._admission.queued + self._fleet.num_waiting
        total = sum(report.total_blocks for report in reports.values())
        used = total - sum(report.free_blocks for report in reports.values())
        words = [f"{running} running", f"{waiting} waiting"]
        fields: dict[str, object] = {"running": running, "waiting": waiting}
        if known:  # else none has lived for long enough
            rates = sum(known, NOTHING)
            prompt, generated = rates.prompt_tokens_per_s, rates.generated_tokens_per_s
            words += [f"prompts {prompt:.1f} tokens/s", f"generation {generated:.1f} tokens/s"]
            fields |= {"prompt_tokens_per_s": round(prompt, 1), "generated_tokens_per_s": round(generated, 1)}
        if total:
            words.append(f"KV cache {used / total:.1%} used")
            fields["kv_cache_usage"] = round(used / total, 4)
        if known and (hit_rate := sum(known, NOTHING).prefix_cache_hit_rate) is not None:
            words.append(f"prefix cache hit rate {hit_rate:.1%}")
            fields["prefix_cache_hit_rate"] = round(hit_rate, 4)
        logger.info("Load: %s", ", ".join(words), extra=said("throughput", **fields))
