"""A rank's membership in its replica: its connections with the other ranks, and its role as leader or follower."""

import logging
import socket
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial

import torch

from kernels.protocol import Kernels
from placement.measured.collectives import unmeasured
from placement.measured.measurements import NOTHING_MEASURED, StageMeasurements
from placement.model.specs import ModelSpec
from protos.codec.log_record import said
from protos.heterodyne.worker.v1 import worker_pb2 as pb
from workers.collectives.backends import Library, open_torch_group
from workers.collectives.group import TensorGroup
from workers.collectives.measure import measure
from workers.collectives.nccl_group import NcclGroup
from workers.collectives.torch_group import TorchGroup
from workers.engine.types import Runner
from workers.replica.agreement import MOST_BYTES, RankFacts, check_alike, silent
from workers.replica.follower import Follower, StageTask
from workers.replica.followers import Followers
from workers.replica.kv_follower import KvFollower
from workers.replica.kv_leader import KvLeader
from workers.replica.overlap import measure_overlap
from workers.replica.patience import UNMEASURED_S, PatientRunner
from workers.replica.pipeline import PipelineRunner
from workers.replica.roster import Roster
from workers.replica.stages import FirstStage, LaterStage, StageLinks
from workers.sequence_parallel.sharing import SequenceSharing
from workers.step.runner import ModelRunner
from workers.transport.errors import BadFrame, PeerFailed
from workers.transport.frames import Kind
from workers.transport.link import Link, receive, send
from workers.transport.mesh import Channel, Members, Mesh, join
from workers.transport.pulse import Pulse

logger = logging.getLogger(__name__)

HOST = torch.device("cpu")

EnterPhase = Callable[[pb.LoadPhase.ValueType], None]
"""Is told what a rank does until it is ready."""

JOIN_S = 30.0
"""How long the ranks may take to connect; the controller tells all of them to at the same time."""


class Membership:
    """The connections of a rank with all others, from joining to leaving.

    Attributes:
        group: the ranks of this rank's stage.
        pulse: watches all ranks.
        steps: the links on which the leader announces steps, by rank.
    """

    def __init__(self, *, mesh: Mesh, roster: Roster) -> None:
        """Takes ownership of the connections, and starts the pulse."""
        self._mesh = mesh
        self._roster = roster
        self.pulse = Pulse(mesh.of(Channel.PULSE))
        self.steps = mesh.of(Channel.STEPS)
        self._compute = mesh.of(Channel.COMPUTE)
        self._everyone = self._group(tuple(range(len(roster.parts))))
        self.group = self._group(roster.stages[roster.stage])
        self._measured = NOTHING_MEASURED
        self._torch: TorchGroup | None = None
        self._followers: Followers | None = None
        self.pulse.start()

    @classmethod
    def join(
        cls, listener: socket.socket, roster: Roster, *, epoch: int, go_on: Callable[[], None] = lambda: None
    ) -> "Membership":
        """Connects with all other ranks. Raises PeerFailed where one does not come, and what ``go_on`` raises."""
        members = Members(rank=roster.rank, addresses=roster.addresses, epoch=epoch, token=roster.token)
        return cls(mesh=join(listener, members, deadline_s=time.monotonic() + JOIN_S, alive=go_on), roster=roster)

    def agree(self, own: RankFacts, *, go_on: Callable[[], None] = lambda: None) -> tuple[RankFacts, ...]:
        """Tells all other ranks what this one is, and checks that all are alike where they must be.

        All ranks call it at the same time, before they use the connections for anything else.

        Returns:
            What all ranks are, in rank order.

        Raises:
            RanksDiffer: they are not alike.
            PeerFailed: a rank was lost, did not answer in time, or raised RanksDiffer first, which is the cause then.
        """
        deadline_s = time.monotonic() + JOIN_S

        def alive() -> None:
            go_on()
            self.pulse.check()

        facts = {self._roster.rank: own}
        try:
            for link in self._compute.values():
                send(link, Kind.FACTS, own.pack(), deadline_s=deadline_s, alive=alive)
            for rank, link in self._compute.items():
                facts[rank] = _receive_facts(rank, link, deadline_s, alive)
        except PeerFailed as error:
            raise self.pulse.reason(error) from error
        ranks = tuple(facts[rank] for rank in sorted(facts))
        check_alike(ranks)
        if self._roster.rank == 0:
            _log_mixed(ranks)
        return ranks

    def _group(self, ranks: tuple[int, ...]) -> TensorGroup:
        """Makes a group of some ranks, over the COMPUTE links."""
        me = self._roster.rank
        return TensorGroup(
            rank=ranks.index(me),
            links={place: self._compute[rank] for place, rank in enumerate(ranks) if rank != me},
            pulse=self.pulse,
            widths=[len(self._roster.parts[rank].vocab_rows) for rank in ranks],
            table=unmeasured(len(ranks)),
            sums=len(ranks) > 1 and not self._roster.stripes,
        )

    def sharing(
        self, model: ModelSpec, kernels: Kernels, dtype: torch.dtype, device: torch.device, *, token_budget: int
    ) -> SequenceSharing | None:
        """Makes this rank's side of sharing sequences with the others, or returns None where the ranks share none."""
        if not self._roster.stripes:
            return None
        return SequenceSharing(
            model=model,
            stripes=self._roster.stripes,
            group=self.group,
            kernels=kernels,
            dtype=dtype,
            device=device,
            token_budget=token_budget,
        )

    def get_ready(
        self,
        go_on: Callable[[], None] = lambda: None,
        device: torch.device = HOST,
        enter: EnterPhase = lambda _: None,
    ) -> None:
        """Waits until all ranks are loaded, and measures which all-reduce is fastest. On the thread that computes.

        Args:
            go_on: is called again and again during the wait for other ranks, and raises what ends it.
            device: the device that this rank computes on.
            enter: is told what this rank does now.

        Raises PeerFailed, and what ``go_on`` raises.
        """
        self.wait_at_most(UNMEASURED_S)
        enter(pb.LOAD_PHASE_COMPILE)
        self.group.compile_all_reduce()  # before the barrier, where ranks wait for each other without a deadline
        enter(pb.LOAD_PHASE_CONNECT)
        self._everyone.barrier(go_on)
        enter(pb.LOAD_PHASE_MEASURE)
        if self.group.sums:
            self._add_torch(device)
            self.group.use(measure(self.group))
            self._measured = replace(self._measured, sums=self.group.table.measured)
            self._log_links()

    def _log_links(self) -> None:
        """Logs what was measured, once for the ranks of a stage; the whole table is in the service's status too."""
        stage, table = self._roster.stage, self.group.table
        if self.group.rank == 0:
            latency_ms, gb_per_s = 1e3 * table.latency_s, 1e-9 * table.bytes_per_s
            extra = said("links", stage=stage, latency_ms=round(latency_ms, 3), gb_per_s=round(gb_per_s, 3))
            logger.info("Links measured: %.2g ms, %.2g GB/s.", latency_ms, gb_per_s, extra=extra)
        logger.debug("Sums measured: %s", table, extra=said("sums", stage=stage, table=str(table)))

    def _add_torch(self, device: torch.device) -> None:
        """Adds a backend of torch.distributed to the all-reduces; on GPUs it replaces all others."""
        host = self._roster.addresses[self._roster.rank][0]
        self._torch = open_torch_group(self.group, host=host, device=device)
        if isinstance(self._torch, NcclGroup):
            self.group.use_on_device(Library.NCCL.value, self._torch, device)
        elif self._torch is not None:
            self.group.add_all_reduce(Library.GLOO.value, self._torch)

    def measure_runner(
        self,
        runner: ModelRunner,
        sharing: SequenceSharing | None,
        *,
        token_budget: int,
        num_slots: int,
        go_on: Callable[[], None] = lambda: None,
        enter: EnterPhase = lambda _: None,
    ) -> None:
        """Measures what depends on the runner: how the ranks share sequences best, or which steps overlap pays for.

        Called after :meth:`get_ready`, on the same thread.

        Args:
            runner: the runner of this rank, whose cache has ``num_slots`` slots.
            sharing: this rank's side of sharing sequences; None where the ranks share none.
            token_budget: the most tokens of a step.
            go_on: is called again and again during the wait for the ranks of other stages.
            enter: is told what this rank does now.

        Raises PeerFailed, and what ``go_on`` raises.
        """
        if sharing is not None:
            sharing.measure()
            self._measured = replace(self._measured, exchange=sharing.measured)
            extra = said("sequence_sharing", speeds=str(sharing.speeds))
            logger.debug("The exchange of sequences measured: %s", sharing.speeds, extra=extra)
        elif self.group.sums and runner.can_overlap:
            enter(pb.LOAD_PHASE_COMPILE)
            self._measure_overlap(runner, token_budget, num_slots, partial(enter, pb.LOAD_PHASE_MEASURE))
        self._everyone.barrier(go_on)  # a rank that is done first must not wait for the others with a deadline

    def _measure_overlap(
        self, runner: ModelRunner, token_budget: int, num_slots: int, compiled: Callable[[], None]
    ) -> None:
        self.group.agree_on_tiles(runner.is_program)
        runner.overlap = measure_overlap(
            runner, self.group, token_budget=token_budget, num_slots=num_slots, compiled=compiled
        )
        self._measured = replace(self._measured, overlap=runner.overlap.measured)
        extra = said("overlap", stage=self._roster.stage, table=str(runner.overlap))
        logger.debug("Steps in one micro-batch and in two measured: %s", runner.overlap, extra=extra)

    @property
    def measured(self) -> StageMeasurements:
        """Returns what was measured of this rank's stage; only its first rank has it, as all measure the same."""
        return NOTHING_MEASURED if self.group.rank else self._measured

    def followers(self) -> Followers:
        """Makes the leader's side of the ranks that follow it. Called once, by the leader; :meth:`leave` ends it."""
        beside = self._roster.stages[0]
        begins = {rank: link for rank, link in self._compute.items() if rank in beside}
        self._followers = Followers(steps=self.steps, begins=begins, pulse=self.pulse)
        return self._followers

    def kv_leader(self) -> KvLeader:
        """Makes the leader's side of transfers of keys and values. Called once, by the leader."""
        return KvLeader(self._mesh.of(Channel.KV), self.pulse)

    def kv_follower(self, model: ModelSpec, *, slot_limit: int) -> KvFollower:
        """Makes the side of a rank that takes part in them as the leader says. Called once, by any other rank."""
        leader = self._mesh.of(Channel.KV)[0]
        return KvFollower(leader=leader, pulse=self.pulse, model=model, slot_limit=slot_limit)

    def leading(self, runner: ModelRunner, followers: Followers, device: torch.device) -> PatientRunner:
        """Returns what runs the steps of the leader's engine, given the runner of the leader's own part."""
        leading: Runner = runner
        if len(self._roster.stages) > 1:
            links = self._stage_links(runner)
            leading = PipelineRunner(runner=runner, followers=followers, group=self.group, links=links, device=device)
        return PatientRunner(leading, self.wait_at_most)

    def wait_at_most(self, limit_s: float) -> None:
        """Sets how long this rank waits for others that are alive; a leader tells the others, with the next step."""
        for group in (self._everyone, self.group):
            group.wait_at_most(limit_s)
        if self._torch is not None:
            self._torch.wait_at_most(limit_s)
        if self._followers is not None:
            self._followers.wait_at_most(limit_s)

    def follower(
        self,
        runner: ModelRunner,
        executor: ThreadPoolExecutor,
        *,
        vocab_size: int,
        slot_limit: int,
        device: torch.device,
    ) -> Follower:
        """Makes the loop by which this rank follows the leader."""
        return Follower(
            runner=runner,
            task=self._task(runner, device),
            leader=self.steps[0],
            pulse=self.pulse,
            executor=executor,
            vocab_size=vocab_size,
            slot_limit=slot_limit,
            wait_at_most=self.wait_at_most,
        )

    def _task(self, runner: ModelRunner, device: torch.device) -> StageTask:
        links, stages = self._stage_links(runner), self._roster.stages
        if self._roster.stage:
            is_last = self._roster.stage == len(stages) - 1
            return LaterStage(runner=runner, links=links, is_last=is_last, device=device)
        return FirstStage(runner=runner, leader=self._compute[0], group=self.group, links=links, device=device)

    def _stage_links(self, runner: ModelRunner) -> StageLinks:
        links = self._mesh.of(Channel.STAGES)
        source: Link | None = None if self._roster.source is None else links[self._roster.source]
        return StageLinks(
            source=source,
            targets=[links[rank] for rank in self._roster.targets],
            pulse=self.pulse,
            group=self.group,
            hidden_size=runner.hidden_size,
            dtype=runner.dtype,
        )

    def leave(self, cause: str) -> None:
        """Tells the other ranks why this one leaves, and closes all connections."""
        self.pulse.fail(cause)
        if self._followers is not None:
            self._followers.close()
        if self._torch is not None:
            self._torch.close()
        self._mesh.close()


def _receive_facts(rank: int, link: Link, deadline_s: float, alive: Callable[[], None]) -> RankFacts:
    """Receives what a rank says of itself. Raises PeerFailed, and RanksDiffer for what cannot be understood."""
    try:
        return RankFacts.unpack(receive(link, Kind.FACTS, deadline_s=deadline_s, alive=alive, max_bytes=MOST_BYTES))
    except BadFrame as error:
        raise silent(rank, str(error)) from error


def _log_mixed(ranks: Sequence[RankFacts]) -> None:
    """Says so where ranks have different targets."""
    if len({rank.target for rank in ranks}) == 1:
        return
    targets = ", ".join(f"rank {number} {rank.target}" for number, rank in enumerate(ranks))
    extra = said("mixed_targets", targets=targets, dtype=ranks[0].values.get("dtype", ""))
    logger.info("The ranks have different targets: %s.", targets, extra=extra)
