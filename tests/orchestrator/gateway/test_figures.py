"""What is reported of a replica that is there, and of one that is lost."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any, cast

from orchestrator.gateway.figures import observe
from orchestrator.gateway.fleet.admission import Admission
from orchestrator.gateway.fleet.fleet import Fleet
from orchestrator.gateway.fleet.inbox import Loss, Lost
from orchestrator.telemetry.requests import Telemetry
from protos.heterodyne.control.v1 import control_pb2
from protos.heterodyne.worker.v1 import worker_pb2


@dataclass
class OneLeader:
    """The part of a leader that is read."""

    load: worker_pb2.LoadReport = field(default_factory=lambda: worker_pb2.LoadReport(total_blocks=8, free_blocks=8))
    lost: Lost | None = None

    @property
    def accepting(self) -> bool:
        return self.lost is None


@dataclass
class Replicas:
    """The part of a fleet that is read: two replicas, of which one was never ready."""

    one: OneLeader = field(default_factory=OneLeader)
    losses: Counter[tuple[str, Loss]] = field(default_factory=Counter)
    deployment: control_pb2.WatchResponse = field(
        default_factory=lambda: control_pb2.WatchResponse(
            replicas=[control_pb2.Replica(name="replica-0"), control_pb2.Replica(name="replica-1")]
        )
    )

    def leader(self, name: str, epoch: int) -> OneLeader | None:
        return self.one if name == "replica-0" else None


class Meter:
    """Keeps how each figure is read and described."""

    def __init__(self) -> None:
        self.read: dict[str, Any] = {}
        self.descriptions: dict[str, str] = {}

    def gauge(self, name: str, unit: str, description: str, read: Any) -> None:
        self.read[name] = read
        self.descriptions[name] = description

    counter = gauge

    def figures(self, name: str) -> dict[tuple[str, ...], float]:
        return {tuple(labels.values()): value for value, labels in self.read[name]()}


async def test_a_replica_that_is_lost_is_down_and_its_loss_is_counted_by_a_bounded_cause() -> None:
    replicas, meter = Replicas(), Meter()
    observe(cast(Telemetry, meter), admission=Admission(1, 1), fleet=cast(Fleet, replicas))
    assert meter.figures("heterodyne.replica.up") == {("replica-0",): 1, ("replica-1",): 0}
    losses = meter.figures("heterodyne.replica.losses")
    assert len(losses) == 2 * (len(Loss) - 1) and not any(losses.values()), "from 0, so that a rate is known"
    replicas.one.lost = Lost(cause="worker process 7 was killed", kind=Loss.RANK_FAILED)
    replicas.losses["replica-0", Loss.RANK_FAILED] += 1
    assert meter.figures("heterodyne.replica.up") == {("replica-0",): 0, ("replica-1",): 0}
    assert meter.figures("heterodyne.replica.losses")["replica-0", "rank_failed"] == 1
    assert "by what was seen of it first" in meter.descriptions["heterodyne.replica.losses"]
    assert not meter.figures("heterodyne.replica.sequences"), "other figures of what is lost go"
