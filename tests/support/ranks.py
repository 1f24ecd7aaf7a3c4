"""A replica of several ranks in this process: each a thread with a runner of its own, over real connections."""

import json
import socket
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from kernels.select import kernels_for
from placement.hf import read_model_spec
from placement.layout import ReplicaLayout, StageLayout, cut
from placement.quantization import LinearFormat
from placement.specs import ModelSpec
from placement.weights import shard_tensors
from workers.device import open_device
from workers.followers import Follower
from workers.kv_cache import allocate_kv_cache
from workers.membership import Membership, Roster
from workers.runner import ModelRunner
from workers.step_types import Batch, StepResult
from workers.transport.mesh import TOKEN_BYTES, listen
from workers.weights import load_weights

NUM_SLOTS = 4096
_PATIENCE_S = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class _Rank:
    """One rank. ``thread`` is the one that computes."""

    membership: Membership
    runner: ModelRunner
    thread: ThreadPoolExecutor
    follower: Follower | None


class Ranks:
    """Leads like a :class:`ModelRunner`."""

    def __init__(self, ranks: Sequence[_Rank]) -> None:
        self._ranks = ranks
        self.leader = ranks[0].runner

    def prepare(self, batch: Batch) -> Callable[[], StepResult]:
        """As the runner's."""
        return self.leader.prepare(batch)

    def logits(self, batch: Batch) -> Tensor:
        """As the runner's: every rank is given the batch by hand."""
        computing = [rank.thread.submit(rank.runner.logits, batch) for rank in self._ranks]
        results = [one.result(_PATIENCE_S) for one in computing]
        return results[0]

    def runner(self, rank: int) -> ModelRunner:
        """Of a rank."""
        return self._ranks[rank].runner

    def membership(self, rank: int) -> Membership:
        """Of a rank."""
        return self._ranks[rank].membership

    def follower(self, rank: int) -> Follower:
        """A rank other than the leader."""
        follower = self._ranks[rank].follower
        assert follower is not None
        return follower

    @property
    def failures(self) -> list[BaseException]:
        """Of the ranks that follow."""
        followers = [rank.follower for rank in self._ranks if rank.follower is not None]
        return [follower.failure for follower in followers if follower.failure is not None]


def read_model(directory: Path) -> ModelSpec:
    """The model of a checkpoint."""
    return read_model_spec(json.loads((directory / "config.json").read_text()))


@contextmanager
def ranks(
    directory: Path,
    weights: Sequence[float],
    dtype: torch.dtype = torch.float32,
    linear: LinearFormat | None = None,
    *,
    checks: bool = True,
) -> Iterator[Ranks]:
    """The checkpoint cut over ranks with these shares; each has 4096 empty slots.

    ``checks``: whether no rank may have failed in the end.
    """
    model = read_model(directory)
    stage = StageLayout(devices=tuple(range(len(weights))), weights=tuple(weights))
    (parts,) = cut(model, ReplicaLayout(stages=(stage,)), linear, field="test")
    listeners = [listen("127.0.0.1") for _ in parts]
    rosters = [
        Roster(
            rank=rank,
            parts=parts,
            addresses=tuple(listener.getsockname()[:2] for listener in listeners),
            token=bytes(TOKEN_BYTES),
        )
        for rank in range(len(parts))
    ]

    def start(roster: Roster, listener: socket.socket) -> _Rank:
        membership = Membership.join(listener, roster, epoch=1)
        device = open_device("cpu", 1)
        tensors = load_weights(
            directory, shard_tensors(model, roster.part), dtype, device.torch_device, lambda *_: None, linear
        )
        runner = ModelRunner(
            model=model,
            weights=tensors,
            cache=allocate_kv_cache(
                model, num_slots=NUM_SLOTS, dtype=dtype, device=device, layers=roster.part.layers,
                kv_heads=roster.part.kv_heads,
            ),
            device=device.torch_device,
            kernels=kernels_for("cpu"),
            part=roster.part,
            group=membership.group,
            team=None if roster.rank else membership.followers(),
        )  # fmt: skip
        thread = ThreadPoolExecutor(1)
        follower = None
        if roster.rank:
            follower = membership.follower(runner, thread, vocab_size=model.vocab_size, slot_limit=NUM_SLOTS)
            follower.thread.start()
        return _Rank(membership=membership, runner=runner, thread=thread, follower=follower)

    with ThreadPoolExecutor(len(parts)) as pool:
        starting = [pool.submit(start, roster, listener) for roster, listener in zip(rosters, listeners, strict=True)]
        started = [one.result(_PATIENCE_S) for one in starting]
    for listener in listeners:
        listener.close()
    made = Ranks(started)
    try:
        yield made
        assert not (checks and made.failures), made.failures
    finally:
        for rank in started:
            if rank.follower is not None:
                rank.follower.stop()
                rank.follower.thread.join(_PATIENCE_S)
        for rank in started:
            rank.membership.leave("the test ends")
            rank.thread.shutdown()
