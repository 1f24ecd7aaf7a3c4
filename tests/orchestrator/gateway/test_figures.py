"""What is reported of a replica that is there, and of one that is lost."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any, cast

from orchestrator.gateway.figures import observe
from orchestrator.gateway.fleet.admission import Admission
from orchestrator.gateway.fleet.fleet import Fleet
from orchestrator.gateway.fleet.inbox import Loss, Lost
from orchestrator.telemetry.requests import Telemetry
from placement.serving.routing.binding import WaitReason
from placement.serving.routing.choice import RouteKind
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
    routes: Counter[RouteKind] = field(default_factory=Counter)
    waits: Counter[WaitReason] = field(default_factory=Counter)
    deployment: control_pb2.WatchResponse = field(
        default_factory=lambda: control_pb2.WatchResponse(
            replicas=[control_pb2.Replica(name="replica-0"), control_pb2.Replica(name="replica-1")]
        )
    )

    def waiting(self) -> Counter[WaitReason]:
        return self.waits

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


async def test_requests_that_wait_for_room_are_counted_by_what_is_short_and_routes_by_kind() -> None:
    replicas, meter = Replicas(), Meter()
    observe(cast(Telemetry, meter), admission=Admission(1, 1), fleet=cast(Fleet, replicas))
    assert not any(meter.figures("heterodyne.gateway.waiting").values()), "from 0, so that a rate is known"
    replicas.waits[WaitReason.NO_BLOCKS] += 2
    replicas.routes[RouteKind.SPLIT] += 1
    replicas.one.load = worker_pb2.LoadReport(num_moving=3, kv_transfers=5, kv_failures=1, kv_bytes=700, kv_refused=2)
    assert meter.figures("heterodyne.gateway.waiting")[("no_blocks",)] == 2
    assert meter.figures("heterodyne.gateway.routes")[("split",)] == 1
    assert meter.figures("heterodyne.replica.sequences")["replica-0", "moving"] == 3
    kv = {
        name: meter.figures(f"heterodyne.replica.kv.{name}") for name in ("transfers", "failures", "bytes", "refused")
    }
    assert [kv[name][("replica-0",)] for name in kv] == [5, 1, 700, 2]
