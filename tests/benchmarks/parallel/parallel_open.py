"""Opens one rank of a replica in this process: joins the others, loads its shard, measures what ranks measure."""

import json
import socket
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from kernels.select import kernels_for
from placement.model.hf import read_model_spec
from placement.model.specs import ModelSpec
from placement.model.weights import shard_tensors
from placement.planning.layout import ReplicaLayout, StageLayout, cut
from protos.heterodyne.worker.v1 import worker_pb2 as pb
from tests.benchmarks.parallel.hosts.parallel_wire import Opening
from tests.benchmarks.parallel.parallel_sums import SwitchedGroup
from workers.engine.types import Runner
from workers.host.device import open_device
from workers.model.kv_cache import allocate_kv_cache
from workers.replica.follower import Follower
from workers.replica.followers import Followers
from workers.replica.membership import Membership
from workers.replica.roster import Roster
from workers.sequence_parallel.sharing import SequenceSharing
from workers.startup.building import num_slots
from workers.startup.checkpoint import load_weights
from workers.step.runner import ModelRunner

_DTYPE = torch.bfloat16
_EPOCH = 1
_READY_S = 300.0
_END_S = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenRank:
    """A rank that runs.

    Attributes:
        leading: what the leader's steps are prepared by.
        thread: where they are executed.
        group: the ranks of its stage; None: there are no others.
    """

    runner: ModelRunner
    leading: Runner
    thread: ThreadPoolExecutor
    membership: Membership | None
    follower: Follower | None
    sharing: SequenceSharing | None
    group: SwitchedGroup | None
    num_stages: int
    block_size: int

    def close(self) -> None:
        """Ends its threads and connections."""
        if self.follower is not None:
            self.follower.stop()
            self.follower.thread.join(_END_S)
        if self.membership is not None:
            self.membership.leave("the measurement ends")
        self.thread.shutdown()


def open_rank(listener: socket.socket, opening: Opening) -> OpenRank:
    """All ranks of the replica do at the same time.

    Raises:
        PeerFailed: another rank did not come, or failed.
    """
    model = read_model_spec(json.loads((Path(opening.model) / "config.json").read_text()))
    roster = _roster(model, opening)
    num_stages = len(roster.stages)
    membership = None if len(roster.parts) == 1 else Membership.join(listener, roster, epoch=_EPOCH)
    torch_device, kernels = torch.device("cpu"), kernels_for("cpu")
    sharing = (
        None
        if membership is None
        else membership.sharing(model, kernels, _DTYPE, torch_device, token_budget=opening.token_budget)
    )
    group = None if membership is None or sharing is not None else SwitchedGroup(membership.group)
    followers = None if membership is None or roster.rank else membership.followers()
    runner = _load(model, roster, opening, group=group, membership=membership, sharing=sharing, team=followers)
    # The leader of a pipeline has a thread for each step that is on its way, and one for the next.
    thread = ThreadPoolExecutor(num_stages + 1 if num_stages > 1 and not roster.rank else 1)
    follower, leading = None, _leading(runner, membership, followers)
    if membership is not None:
        _measure(membership, runner, sharing, thread, opening)
        if followers is None:
            limits = {"vocab_size": model.vocab_size, "slot_limit": opening.num_slots}
            follower = membership.follower(runner, thread, device=torch_device, **limits)
            follower.thread.start()
    return OpenRank(
        runner=runner, leading=leading, thread=thread, membership=membership, follower=follower, sharing=sharing,
        group=group, num_stages=num_stages, block_size=opening.block_size,
    )  # fmt: skip


def _roster(model: ModelSpec, opening: Opening) -> Roster:
    devices = iter(range(len(opening.addresses)))
    layout = ReplicaLayout(
        stages=tuple(
            StageLayout(
                devices=tuple(next(devices) for _ in weights),
                weights=tuple(weights),
                split=opening.split,
                speed=sum(weights),
            )
            for weights in opening.stages
        )
    )
    stages = cut(model, layout, block_size=opening.block_size, field="replica")
    return Roster(
        rank=opening.rank,
        parts=tuple(part for stage in stages for part in stage),
        addresses=tuple((host, port) for host, port in opening.addresses),
        token=bytes.fromhex(opening.token),
    )


def _load(
    model: ModelSpec,
    roster: Roster,
    opening: Opening,
    *,
    group: SwitchedGroup | None,
    membership: Membership | None,
    sharing: SequenceSharing | None,
    team: Followers | None,
) -> ModelRunner:
    """The rank's shard, and an empty cache."""
    device, part = open_device("cpu", 1), roster.part
    slices = shard_tensors(model, part)
    weights = load_weights(Path(opening.model), slices, _DTYPE, device.torch_device, lambda *_: None, None)
    sizes = pb.LoadRequest(num_blocks=opening.num_slots // opening.block_size, block_size=opening.block_size)
    cache = allocate_kv_cache(
        model, num_slots=num_slots(sizes, part), dtype=_DTYPE, device=device, layers=part.layers, kv_heads=part.kv_heads
    )
    return ModelRunner(
        model=model,
        weights=weights,
        cache=cache,
        device=device.torch_device,
        kernels=kernels_for("cpu"),
        part=part,
        group=group if group is not None or membership is None else membership.group,
        team=team,
        sharing=sharing,
    )


def _leading(runner: ModelRunner, membership: Membership | None, followers: Followers | None) -> Runner:
    if membership is None or followers is None:
        return runner
    return membership.leading(runner, followers, torch.device("cpu"))


def _measure(
    membership: Membership,
    runner: ModelRunner,
    sharing: SequenceSharing | None,
    thread: ThreadPoolExecutor,
    opening: Opening,
) -> None:
    """What a worker's ranks measure when they start, by the same functions, on the thread that computes."""
    sizes = {"token_budget": opening.token_budget, "num_slots": opening.num_slots}
    thread.submit(membership.get_ready).result(_READY_S)
    thread.submit(membership.measure_runner, runner, sharing, **sizes).result(_READY_S)
