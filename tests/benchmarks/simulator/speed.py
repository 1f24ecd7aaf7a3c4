"""Measures how fast simulations are: an hour of a trace on many replicas, and a few replicas that are full."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

from placement.planning.limits import ReplicaLimits
from placement.serving.admission import Limits
from placement.serving.routing.router import Router
from placement.serving.settings import CoreSettings
from placement.serving.step_plan import SchedulerLimits
from placement.simulation.dispatch import RouterDispatcher
from placement.simulation.load import OpenLoop, at_random
from placement.simulation.replica import SimulatedReplica
from placement.simulation.results import Result
from placement.simulation.simulation import Fleet, Simulation
from placement.simulation.step_time import LinearSteps

LIMITS = ReplicaLimits(block_size=16, token_budget=2048, max_num_seqs=128, prefix_cache=False)
_STEPS = LinearSteps(fixed_s=0.025, decode_s=0.0001, prefill_s=0.0001)


@dataclass(frozen=True, slots=True, kw_only=True)
class Speed:
    """How long a simulation took.

    Attributes:
        cpu_s: seconds of its one thread, whatever else ran on the machine.
    """

    result: Result
    cpu_s: float

    @property
    def events_per_s(self) -> float:
        return self.result.num_events / self.cpu_s

    @property
    def tokens_per_s(self) -> float:
        return sum(outcome.num_tokens for outcome in self.result.outcomes) / self.cpu_s


def measure(sizes: Sequence[tuple[int, int]], *, num_replicas: int, rate: float, seed: int = 1) -> Speed:
    """Serves requests of these sizes that come at random, routed and bound as by the gateway; each replica is alone."""
    settings = CoreSettings(
        limits=Limits(max_context_tokens=1 << 20, vocab_size=1 << 31, block_size=LIMITS.block_size),
        steps=SchedulerLimits(token_budget=LIMITS.token_budget, max_num_seqs=LIMITS.max_num_seqs),
        num_blocks=1 << 14,
        prefix_cache=LIMITS.prefix_cache,
    )
    replicas = [SimulatedReplica(name=f"r{i:03d}", settings=settings, steps=_STEPS) for i in range(num_replicas)]
    dispatcher = RouterDispatcher(Router(LIMITS, mode="never"), LIMITS)
    load = OpenLoop(at_random(sizes, rate=rate, seed=seed))
    began_s = time.process_time()
    result = Simulation(Fleet(replicas=replicas), load, dispatcher).run()
    return Speed(result=result, cpu_s=time.process_time() - began_s)
