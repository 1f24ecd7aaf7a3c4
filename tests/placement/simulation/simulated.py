"""Fleets that simulations of tests serve with."""

from collections.abc import Sequence

from placement.planning.limits import ReplicaLimits
from placement.planning.plan import Role
from placement.serving.admission import Limits
from placement.serving.routing.router import Disaggregation, Router
from placement.serving.settings import Checks, CoreSettings
from placement.serving.step_plan import SchedulerLimits
from placement.simulation.dispatch import RouterDispatcher
from placement.simulation.load import Load
from placement.simulation.network import Interface
from placement.simulation.replica import SimulatedReplica
from placement.simulation.results import Result
from placement.simulation.simulation import Fleet, Simulation
from placement.simulation.step_time import LinearSteps, StepModel
from placement.simulation.transfers import KvTraffic

LIMITS = ReplicaLimits(block_size=16, token_budget=256, max_num_seqs=32, prefix_cache=False)
KV_BYTES = 1000
LINK_BYTES_PER_S = 1e8
STEPS = LinearSteps(fixed_s=0.01, decode_s=0.0005, prefill_s=0.0005)


def replica(
    name: str,
    role: Role = Role.MIXED,
    *,
    steps: StepModel = STEPS,
    limits: ReplicaLimits = LIMITS,
    num_blocks: int = 500,
    lead_s: float = 0.0,
    num_batches: int = 1,
) -> SimulatedReplica:
    settings = CoreSettings(
        limits=Limits(max_context_tokens=1 << 20, vocab_size=1 << 31, block_size=limits.block_size),
        steps=SchedulerLimits(
            token_budget=limits.token_budget, max_num_seqs=limits.max_num_seqs, num_batches=num_batches
        ),
        num_blocks=num_blocks,
        prefix_cache=limits.prefix_cache,
        checks=Checks.ALWAYS,
    )
    return SimulatedReplica(name=name, settings=settings, steps=steps, role=role, lead_s=lead_s)


def fleet(replicas: Sequence[SimulatedReplica], *, num_layers: int = 1) -> Fleet:
    interface = Interface(send_bytes_per_s=LINK_BYTES_PER_S, receive_bytes_per_s=LINK_BYTES_PER_S)
    return Fleet(
        replicas=replicas,
        interfaces={it.name: interface for it in replicas},
        latency_s=0.001,
        traffic=KvTraffic(bytes_per_token=KV_BYTES, num_layers=num_layers),
    )


def serve(
    replicas: Sequence[SimulatedReplica],
    load: Load,
    *,
    mode: Disaggregation = "auto",
    limits: ReplicaLimits = LIMITS,
    num_layers: int = 1,
    keeps_gaps: bool = False,
) -> Result:
    dispatcher = RouterDispatcher(Router(limits, mode=mode, kv_bytes_per_token=KV_BYTES), limits)
    return Simulation(fleet(replicas, num_layers=num_layers), load, dispatcher, keeps_gaps=keeps_gaps).run()
