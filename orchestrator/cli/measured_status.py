"""Shows what replicas and their stages measured when they started, as tables for people and as pairs for programs."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from placement.planning.memory import format_bytes
from protos.heterodyne.v1 import admin_pb2


@dataclass(frozen=True, slots=True, kw_only=True)
class Shown:
    """A table, with what its rows have in each of the columns."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Mapping[str, str]]


_STEP_COLUMNS = ("replica", "tokens", "time")
_SUM_COLUMNS = ("replica", "stage", "size", "algorithm", "time")
_OVERLAP_COLUMNS = ("replica", "stage", "tokens", "one batch", "two micro-batches", "taken")
_SPEED_COLUMNS = ("replica", "stage", "latency", "rate", "queries x tokens", "call")
_EXPECTED_COLUMNS = ("replica", "stage", "tokens", "before", "exchange", "a layer")


def measured_tables(status: admin_pb2.GetStatusResponse) -> Iterator[Shown]:
    """Yields a table for each kind of measurement that some replica or stage made."""
    for title, columns, rows in (
        ("steps of one sequence, through all ranks", _STEP_COLUMNS, _step_rows(status)),
        ("all-reduces within a stage", _SUM_COLUMNS, _sum_rows(status)),
        ("some layers of a step, in one batch and overlapped in two", _OVERLAP_COLUMNS, _overlap_rows(status)),
        ("ranks that share sequences", _SPEED_COLUMNS, _speed_rows(status)),
        ("their exchange for a chunk of a prompt", _EXPECTED_COLUMNS, _expected_rows(status)),
    ):
        found = list(rows)
        if found:
            yield Shown(title=title, columns=columns, rows=found)


def measured_pairs(status: admin_pb2.GetStatusResponse) -> Iterator[dict[str, object]]:
    """Yields the pairs of a line for each measurement; ``event`` says what was measured. Numbers are plain."""
    for pairs_of in (_sum_pairs, _overlap_pairs, _exchange_pairs):
        for where, rank in _stages(status):
            for event, pairs in pairs_of(rank):
                yield {"event": event, **where, **pairs}


def step_pairs(status: admin_pb2.GetStatusResponse) -> Iterator[dict[str, object]]:
    """Yields the pairs of a line for each step that a replica measured. JSON has them with its token budget."""
    for replica in status.replicas:
        for step in replica.budget.steps:
            duration_s = f"{step.duration_s:.6f}"
            yield {"event": "step", "replica": replica.name, "num_tokens": step.num_tokens, "duration_s": duration_s}


def _step_rows(status: admin_pb2.GetStatusResponse) -> Iterator[dict[str, str]]:
    for replica in status.replicas:
        for step in replica.budget.steps:
            yield {"replica": replica.name, "tokens": str(step.num_tokens), "time": _ms(step.duration_s)}


def _sum_pairs(rank: admin_pb2.RankStatus) -> Iterator[tuple[str, dict[str, object]]]:
    for each in rank.sums:
        duration_s = f"{each.duration_s:.6f}"
        yield "sum", {"num_bytes": each.num_bytes, "algorithm": each.algorithm, "duration_s": duration_s}


def _overlap_pairs(rank: admin_pb2.RankStatus) -> Iterator[tuple[str, dict[str, object]]]:
    for step in rank.overlap:
        times_s = {"one_batch_s": f"{step.alone_s:.6f}", "two_micro_batches_s": f"{step.overlapped_s:.6f}"}
        yield "overlap", {"num_tokens": step.num_tokens, **times_s, "micro_batches": 2 if step.is_overlapped else 1}


def _exchange_pairs(rank: admin_pb2.RankStatus) -> Iterator[tuple[str, dict[str, object]]]:
    if not rank.HasField("exchange"):
        return
    speeds = rank.exchange
    yield (
        "exchange",
        {
            "latency_s": f"{speeds.latency_s:.6f}",
            "bytes_per_s": f"{speeds.bytes_per_s:.0f}",
            "pairs_per_s": ",".join(f"{pairs:.0f}" for pairs in speeds.pairs_per_s),
            "call_s": f"{speeds.call_s:.6f}",
        },
    )
    for chunk in speeds.expected:
        sizes = {"num_tokens": chunk.num_tokens, "num_before": chunk.num_before}
        yield "expected_exchange", {**sizes, "exchange": chunk.way, "layer_s": f"{chunk.layer_s:.6f}"}


def _stages(status: admin_pb2.GetStatusResponse) -> Iterator[tuple[dict[str, str], admin_pb2.RankStatus]]:
    """Yields every rank with its replica and stage. The first rank of a stage knows what was measured there."""
    for replica in status.replicas:
        starts = sorted({rank.first_layer for rank in replica.ranks})  # a stage is who has the same layers
        for rank in replica.ranks:
            yield {"replica": replica.name, "stage": str(starts.index(rank.first_layer))}, rank


def _sum_rows(status: admin_pb2.GetStatusResponse) -> Iterator[dict[str, str]]:
    for where, rank in _stages(status):
        for each in rank.sums:
            size = format_bytes(each.num_bytes)
            yield {**where, "size": size, "algorithm": each.algorithm, "time": _ms(each.duration_s)}


def _overlap_rows(status: admin_pb2.GetStatusResponse) -> Iterator[dict[str, str]]:
    for where, rank in _stages(status):
        for step in rank.overlap:
            times = {"one batch": _ms(step.alone_s), "two micro-batches": _ms(step.overlapped_s)}
            yield {**where, "tokens": str(step.num_tokens), **times, "taken": "two" if step.is_overlapped else "one"}


def _speed_rows(status: admin_pb2.GetStatusResponse) -> Iterator[dict[str, str]]:
    for where, rank in _stages(status):
        if rank.HasField("exchange"):
            exchange = rank.exchange
            yield {
                **where,
                "latency": _ms(exchange.latency_s),
                "rate": f"{1e-6 * exchange.bytes_per_s:.4g} MB/s",
                "queries x tokens": ", ".join(f"{1e-6 * pairs:.3g}" for pairs in exchange.pairs_per_s) + " M/s",
                "call": _ms(exchange.call_s),
            }


def _expected_rows(status: admin_pb2.GetStatusResponse) -> Iterator[dict[str, str]]:
    for where, rank in _stages(status):
        for chunk in rank.exchange.expected:
            sizes = {"tokens": str(chunk.num_tokens), "before": str(chunk.num_before)}
            yield {**where, **sizes, "exchange": chunk.way, "a layer": _ms(chunk.layer_s)}


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:.3f} ms"
