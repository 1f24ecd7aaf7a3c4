"""A rank's connections with the others of its replica, and what it does with them: lead, or follow."""

import logging
import socket
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import torch

from kernels.protocol import Kernels
from placement.measured.collectives import unmeasured
from placement.measured.measurements import NOTHING_MEASURED, StageMeasurements
from placement.model.specs import ModelSpec
from workers.collectives.backends import Library, open_torch_group
from workers.collectives.group import TensorGroup
from workers.collectives.measure import measure
from workers.collectives.nccl_group import NcclGroup
from workers.collectives.torch_group import TorchGroup
from workers.engine.types import Runner
from workers.replica.follower import Duty, Follower
from workers.replica.followers import Followers
from workers.replica.overlap import measure_overlap
from workers.replica.pipeline import PipelineRunner
from workers.replica.roster import Roster
from workers.replica.stages import FirstStage, Hands, LaterStage
from workers.sequence_parallel.sharing import SequenceSharing
from workers.step.runner import ModelRunner
from workers.transport.link import Link
from workers.transport.mesh import Channel, Members, Mesh, join
from workers.transport.pulse import Pulse

logger = logging.getLogger(__name__)

HOST = torch.device("cpu")

JOIN_S = 30.0
"""Longest until all ranks have connected: they are told to at the same time."""


class Membership:
    """The connections of a rank with all others, from joining to its end.

    Attributes:
        group: the ranks of its stage.
        pulse: watches all ranks.
        steps: links by which the leader announces steps, by rank.
    """

    def __init__(self, *, mesh: Mesh, roster: Roster) -> None:
        """Takes the connections over, and begins to beat."""
        self._mesh = mesh
        self._roster = roster
        self.pulse = Pulse(mesh.of(Channel.PULSE))
        self.steps = mesh.of(Channel.STEPS)
        self._compute = mesh.of(Channel.COMPUTE)
        self._everyone = self._group(tuple(range(len(roster.parts))))
        self.group = self._group(roster.stages[roster.stage])
        self._measured = NOTHING_MEASURED
        self._torch: TorchGroup | None = None
        self.pulse.start()

    @classmethod
    def join(
        cls, listener: socket.socket, roster: Roster, *, epoch: int, go_on: Callable[[], None] = lambda: None
    ) -> "Membership":
        """Connect with all other ranks. Raises PeerFailed where one does not come, and what ``go_on`` raises."""
        members = Members(rank=roster.rank, addresses=roster.addresses, epoch=epoch, token=roster.token)
        return cls(mesh=join(listener, members, deadline_s=time.monotonic() + JOIN_S, go_on=go_on), roster=roster)

    def _group(self, ranks: tuple[int, ...]) -> TensorGroup:
        me = self._roster.rank
        return TensorGroup(
            rank=ranks.index(me),
            links={at: self._compute[rank] for at, rank in enumerate(ranks) if rank != me},
            pulse=self.pulse,
            widths=[len(self._roster.parts[rank].vocab_rows) for rank in ranks],
            table=unmeasured(len(ranks)),
            sums=len(ranks) > 1 and not self._roster.stripes,
        )

    def sharing(
        self, model: ModelSpec, kernels: Kernels, dtype: torch.dtype, device: torch.device, *, token_budget: int
    ) -> SequenceSharing | None:
        """With the ranks that share sequences with this one, where some do."""
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

    def get_ready(self, go_on: Callable[[], None] = lambda: None, device: torch.device = HOST) -> None:
        """Once all ranks are loaded, measures how they sum best. On the thread that computes, on ``device``.

        Raises PeerFailed, and what ``go_on`` raises while it waits for others.
        """
        self.group.compile_sums()  # before they meet: for each other they wait as long as it takes
        self._everyone.meet(go_on)
        if self.group.sums:
            self._add_torch(device)
            self.group.use(measure(self.group))
            self._measured = replace(self._measured, sums=self.group.table.measured)
            logger.info("sums stage=%d %s", self._roster.stage, self.group.table)

    def _add_torch(self, device: torch.device) -> None:
        """Has a backend of torch.distributed among the ways to sum: on GPUs, as the only one."""
        host = self._roster.addresses[self._roster.rank][0]
        self._torch = open_torch_group(self.group, host=host, device=device)
        if isinstance(self._torch, NcclGroup):
            self.group.give_to(Library.NCCL.value, self._torch, device)
        elif self._torch is not None:
            self.group.also(Library.GLOO.value, self._torch)

    def measure_runner(
        self,
        runner: ModelRunner,
        sharing: SequenceSharing | None,
        *,
        token_budget: int,
        num_slots: int,
        go_on: Callable[[], None] = lambda: None,
    ) -> None:
        """Then measures how its ranks share sequences best, or which steps they overlap. As :meth:`get_ready`.

        Args:
            runner: of this rank, whose cache has ``num_slots``.
            sharing: with the ranks that share sequences with it.
            token_budget: of a step.

        Raises PeerFailed, and what ``go_on`` raises while it waits for the ranks of other stages.
        """
        if sharing is not None:
            sharing.measure()
            self._measured = replace(self._measured, exchange=sharing.measured)
            logger.info("sequence_sharing %s", sharing.speeds)
        elif self.group.sums and runner.can_overlap:
            self.group.agree_on_strips(runner.is_program)
            runner.overlap = measure_overlap(runner, self.group, token_budget=token_budget, num_slots=num_slots)
            self._measured = replace(self._measured, overlap=runner.overlap.measured)
            logger.info("overlap stage=%d alone/woven %s", self._roster.stage, runner.overlap)
        self._everyone.meet(go_on)  # who is done first must not wait for the others with a deadline

    @property
    def measured(self) -> StageMeasurements:
        """What was measured of its stage, once it is ready: of the first rank there, as all have the same."""
        return NOTHING_MEASURED if self.group.rank else self._measured

    def followers(self) -> Followers:
        """The leader's hold on all others."""
        beside = self._roster.stages[0]
        begins = {rank: link for rank, link in self._compute.items() if rank in beside}
        return Followers(steps=self.steps, begins=begins, pulse=self.pulse)

    def leading(self, runner: ModelRunner, followers: Followers, device: torch.device) -> Runner:
        """What the leader's engine has its steps run by, given its own part of them."""
        if len(self._roster.stages) == 1:
            return runner
        hands = self._hands(runner)
        return PipelineRunner(runner=runner, followers=followers, group=self.group, hands=hands, device=device)

    def follower(
        self,
        runner: ModelRunner,
        executor: ThreadPoolExecutor,
        *,
        vocab_size: int,
        slot_limit: int,
        device: torch.device,
    ) -> Follower:
        """This rank as one that follows the leader."""
        return Follower(
            runner=runner,
            duty=self._duty(runner, device),
            leader=self.steps[0],
            pulse=self.pulse,
            executor=executor,
            vocab_size=vocab_size,
            slot_limit=slot_limit,
        )

    def _duty(self, runner: ModelRunner, device: torch.device) -> Duty:
        hands, stages = self._hands(runner), self._roster.stages
        if self._roster.stage:
            is_last = self._roster.stage == len(stages) - 1
            return LaterStage(runner=runner, hands=hands, is_last=is_last, device=device)
        return FirstStage(runner=runner, leader=self._compute[0], group=self.group, hands=hands, device=device)

    def _hands(self, runner: ModelRunner) -> Hands:
        links = self._mesh.of(Channel.STAGES)
        before: Link | None = None if self._roster.before is None else links[self._roster.before]
        after = [links[rank] for rank in self._roster.after]
        return Hands(before=before, after=after, pulse=self.pulse, hidden_size=runner.hidden_size, dtype=runner.dtype)

    def leave(self, cause: str) -> None:
        """Tell the others why, and end all connections."""
        self.pulse.fail(cause)
        if self._torch is not None:
            self._torch.close()
        self._mesh.close()
