"""Reports the figures of the gateway and of its replicas, read whenever metrics are collected."""

from collections.abc import Callable, Iterable, Iterator, Mapping

from orchestrator.gateway.fleet.admission import Admission
from orchestrator.gateway.fleet.fleet import Fleet
from orchestrator.gateway.fleet.inbox import Loss
from orchestrator.telemetry.requests import Telemetry
from placement.serving.routing.binding import WaitReason
from placement.serving.routing.choice import RouteKind
from protos.heterodyne.worker.v1 import worker_pb2

_Figures = Iterable[tuple[float, Mapping[str, str]]]
# Of a load report, which counts since its replica started.
_COUNTERS = (
    ("steps", "{step}", "Steps run since the replica started.", "steps"),
    ("preemptions", "{sequence}", "Sequences put back for lack of KV blocks.", "num_preemptions"),
    ("prompt_tokens", "{token}", "Tokens of prompts that were prefilled.", "prompt_tokens"),
    ("output_tokens", "{token}", "Tokens that were generated.", "output_tokens"),
    ("prefix_cache.queries", "{token}", "Prompt tokens looked up in the prefix cache.", "prefix_queries"),
    ("prefix_cache.hits", "{token}", "Prompt tokens found in the prefix cache.", "prefix_hits"),
    ("kv.transfers", "{transfer}", "Transfers of keys and values that came.", "kv_transfers"),
    ("kv.failures", "{transfer}", "Transfers of keys and values that did not come.", "kv_failures"),
    ("kv.bytes", "By", "Bytes of keys and values that came.", "kv_bytes"),
    (
        "kv.refused",
        "{piece}",
        "Pieces refused at the replica's first rank, as their transfer was over or their sender fenced.",
        "kv_refused",
    ),
)


def load_reports(fleet: Fleet) -> Iterator[tuple[str, worker_pb2.LoadReport]]:
    """Yields the name and the last report of every replica that lives. May be called on any thread."""
    # A deployment is replaced as a whole, so that a thread may go through the one that it found.
    for replica in fleet.deployment.replicas:
        leader = fleet.leader(replica.name, replica.epoch)
        if leader is not None and leader.load is not None and leader.lost is None:
            yield replica.name, leader.load


def observe(telemetry: Telemetry, *, admission: Admission, fleet: Fleet) -> None:
    """Registers the figures with ``telemetry``, which reads them from now on."""

    def requests() -> _Figures:
        yield admission.in_flight, {"state": "in_flight"}
        yield admission.queued, {"state": "queued"}

    def sequences() -> _Figures:
        for name, load in load_reports(fleet):
            yield load.num_running, {"replica": name, "state": "running"}
            yield load.num_waiting, {"replica": name, "state": "waiting"}
            yield load.num_moving, {"replica": name, "state": "moving"}

    def kv_usage() -> _Figures:
        for name, load in load_reports(fleet):
            if load.total_blocks:
                yield 1 - load.free_blocks / load.total_blocks, {"replica": name}

    def counted(field: str) -> Callable[[], _Figures]:
        return lambda: ((getattr(load, field), {"replica": name}) for name, load in load_reports(fleet))

    gauge, counter = telemetry.gauge, telemetry.counter
    gauge(
        "heterodyne.gateway.requests", "{request}", "Choices that replicas work on, and requests that wait.", requests
    )
    _observe_losses(telemetry, fleet)
    _observe_routes(telemetry, fleet)
    gauge("heterodyne.replica.sequences", "{sequence}", "Sequences of a replica, by state.", sequences)
    gauge("heterodyne.replica.kv_cache.usage", "1", "Share of KV blocks in use, 0 to 1.", kv_usage)
    for name, unit, description, field in _COUNTERS:
        counter(f"heterodyne.replica.{name}", unit, description, counted(field))


def _observe_losses(telemetry: Telemetry, fleet: Fleet) -> None:
    """Registers what is told of a replica also when it is lost."""

    def up() -> _Figures:
        for replica in fleet.deployment.replicas:
            leader = fleet.leader(replica.name, replica.epoch)
            yield int(leader is not None and leader.accepting), {"replica": replica.name}

    def losses() -> _Figures:
        for replica in fleet.deployment.replicas:
            for kind in Loss:
                if kind is not Loss.STOPPED:
                    yield fleet.losses[replica.name, kind], {"replica": replica.name, "cause": kind.value}

    telemetry.gauge("heterodyne.replica.up", "1", "Whether a replica takes requests, 1 or 0, lost ones too.", up)
    description = (
        "How often a replica was lost, by what was seen of it first: a killed process is mostly stream_broken, as its "
        "connection breaks before the controller tells of it (rank_failed). The status has the cause itself."
    )
    telemetry.counter("heterodyne.replica.losses", "{loss}", description, losses)


def _observe_routes(telemetry: Telemetry, fleet: Fleet) -> None:
    """Registers what waits for a replica with room, and where the rest went."""

    def waiting() -> _Figures:
        counts = fleet.waiting()
        for reason in WaitReason:
            yield counts[reason], {"reason": reason.value}

    def routes() -> _Figures:
        for kind in RouteKind:
            yield fleet.routes[kind], {"kind": kind.value}

    description = "Requests in flight that wait for a replica with room, by what is short."
    telemetry.gauge("heterodyne.gateway.waiting", "{request}", description, waiting)
    telemetry.counter("heterodyne.gateway.routes", "{request}", "Requests bound to replicas, by kind of route.", routes)
