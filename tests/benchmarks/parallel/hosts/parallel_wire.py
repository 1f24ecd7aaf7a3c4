"""What the driver of bare ranks tells them, one JSON object a line on standard input, with one answer a line each.

    {"listen": {}}                       {"port"}              where the ranks of the next replica connect
    {"open": Opening}                    {"sums", "overlap", "sharing"}     as they were measured; at all ranks at once
    {"close": {"key"}}                   {}                    followers first
    {"gloo": {"meeting", "rank", "num_ranks"}}   {}            at all ranks at once
    {"sums": {"key", "way"}}             {}                    at all ranks, between steps
    {"lanes": {"key", "lanes"}}          {}                    at all ranks, between steps
    {"run": Run}                         {"seconds"}           at the leader
    {"choose": Run}                      {"exchange", "is_woven"}           what the leader would do

Whatever fails is answered by {"error": cause}.
"""

from dataclasses import dataclass
from typing import Any, Literal

from placement.planning.layout import Split
from tests.benchmarks.parallel.parallel_steps import Workload

Lanes = Literal["measured", "one", "two"]
"""In which steps are computed: as the ranks measured, or always one, or two where they can be."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Opening:
    """A replica, as one of its ranks is told of it.

    Attributes:
        key: of the replica, in all its processes.
        model: directory of the checkpoint.
        stages: the share of each rank of each stage.
        addresses: where each rank listens.
        token: hexadecimal.
        num_slots: of its KV cache, over all ranks that share it.
        token_budget: of a step, for what is measured at the start.
    """

    key: str
    model: str
    stages: list[list[float]]
    split: Split
    rank: int
    addresses: list[tuple[str, int]]
    token: str
    block_size: int
    num_slots: int
    token_budget: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """A workload at a leader.

    Attributes:
        exchange: the way that ranks which share sequences are to take; None: the one they choose.
    """

    key: str
    workload: Workload
    exchange: str | None = None

    @classmethod
    def read(cls, told: dict[str, Any]) -> "Run":
        """From JSON."""
        return cls(**(told | {"workload": Workload(**told["workload"])}))
