"""The ranks of a stage over the wire: sums what they compute, each sum by the algorithm that suits its size."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from kernels.cpu.layers.partial import MOST_STRIPS, Partial, SumWork
from kernels.cpu.machine.threads import work_alone
from placement.measured.collectives import AllReduceTable
from workers.collectives.algorithms import AllReduce, Peers, direct, gather, scatter, ways
from workers.collectives.direct_sums import MOST_BYTES, DirectSums, is_available
from workers.collectives.scattered import reduce_and_finish
from workers.model.group import Group
from workers.transport.errors import PeerFailed
from workers.transport.link import Link
from workers.transport.pulse import Pulse

COLLECTIVE_S = 20.0
"""Longest that a rank may wait for others that live: a step of theirs that hangs ends the replica, and the rank that
hangs is named before the gateway, whose patience is ``gateway.stall_timeout_s``, gives the leader up.
"""

MOST_UNEVEN = 1.15
"""Rows of the rank with the most, times the ranks, over all rows: what was measured is a sum in equal parts."""

_DIRECT = "direct"


class TensorGroup:
    """All ranks of a stage. For the thread that executes steps.

    It sends and receives on that thread, or, for what is begun, on one of its own.

    Whatever fails, the replica has failed: nothing is tried again.

    Args:
        rank: of this rank in the group.
        links: to all others, by their rank in the group.
        pulse: knows whether they live.
        widths: vocabulary rows of each rank.
        table: which algorithm for which size.
        sums: as :class:`workers.model.group.Group` says.

    Attributes:
        ways: to sum, by the name that the table has for them.
        unchecked: names of those that have no checksums.
        device: of the tensors that are summed by them.
    """

    device = torch.device("cpu")

    def __init__(
        self,
        *,
        rank: int,
        links: dict[int, Link],
        pulse: Pulse,
        widths: Sequence[int],
        table: AllReduceTable,
        sums: bool = True,
    ) -> None:
        self.sums = sums
        self.rank = rank
        self.table = table
        self.links = links
        self.pulse = pulse
        self.widths = widths
        self.ways: dict[str, AllReduce] = ways(self.num_ranks)
        self._in_strips = False
        self._compiled: DirectSums | None = None
        self.unchecked: set[str] = set()
        self._on_device: Group | None = None
        self._beside = ThreadPoolExecutor(1, thread_name_prefix="exchange", initializer=work_alone)

    @property
    def num_ranks(self) -> int:
        """How many ranks there are, with this one."""
        return len(self.links) + 1

    def all_reduce(self, x: Tensor) -> None:
        """Sums a contiguous tensor over the ranks, in place. Raises PeerFailed."""
        if not x.numel() or self.num_ranks == 1:
            return
        if self._on_device is not None and x.device == self.device:
            self._on_device.all_reduce(x)
            return
        on_host = x.cpu()  # itself, where it is there already
        self.run(self.ways[self.table.choose(x.nbytes)], on_host)
        if on_host is not x:
            x.copy_(on_host)

    def reduce(self, partial: Partial) -> None:
        """Sums what the ranks have parts of; where the sum is scattered, finishes its rows, too. Raises PeerFailed."""
        if self._on_device is not None and partial.update.device == self.device:
            self._on_device.reduce(partial)
        elif partial.finish is not None and self.num_ranks > 1 and self._scatters(partial.update):
            self._run(lambda peers, _: reduce_and_finish(peers, partial), torch.empty(0), COLLECTIVE_S)
        else:
            self.all_reduce(partial.update)

    def in_program(self, num_bytes: int) -> SumWork | None:
        """As :class:`workers.model.group.Group` says: where everyone sends all to everyone."""
        if self._on_device is not None or self._compiled is None or num_bytes > MOST_BYTES:
            return None
        return self._compiled if self.table.choose(num_bytes) == _DIRECT else None

    def agree_on_strips(self, has_programs: bool) -> None:
        """Has sums cut into strips where every rank can: not where one has nothing of the layers, or another CPU.

        All ranks call it at the same time. Raises PeerFailed.

        Args:
            has_programs: this rank's layers are a program.
        """
        num_without = torch.tensor([0.0 if has_programs and self._compiled is not None else 1.0])
        self.run(direct, num_without)
        self._in_strips = not num_without.item()

    def _num_strips(self, num_bytes: int) -> int:
        return self.table.num_strips(num_bytes, MOST_STRIPS) if self._in_strips else 1

    def compile_sums(self) -> None:
        """Has direct sums computed by compiled code, where this CPU has what that needs. Takes seconds, once."""
        if not self.sums or not self.links or not is_available():
            return
        compiled = self._compiled = DirectSums(
            rank=self.rank,
            links=self.links,
            timeout_s=COLLECTIVE_S,
            strips=self._num_strips,
            alive=self.pulse.check,
            reason=self.pulse.reason,
        )

        def direct_compiled(peers: Peers, x: Tensor) -> None:
            if compiled.takes(x):
                compiled.all_reduce(x, deadline_s=peers.deadline_s, alive=peers.alive)
            else:
                direct(peers, x)

        self.ways[_DIRECT] = direct_compiled

    def use(self, table: AllReduceTable) -> None:
        """Sums by this table from now on; what was needed to measure it is let go."""
        self.table = table
        if self._compiled is not None:
            self._compiled.release()

    def _scatters(self, x: Tensor) -> bool:
        """Whether it is to be scattered, and can be by rows: no rank may have many more of them than others."""
        most = -(-len(x) // self.num_ranks) * self.num_ranks
        return 0 < most <= MOST_UNEVEN * len(x) and self.ways[self.table.choose(x.nbytes)] is scatter

    def begin_reduce(self, partial: Partial) -> Future[None]:
        """As :meth:`reduce`, beside the computation, after what was begun before; the future raises PeerFailed.

        All ranks begin the same in the same order, and until all of it is done call nothing else.
        """
        if self._on_device is not None and partial.update.device == self.device:
            return self._on_device.begin_reduce(partial)
        return self._beside.submit(self._reduce_beside, partial)

    @torch.inference_mode()  # the step's tensors were made in it, and each thread has its own
    def _reduce_beside(self, partial: Partial) -> None:
        self.reduce(partial)

    def settle(self) -> None:
        """Waits until all sums are there. Raises PeerFailed."""
        if self._on_device is not None:
            self._on_device.settle()

    def also(self, name: str, group: Group) -> None:
        """Has another way for tensors on the host, whose messages have no checksum."""

        def sum_by(_: Peers, x: Tensor) -> None:
            group.all_reduce(x)

        self.ways[name] = sum_by
        self.unchecked.add(name)

    def give_to(self, name: str, group: Group, device: torch.device) -> None:
        """Has a group that sums where the tensors are sum all that are on ``device``."""

        def sum_by(_: Peers, x: Tensor) -> None:
            group.all_reduce(x)
            group.settle()

        self.ways, self.device, self._on_device = {name: sum_by}, device, group

    def begin_exchange(self, gives: Mapping[int, Tensor], takes: Mapping[int, Tensor]) -> Future[None]:
        """As :meth:`exchange`, and :meth:`begin_reduce`."""
        return self._beside.submit(self.exchange, gives, takes)

    def meet(self, go_on: Callable[[], None] = lambda: None) -> None:
        """Waits until all ranks are here, however long that takes. Raises PeerFailed, and what ``go_on`` raises."""

        def alive() -> None:
            go_on()
            self.pulse.check()

        self._run(direct, torch.zeros(1), math.inf, alive)

    def run(self, algorithm: Callable[[Peers, Tensor], None], x: Tensor) -> None:
        """One collective of all ranks on ``x``. Raises PeerFailed."""
        self._run(algorithm, x, COLLECTIVE_S)

    def _run(
        self,
        algorithm: Callable[[Peers, Tensor], None],
        x: Tensor,
        timeout_s: float,
        alive: Callable[[], None] | None = None,
    ) -> None:
        peers = Peers(
            rank=self.rank,
            num_ranks=self.num_ranks,
            links=self.links,
            deadline_s=time.monotonic() + timeout_s,
            alive=alive or self.pulse.check,
        )
        try:
            algorithm(peers, x)
        except PeerFailed as error:
            raise self.pulse.reason(error) from error

    @torch.inference_mode()
    def exchange(self, gives: Mapping[int, Tensor], takes: Mapping[int, Tensor]) -> None:
        """Sends and receives contiguous tensors on the host, by rank. Raises PeerFailed."""
        self._run(lambda peers, _: peers.move(gives, takes), torch.empty(0), COLLECTIVE_S)

    def gather_columns(self, x: Tensor) -> Tensor | None:
        """Logits [R, V of the rank] of all ranks side by side [R, V], at rank 0; None elsewhere. Raises PeerFailed."""
        if self._on_device is not None and x.device == self.device:
            return self._on_device.gather_columns(x)
        on_host = x.cpu().contiguous()
        widths = {} if self.rank else {rank: width for rank, width in enumerate(self.widths) if rank and width}
        others = {rank: on_host.new_empty(len(x), width) for rank, width in widths.items()}

        def collect(peers: Peers, mine: Tensor) -> None:
            gather(peers, mine, others)

        self.run(collect, on_host)
        if self.rank:
            return None
        return torch.cat([on_host, *others.values()], dim=1).to(x.device) if others else x
