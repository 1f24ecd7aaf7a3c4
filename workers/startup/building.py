"""Builds the engine of a leader from what it was asked to load."""

import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

from placement.model.part import Part
from placement.model.specs import ModelSpec
from placement.planning.residency import Residency
from placement.serving.admission import Limits
from placement.serving.offload.adoption import agree
from placement.serving.offload.orders import Names
from placement.serving.replica import ReplicaCore
from placement.serving.settings import Checks, CoreSettings
from placement.serving.step_plan import SchedulerLimits
from protos.codec.limits import read_limits
from protos.heterodyne.worker.v1 import worker_pb2 as pb
from workers.engine.engine import Engine
from workers.engine.types import Runner
from workers.startup.checks import CheckedLoad

CHECK_VARIABLE = "HETERODYNE_CHECK_STATE"
"""The environment variable that has an engine assert its own state whenever it becomes idle."""


def num_threads(checked: CheckedLoad) -> int:
    """Counts the threads that execute steps.

    The leader of a pipeline has one for each step that is on its way, and one for the next; every other rank has one.
    """
    num_stages = len(checked.roster.stages)
    return num_stages + 1 if num_stages > 1 and checked.leads else 1


def num_slots(request: pb.LoadRequest, part: Part) -> int:
    """Counts the slots of a rank's cache.

    A rank with a stripe has its own slots of every block, and one more for the KV that other ranks hold.
    """
    if part.stripe is None:
        return request.num_blocks * request.block_size
    return request.num_blocks * part.stripe.width + 1


def build_engine(
    runner: Runner,
    executor: ThreadPoolExecutor,
    *,
    request: pb.LoadRequest,
    model: ModelSpec,
    num_stages: int = 1,
    token_budget: int | None = None,
    residency: Residency | None = None,
    held: Mapping[int, Names] | None = None,
) -> Engine:
    """Builds the engine of a leader, which is not started yet.

    Args:
        token_budget: replaces that of ``request``.
        residency: where the keys and values are; None: the replica's own ranks hold all.
        held: the names of blocks that each attention worker has kept since the replica was started before, by worker.
    """
    limits = read_limits(request)
    settings = CoreSettings(
        limits=Limits(
            max_context_tokens=request.max_context_tokens, vocab_size=model.vocab_size, block_size=limits.block_size
        ),
        steps=SchedulerLimits(
            token_budget=token_budget or limits.token_budget,
            max_num_seqs=limits.max_num_seqs,
            num_batches=num_stages,
        ),
        num_blocks=request.num_blocks,
        residency=residency,
        prefix_cache=limits.prefix_cache,
        checks=Checks.AT_IDLE if os.environ.get(CHECK_VARIABLE) else Checks.NEVER,
    )
    core = ReplicaCore(settings)
    if residency is not None and held:
        agreed = agree(residency, held)
        core.adopt(agreed.names, stale=agreed.stale)
    return Engine(runner=runner, core=core, executor=executor)
