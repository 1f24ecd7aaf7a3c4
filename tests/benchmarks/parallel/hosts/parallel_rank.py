"""``python -m tests.benchmarks.parallel.hosts.parallel_rank PARENT HOST``: one host's bare ranks.

No Ray, no gateway, no engine: what a worker's process has of a rank, of any number of replicas, driven as
:mod:`tests.benchmarks.parallel.hosts.parallel_wire` says. Ends with its parent, or with its standard input.
"""

import gc
import json
import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from placement.measured.exchange import Exchange
from placement.measured.overlap import OverlapTable
from protos.codec.child_process import die_with_parent
from tests.benchmarks.parallel.hosts.parallel_wire import Lanes, Opening, Run
from tests.benchmarks.parallel.parallel_open import OpenRank, open_rank
from tests.benchmarks.parallel.parallel_steps import batches, most_ahead, time_steps
from tests.benchmarks.parallel.parallel_sums import Sums, join_gloo
from workers.transport.mesh import listen

# A table by which two lanes pay for every step that can have them.
_ALWAYS = OverlapTable(num_tokens=(1, 1 << 40), alone_s=(1.0, 1.0), overlapped_s=(0.5, 0.5))


class Ranks:
    """The ranks of this process, by the key of their replica."""

    def __init__(self, host: str) -> None:
        """``host``: the address that it listens at."""
        self._host = host
        self._ranks: dict[str, OpenRank] = {}
        self._measured: dict[str, OverlapTable] = {}
        self._listener: socket.socket | None = None

    def listen(self) -> dict[str, Any]:
        """For the ranks of the next replica."""
        self._listener = listen(self._host)
        return {"port": self._listener.getsockname()[1]}

    def open(self, **told: Any) -> dict[str, Any]:
        """A rank, ready to run."""
        opening = Opening(**told)
        assert opening.key not in self._ranks and self._listener is not None
        with self._listener as listener:
            rank = self._ranks[opening.key] = open_rank(listener, opening)
        group = None if rank.membership is None else rank.membership.group
        return {
            "sums": "" if group is None or not group.sums else str(group.table),
            "overlap": str(rank.runner.overlap),
            "sharing": "" if rank.sharing is None else str(rank.sharing.speeds),
        }

    def close(self, key: str) -> dict[str, Any]:
        """Ends a rank, and frees its memory."""
        self._ranks.pop(key).close()
        gc.collect()
        return {}

    def gloo(self, meeting: str, rank: int, num_ranks: int) -> dict[str, Any]:
        """Joins gloo's ranks, for all replicas of as many."""
        join_gloo(Path(meeting), rank=rank, num_ranks=num_ranks)
        return {}

    def sums(self, key: str, way: str) -> dict[str, Any]:
        """Who sums from now on."""
        group = self._ranks[key].group
        assert group is not None, "a rank alone sums nothing"
        group.way = Sums(way)
        return {}

    def run(self, **told: Any) -> dict[str, Any]:
        """Times a workload."""
        run = Run.read(told)
        rank, work = self._ranks[run.key], run.workload
        if rank.sharing is not None:
            rank.sharing.forced = None if run.exchange is None else Exchange(run.exchange)
        steps = batches(work, rank.block_size)
        ahead = most_ahead(work, rank.num_stages)
        return {"seconds": time_steps(rank.leading, rank.thread, steps, ahead=ahead, num_warm=work.num_warm)}

    def choose(self, **told: Any) -> dict[str, Any]:
        """What the leader chooses for the first of its steps."""
        run = Run.read(told)
        rank = self._ranks[run.key]
        if rank.sharing is not None:
            rank.sharing.forced = None
        chosen = rank.runner.choose(next(batches(run.workload, rank.block_size)))
        return {"exchange": chosen.exchange.value, "is_woven": bool(rank.runner.lay_out(chosen).micro_batches)}

    def lanes(self, key: str, lanes: Lanes) -> dict[str, Any]:
        """In how many lanes steps are computed from now on: all ranks must be told."""
        measured = self._measured.setdefault(key, self._ranks[key].runner.overlap)
        self._ranks[key].runner.overlap = {"measured": measured, "one": OverlapTable(), "two": _ALWAYS}[lanes]
        return {}


def main() -> None:
    """Answers until standard input ends."""
    die_with_parent(int(sys.argv[1]))
    # Libraries print to standard output; whatever they say goes with the log.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    torch.set_num_threads(1)
    ranks = Ranks(sys.argv[2])
    commands: dict[str, Callable[..., dict[str, Any]]] = {
        "listen": ranks.listen, "open": ranks.open, "close": ranks.close, "gloo": ranks.gloo, "sums": ranks.sums,
        "run": ranks.run, "choose": ranks.choose, "lanes": ranks.lanes,
    }  # fmt: skip
    for line in sys.stdin:
        ((name, told),) = json.loads(line).items()
        try:
            answer = commands[name](**told)
        except Exception as error:  # the border of the process: the driver says what it was
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")
    answers.flush()
    os._exit(0)  # threads of replicas that were not closed wait for others


if __name__ == "__main__":
    main()
