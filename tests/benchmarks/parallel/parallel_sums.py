"""The ranks of a stage with sums that can be changed while they run: our own, torch.distributed's gloo, or none."""

from concurrent.futures import Future
from datetime import timedelta
from enum import Enum
from pathlib import Path

import torch
import torch.distributed
from torch import Tensor

from kernels.cpu.layers.partial import Partial, SumWork
from workers.collectives.group import TensorGroup
from workers.model.group import Alone

_JOIN_S = 60.0


class Sums(Enum):
    """Who adds what the ranks compute."""

    OURS = "ours"
    GLOO = "gloo"
    SILENT = "silent"  # nobody: what a step takes where nothing is sent


class SwitchedGroup:
    """A :class:`workers.model.group.Group`.

    Attributes:
        way: of the sums from now on. To be changed at all ranks while no step is on its way.
    """

    def __init__(self, group: TensorGroup) -> None:
        """``group``: of the same ranks, in the same order as gloo's."""
        self._group = group
        self._nobody = Alone()
        self.way = Sums.OURS

    @property
    def sums(self) -> bool:
        """As the group's."""
        return self._group.sums

    def all_reduce(self, x: Tensor) -> None:
        """Sums a contiguous tensor over the ranks, in place, or leaves it."""
        match self.way:
            case Sums.OURS:
                self._group.all_reduce(x)
            case Sums.GLOO:
                torch.distributed.all_reduce(x)
            case Sums.SILENT:
                pass

    def reduce(self, partial: Partial) -> None:
        """The same, of which only ours finishes rows."""
        if self.way is Sums.OURS:
            self._group.reduce(partial)
        else:
            self.all_reduce(partial.update)

    def in_program(self, num_bytes: int) -> SumWork | None:
        """As the group's, where it sums."""
        return self._group.in_program(num_bytes) if self.way is Sums.OURS else None

    def begin_reduce(self, partial: Partial) -> "Future[None]":
        """The same beside the computation; not by gloo."""
        assert self.way is not Sums.GLOO, "gloo is measured in one lane"
        return (self._group if self.way is Sums.OURS else self._nobody).begin_reduce(partial)

    def settle(self) -> None:
        """As the group does, where it sums."""
        if self.way is Sums.OURS:
            self._group.settle()

    def gather_columns(self, x: Tensor) -> Tensor | None:
        """As the group's: logits are gathered alike, whoever sums."""
        return self._group.gather_columns(x)


def join_gloo(meeting: Path, *, rank: int, num_ranks: int) -> None:
    """Connects this process with those of the other ranks, over the device that GLOO_SOCKET_IFNAME names.

    Args:
        meeting: a file that is not there yet, the same for all of them.
    """
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"file://{meeting}",
        rank=rank,
        world_size=num_ranks,
        timeout=timedelta(seconds=_JOIN_S),
    )
