"""Collectives of the ranks of a stage; each all-reduce uses the algorithm that is fastest for its size."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from kernels.cpu.layers.partial import MOST_COLUMN_TILES, Partial, SumWork
from kernels.cpu.machine.threads import work_alone
from placement.measured.collectives import AllReduceTable
from workers.collectives.algorithms import AllReduce, Peers, candidates, direct, gather, scatter
from workers.collectives.direct_sums import MOST_BYTES, CompiledAllReduce
from workers.collectives.scattered import reduce_and_finish
from workers.model.group import Group
from workers.transport.errors import PeerFailed
from workers.transport.link import Link
from workers.transport.pulse import Pulse

COLLECTIVE_S = 20.0
"""How long a rank may wait for others that are alive, until the leader says by how long its steps take: see
:mod:`workers.replica.patience`.
"""

MOST_UNEVEN = 1.15
"""The largest share of rows for which the measured times hold, as a multiple of an equal share."""

_DIRECT = "direct"


class TensorGroup:
    """The ranks of a stage, which run collectives together. For the thread that executes steps.

    It sends and receives on that thread; what is begun in the background runs on a thread of its own. Nothing that
    fails is tried again, since the replica has failed then.

    Args:
        rank: the number of this rank in the group.
        links: the links to all others, by their rank in the group.
        pulse: knows whether the ranks are alive.
        widths: the number of vocabulary rows of each rank.
        table: which algorithm is used for which size.
        sums: see :attr:`workers.model.group.Group.sums`.

    Attributes:
        algorithms: the all-reduces, by the names that the table has for them.
        unchecked: the names of those whose messages have no checksums.
        device: the device of the tensors that they sum.
        limit_s: how long a rank may wait for others that are alive.
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
        self.algorithms: dict[str, AllReduce] = candidates(self.num_ranks)
        self.limit_s = COLLECTIVE_S
        self._in_tiles = False
        self._compiled: CompiledAllReduce | None = None
        self.unchecked: set[str] = set()
        self._on_device: Group | None = None
        self._background = ThreadPoolExecutor(1, thread_name_prefix="exchange", initializer=work_alone)

    @property
    def num_ranks(self) -> int:
        """Returns the number of ranks, this one included."""
        return len(self.links) + 1

    def all_reduce(self, x: Tensor) -> None:
        """Sums a contiguous tensor over the ranks, in place. Raises PeerFailed."""
        if not x.numel() or self.num_ranks == 1:
            return
        if self._on_device is not None and x.device == self.device:
            self._on_device.all_reduce(x)
            return
        on_host = x.cpu()  # the same tensor, where it is on the host
        self.run(self.algorithms[self.table.choose(x.nbytes)], on_host)
        if on_host is not x:
            x.copy_(on_host)

    def reduce(self, partial: Partial) -> None:
        """Sums the ranks' partial updates; a reduce-scatter also finishes this rank's rows. Raises PeerFailed."""
        if self._on_device is not None and partial.update.device == self.device:
            self._on_device.reduce(partial)
        elif partial.finish is not None and self.num_ranks > 1 and self._is_scattered(partial.update):
            self._run(lambda peers, _: reduce_and_finish(peers, partial), torch.empty(0), self.limit_s)
        else:
            self.all_reduce(partial.update)

    def in_program(self, num_bytes: int) -> SumWork | None:
        """Implements :meth:`workers.model.group.Group.in_program`, for sizes that the direct algorithm is used for."""
        if self._on_device is not None or self._compiled is None or num_bytes > MOST_BYTES:
            return None
        return self._compiled if self.table.choose(num_bytes) == _DIRECT else None

    def agree_on_tiles(self, has_programs: bool) -> None:
        """Has all-reduces cut into column tiles from now on, where every rank can do that.

        A rank cannot where it has no part of the layers or another kind of CPU. All ranks call it at the same time.
        Raises PeerFailed.

        Args:
            has_programs: whether this rank's layers are a compiled program.
        """
        num_without = torch.tensor([0.0 if has_programs and self._compiled is not None else 1.0])
        self.run(direct, num_without)
        self._in_tiles = not num_without.item()

    def _num_tiles(self, num_bytes: int) -> int:
        return self.table.num_strips(num_bytes, MOST_COLUMN_TILES) if self._in_tiles else 1

    def compile_all_reduce(self) -> None:
        """Has compiled code run the direct algorithm, where this CPU supports it. The first call takes seconds."""
        if not self.sums or not self.links:
            return
        compiled = self._compiled = CompiledAllReduce(
            rank=self.rank,
            links=self.links,
            timeout_s=self.limit_s,
            num_tiles=self._num_tiles,
            alive=self.pulse.check,
            reason=self.pulse.reason,
        )

        def direct_compiled(peers: Peers, x: Tensor) -> None:
            if compiled.can_sum(x):
                compiled.all_reduce(x, deadline_s=peers.deadline_s, alive=peers.alive)
            else:
                direct(peers, x)

        self.algorithms[_DIRECT] = direct_compiled

    def use(self, table: AllReduceTable) -> None:
        """Uses this table from now on, and frees the memory that measuring it needed."""
        self.table = table
        if self._compiled is not None:
            self._compiled.release()

    def wait_at_most(self, limit_s: float) -> None:
        """Sets ``limit_s`` for the collectives that begin from now on. Any thread may call it."""
        self.limit_s = limit_s
        if self._compiled is not None:
            self._compiled.wait_at_most(limit_s)

    def _is_scattered(self, x: Tensor) -> bool:
        """Tells whether ``x`` is to be reduce-scattered and can be by rows: no rank may have many more than others."""
        most = -(-len(x) // self.num_ranks) * self.num_ranks
        return 0 < most <= MOST_UNEVEN * len(x) and self.algorithms[self.table.choose(x.nbytes)] is scatter

    def begin_reduce(self, partial: Partial) -> Future[None]:
        """Runs :meth:`reduce` in the background, after what was begun before. The future raises PeerFailed.

        All ranks begin the same collectives in the same order, and call no others until all of these are done.
        """
        if self._on_device is not None and partial.update.device == self.device:
            return self._on_device.begin_reduce(partial)
        return self._background.submit(self._reduce_in_background, partial)

    @torch.inference_mode()  # as the step's tensors were made in it; each thread has its own mode
    def _reduce_in_background(self, partial: Partial) -> None:
        self.reduce(partial)

    def settle(self) -> None:
        """Blocks the host until all sums are there. Raises PeerFailed."""
        if self._on_device is not None:
            self._on_device.settle()

    def add_all_reduce(self, name: str, group: Group) -> None:
        """Adds the all-reduce of another group, for tensors on the host, whose messages have no checksum."""

        def all_reduce(_: Peers, x: Tensor) -> None:
            group.all_reduce(x)

        self.algorithms[name] = all_reduce
        self.unchecked.add(name)

    def use_on_device(self, name: str, group: Group, device: torch.device) -> None:
        """Uses another group for all tensors on ``device``, which it reduces there."""

        def all_reduce(_: Peers, x: Tensor) -> None:
            group.all_reduce(x)
            group.settle()

        self.algorithms, self.device, self._on_device = {name: all_reduce}, device, group

    def begin_exchange(self, sends: Mapping[int, Tensor], receives: Mapping[int, Tensor]) -> Future[None]:
        """Runs :meth:`exchange` in the background, in the order of :meth:`begin_reduce`."""
        return self._background.submit(self.exchange, sends, receives)

    def barrier(self, go_on: Callable[[], None] = lambda: None) -> None:
        """Waits until all ranks call it, however long that takes. Raises PeerFailed, and what ``go_on`` raises."""

        def alive() -> None:
            go_on()
            self.pulse.check()

        self._run(direct, torch.zeros(1), math.inf, alive)

    def run(self, algorithm: Callable[[Peers, Tensor], None], x: Tensor) -> None:
        """Runs one collective of all ranks on ``x``. Raises PeerFailed."""
        self._run(algorithm, x, self.limit_s)

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
    def exchange(self, sends: Mapping[int, Tensor], receives: Mapping[int, Tensor]) -> None:
        """Sends and receives contiguous tensors on the host, by rank. Raises PeerFailed."""
        self._run(lambda peers, _: peers.move(sends, receives), torch.empty(0), self.limit_s)

    def gather_columns(self, x: Tensor) -> Tensor | None:
        """Gathers the ranks' logits [R, V of the rank] at rank 0, as [R, V]; None elsewhere. Raises PeerFailed."""
        if self._on_device is not None and x.device == self.device:
            return self._on_device.gather_columns(x)
        on_host = x.cpu().contiguous()
        widths = {} if self.rank else {rank: width for rank, width in enumerate(self.widths) if rank and width}
        others = {rank: on_host.new_empty(len(x), width) for rank, width in widths.items()}

        def collect(peers: Peers, own: Tensor) -> None:
            gather(peers, own, others)

        self.run(collect, on_host)
        if self.rank:
            return None
        return torch.cat([on_host, *others.values()], dim=1).to(x.device) if others else x
