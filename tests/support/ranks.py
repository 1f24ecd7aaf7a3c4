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

from kernels.attention import Run
from kernels.protocol import Kernels
from kernels.select import kernels_for
from placement.measured.exchange import Exchange
from placement.model.hf import read_model_spec
from placement.model.quantization import LinearFormat
from placement.model.specs import ModelSpec
from placement.model.weights import shard_tensors
from placement.planning.layout import ReplicaLayout, Split, StageLayout, cut
from protos.heterodyne.worker.v1 import worker_pb2 as pb
from workers.engine.types import Runner
from workers.host.device import open_device
from workers.model.kv_cache import allocate_kv_cache
from workers.replica.follower import Follower
from workers.replica.membership import Membership
from workers.replica.roster import Roster
from workers.startup.building import num_slots
from workers.startup.checkpoint import load_weights
from workers.step.runner import ModelRunner
from workers.step.scoring import ScoredPrompt
from workers.step.types import Batch, SequenceInput, StepResult
from workers.transport.mesh import TOKEN_BYTES, listen

NUM_SLOTS = 4096
BLOCK_SIZE = 8
_PATIENCE_S = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class _Rank:
    """One rank. ``thread`` is the one that computes."""

    membership: Membership
    runner: ModelRunner
    leading: Runner
    thread: ThreadPoolExecutor
    follower: Follower | None


class Ranks:
    """Leads like a :class:`ModelRunner`."""

    def __init__(self, ranks: Sequence[_Rank], num_stages: int) -> None:
        self._ranks = ranks
        self.leader = ranks[0].leading
        self.num_stages = num_stages
        self.num_ranks = len(ranks)

    def prepare(self, batch: Batch) -> Callable[[], StepResult]:
        """As the runner's."""
        return self.leader.prepare(batch)

    def log_probs(self, token_ids: Sequence[int], runs: tuple[Run, ...]) -> Tensor:
        """Of every token [T, V] after each of the tokens of a prompt, as the scores of a step have them."""
        count, vocab_size = len(token_ids), self._ranks[0].runner._model.vocab_size
        scored = ScoredPrompt(first_index=1, token_ids=[0] * count, num_top=vocab_size)
        sequence = SequenceInput(token_ids=token_ids, start=0, runs=runs, scored=scored)
        tops = self.prepare(Batch(sequences=(sequence,)))().scores[0].top
        found = torch.tensor(tops, dtype=torch.float64)  # [T, V, 2]: token and log-probability
        return torch.full((count, vocab_size), torch.nan).scatter_(1, found[..., 0].long(), found[..., 1].float())

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
    *stages: Sequence[float],
    dtype: torch.dtype = torch.float32,
    linear: LinearFormat | None = None,
    num_layers: Sequence[int] | None = None,
    split: Split = "tensor",
    way: Exchange | None = None,
    kernels: Kernels | None = None,
    device_name: str = "cpu",
    measures: bool = False,
    checks: bool = True,
) -> Iterator[Ranks]:
    """The checkpoint cut over stages of ranks with these shares; there are 4096 empty slots.

    Args:
        split: what the shares are of.
        way: that ranks which share sequences always exchange by.
        kernels: that all compute with, on that device; None: those for it.
        measures: how ranks sum and weave best, as when a replica starts.
        num_layers: of each stage.
        checks: whether no rank may have failed in the end.
    """
    model = read_model(directory)
    layout = ReplicaLayout(
        stages=tuple(
            StageLayout(
                devices=tuple(range(len(weights))),
                weights=tuple(weights),
                split=split,
                num_layers=None if num_layers is None else num_layers[index],
            )
            for index, weights in enumerate(stages)
        )
    )
    parts = tuple(part for stage in cut(model, layout, linear, block_size=BLOCK_SIZE, field="test") for part in stage)
    request = pb.LoadRequest(num_blocks=NUM_SLOTS // BLOCK_SIZE, block_size=BLOCK_SIZE)
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
        device = open_device(device_name, 1)
        tensors = load_weights(
            directory, shard_tensors(model, roster.part), dtype, device.torch_device, lambda *_: None, linear
        )
        torch_device = device.torch_device
        variant = kernels or kernels_for(torch_device)
        sharing = membership.sharing(model, variant, dtype, torch_device, token_budget=1024)
        if sharing is not None:
            sharing.forced = way
        runner = ModelRunner(
            model=model,
            weights=tensors,
            cache=allocate_kv_cache(
                model, num_slots=num_slots(request, roster.part), dtype=dtype, device=device, layers=roster.part.layers,
                kv_heads=roster.part.kv_heads,
            ),
            device=torch_device,
            kernels=variant,
            sharing=sharing,
            part=roster.part,
            group=membership.group,
            team=(followers := None if roster.rank else membership.followers()),
        )  # fmt: skip
        thread = ThreadPoolExecutor(1)
        membership.group.compile_all_reduce()
        if measures:
            thread.submit(membership.get_ready).result(_PATIENCE_S)
        if measures or (sharing is not None and kernels is None):  # the interpreter would take minutes
            sizes = {"token_budget": 256, "num_slots": NUM_SLOTS}
            thread.submit(membership.measure_runner, runner, sharing, **sizes).result(_PATIENCE_S)
        follower = None
        leading: Runner = runner
        if followers is None:
            limits = {"vocab_size": model.vocab_size, "slot_limit": NUM_SLOTS}
            follower = membership.follower(runner, thread, device=torch_device, **limits)
            follower.thread.start()
        else:
            leading = membership.leading(runner, followers, torch_device)
        return _Rank(membership=membership, runner=runner, leading=leading, thread=thread, follower=follower)

    with ThreadPoolExecutor(len(parts)) as pool:
        starting = [pool.submit(start, roster, listener) for roster, listener in zip(rosters, listeners, strict=True)]
        started = [one.result(_PATIENCE_S) for one in starting]
    for listener in listeners:
        listener.close()
    made = Ranks(started, len(stages))
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
