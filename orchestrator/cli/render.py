"""Shows a deployment's status, as a table on a terminal and as plain lines elsewhere, and the parts of an answer."""

from collections.abc import Iterator, Mapping, Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from orchestrator.cli.attention_status import attention_pairs, attention_words
from orchestrator.cli.client import GenerateResult
from orchestrator.cli.measured_status import measured_pairs, measured_tables, step_pairs
from orchestrator.key_values import key_values, printable
from placement.measured.step_times import seconds
from placement.measured.targets import mixed_words
from placement.model.specs import DType
from placement.planning.memory import format_bytes
from placement.planning.plan import Role
from placement.serving.routing.binding import WaitReason
from placement.serving.routing.choice import RouteKind
from protos.heterodyne.v1 import admin_pb2, inference_pb2

_STYLES = {
    "READY": "green",
    "STARTING": "yellow",
    "DRAINING": "yellow",
    "FAILED": "bold red",
    "STOPPED": "dim",
}
_COLUMNS = (
    "replica", "role", "dtype", "state", "phase", "epoch", "rank", "node", "worker", "device", "target", "pid",
    "address", "layers", "KV heads", "FFN", "tokens", "weights", "KV", "KV used", "running", "waiting",
    "prompt tokens/s", "tokens/s",
)  # fmt: skip
_KEYS = {"prompt tokens/s": "prompt_tokens_per_s", "tokens/s": "generated_tokens_per_s"}
# What a narrow terminal does without, first to go first; the lines for programs have everything.
_DISPENSABLE = (
    "prompt tokens/s", "epoch", "address", "pid", "FFN", "KV heads", "layers", "KV", "weights", "target", "device",
    "dtype", "phase", "rank", "node",
)  # fmt: skip
_UNLIMITED = 10_000
_WAITS: Mapping[str, str] = {
    WaitReason.NO_PLACE: "for a place among the sequences that run",
    WaitReason.NO_BLOCKS: "for free KV blocks",
    WaitReason.PROMPTS: "for prompts that are computed first",
    WaitReason.BEHIND: "behind others",
}
_ROUTES: Mapping[str, str] = {
    RouteKind.ALONE: "by one replica alone",
    RouteKind.SPLIT: "with prompt and answer on two",
    RouteKind.SPILLED: "with the help of a mixed one",
    RouteKind.PULLED: "with the help of the other pool",
}
_RIGHT = (
    "epoch", "rank", "pid", "KV heads", "FFN", "tokens", "weights", "KV", "KV used", "running", "waiting",
    "prompt tokens/s", "tokens/s", "stage", "size", "time", "one batch", "two micro-batches", "latency", "rate", "call",
    "before", "a layer",
)  # fmt: skip


def print_status(console: Console, status: admin_pb2.GetStatusResponse, *, measured: bool = False) -> None:
    """Prints tables where ``console`` is a terminal, else ``key=value`` lines, for other programs.

    Args:
        measured: whether what the ranks measured at their start is shown too.
    """
    if console.is_terminal:
        console.print(status_table(console, status, measured=measured))
        return
    for line in status_lines(status, measured=measured):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def status_table(console: Console, status: admin_pb2.GetStatusResponse, *, measured: bool = False) -> Group:
    """Returns a row for each rank, and lines and tables below.

    They say why some ranks failed, how large the steps of each replica are, what was ``measured``, and what the gateway
    does.

    A replica's own figures stand in its first row. There are as many columns as ``console`` has room for.
    """
    title = f"model {status.model}"
    if status.context_tokens:
        title += f", context {status.context_tokens} of {status.model_context_tokens} tokens"
    rows = list(_rows(status))
    columns = [column for column in _COLUMNS if any(row[column] for row in rows)]
    table = _table(title, columns, rows)
    unlimited = console.options.update(width=_UNLIMITED)
    for column in _DISPENSABLE:
        if Measurement.get(console, unlimited, table).maximum <= console.width:
            break
        columns = [kept for kept in columns if kept != column]
        table = _table(title, columns, rows)
    causes = [Text(printable(f"{row['replica']}: {row['cause']}"), "red") for row in rows if row["cause"]]
    notes = [Text(printable(words)) for words in mixed_targets(status).values()]
    tables = measured_tables(status) if measured else ()
    below = [_table(shown.title, shown.columns, shown.rows) for shown in tables]
    budgets = [
        Text(printable(f"{replica.name}: {words}")) for replica in status.replicas if (words := _budget(replica))
    ]
    gateway = [Text(printable(words)) for words in _gateway_words(status.gateway)]
    attention = [Text(printable(words)) for words in attention_words(status)]
    return Group(table, *causes, *attention, *notes, *budgets, *below, *gateway)


def _table(title: str, columns: Sequence[str], rows: Sequence[Mapping[str, str]]) -> Table:
    table = Table(title=Text(printable(title)), title_justify="left", box=SIMPLE_HEAD)
    for column in columns:
        table.add_column(column, justify="right" if column in _RIGHT else "left", overflow="fold")
    for row in rows:
        style = _STYLES.get(row.get("state", ""), "")
        table.add_row(*(Text(printable(row[column]), style if column == "state" else "") for column in columns))
    return table


def status_lines(status: admin_pb2.GetStatusResponse, *, measured: bool = False) -> Iterator[str]:
    """Yields lines of ``key=value`` pairs on the gateway and each rank, and on what was ``measured``.

    What is unknown is left out.
    """
    gateway = status.gateway
    yield key_values(
        event="gateway",
        model=status.model,
        context_tokens=status.context_tokens or "",
        model_context_tokens=status.model_context_tokens or "",
        in_flight=gateway.in_flight,
        max_in_flight=gateway.max_in_flight,
        queued=gateway.queued,
        max_queued=gateway.max_queued,
        draining=str(gateway.draining).lower(),
        controller_connected=str(gateway.controller_connected).lower(),
        fenced_messages=gateway.fenced_messages,
        uptime_s=f"{gateway.uptime_s:.1f}",
    )
    for event, counts in (("waiting", gateway.waiting), ("routes", gateway.routes)):
        if counts:
            yield key_values(event=event, **{item.kind: item.count for item in counts})
    for row in _rows(status):
        named = {_KEYS.get(column, column.lower().replace(" ", "_")): value for column, value in row.items()}
        yield key_values(event="rank", **named)
    yield from (key_values(**pairs) for pairs in attention_pairs(status))
    for replica in status.replicas:
        if replica.budget.token_budget:
            yield key_values(
                event="step_budget",
                replica=replica.name,
                token_budget=replica.budget.token_budget,
                auto=str(replica.budget.is_auto).lower(),
                expected_s=f"{replica.budget.expected_s:.4g}" if replica.budget.expected_s else "",
            )
    for name, words in mixed_targets(status).items():
        yield key_values(event="mixed_targets", replica=name, effect=words)
    for pairs in (*step_pairs(status), *measured_pairs(status)) if measured else ():
        yield key_values(**pairs)


def mixed_targets(status: admin_pb2.GetStatusResponse) -> dict[str, str]:
    """Says of each replica whose ranks have several targets that answers depend on who computes, where they do."""
    dtypes = {replica.name: replica.dtype or status.dtype for replica in status.replicas}
    words = {
        replica.name: mixed_words(
            replica.name,
            [rank.target for rank in replica.ranks],
            DType(dtypes[replica.name]) if dtypes[replica.name] else None,
        )
        for replica in status.replicas
    }
    return {name: said for name, said in words.items() if said}


def roles(status: admin_pb2.GetStatusResponse) -> dict[str, str]:
    """Returns what each replica is for, where any is for prompts or answers only; else nothing."""
    found = {replica.name: replica.role for replica in status.replicas}
    return found if set(found.values()) - {"", Role.MIXED.value} else {}


def own_dtypes(status: admin_pb2.GetStatusResponse) -> dict[str, str]:
    """Returns the number type of each replica, where they have different ones; else nothing."""
    found = {replica.name: replica.dtype for replica in status.replicas}
    return found if len(set(found.values()) - {""}) > 1 else {}


def _layers(rank: admin_pb2.RankStatus) -> str:
    """Writes the layers with the last of them, as the plan does; nothing where they are not known."""
    if not rank.last_layer:
        return ""
    last = rank.last_layer - 1
    return f"{rank.first_layer}-{last}" if last > rank.first_layer else str(last)


def _rows(status: admin_pb2.GetStatusResponse) -> Iterator[dict[str, str]]:
    role_of, dtype_of = roles(status), own_dtypes(status)
    for replica in status.replicas:
        state = admin_pb2.ReplicaState.Name(replica.state).removeprefix("REPLICA_STATE_")
        figures = _load_figures(replica)
        for rank in replica.ranks or [admin_pb2.RankStatus()]:
            yield {
                "replica": replica.name,
                "role": role_of.get(replica.name, ""),
                "dtype": dtype_of.get(replica.name, ""),
                "state": state,
                "phase": rank.load_phase,
                "epoch": str(replica.epoch),
                "rank": str(rank.rank) if replica.ranks else "",
                "node": rank.node,
                "worker": rank.worker,
                "device": rank.device,
                "target": rank.target,
                "pid": str(rank.pid or ""),
                "address": rank.address,
                "layers": _layers(rank),
                "KV heads": str(rank.num_kv_heads) if rank.HasField("num_kv_heads") else "",
                "FFN": str(rank.num_ffn_columns) if rank.HasField("num_ffn_columns") else "",
                "tokens": f"{rank.token_share:.0%}" if rank.HasField("token_share") else "",
                "weights": _loaded(rank),
                "KV": format_bytes(rank.kv_bytes) if rank.kv_bytes else "",
                "KV used": figures.get("KV used", ""),
                "running": figures.get("running", ""),
                "waiting": figures.get("waiting", ""),
                "prompt tokens/s": figures.get("prompt tokens/s", ""),
                "tokens/s": figures.get("tokens/s", ""),
                "cause": rank.cause or replica.cause,
            }
            figures = {}


def _load_figures(replica: admin_pb2.ReplicaStatus) -> dict[str, str]:
    """Returns what the leader reported last; nothing before it has reported."""
    if not replica.HasField("load"):
        return {}
    load = replica.load
    rates = {}
    if load.HasField("generated_tokens_per_s"):
        rates["tokens/s"] = f"{load.generated_tokens_per_s:.1f}"
    if load.HasField("prompt_tokens_per_s"):
        rates["prompt tokens/s"] = f"{load.prompt_tokens_per_s:.1f}"
    return rates | {
        "KV used": f"{load.total_blocks - load.free_blocks}/{load.total_blocks}",
        "running": str(load.num_running),
        "waiting": str(load.num_waiting),
    }


def _budget(replica: admin_pb2.ReplicaStatus) -> str:
    """Says how large the steps of a replica are, and how long such a step takes; nothing before that is known."""
    budget = replica.budget
    if not budget.token_budget:
        return ""
    step = f"{seconds(budget.expected_s)} s a step" if budget.expected_s else ""
    notes = ": ".join(note for note in ("auto" if budget.is_auto else "", step) if note)
    return f"token budget {budget.token_budget}" + (f" ({notes})" if notes else "")


def _loaded(rank: admin_pb2.RankStatus) -> str:
    """Writes how much a rank holds of its weights; nothing where that is not known."""
    if not rank.weight_bytes:
        return ""
    total = format_bytes(rank.weight_bytes)
    return total if rank.loaded_bytes >= rank.weight_bytes else f"{format_bytes(rank.loaded_bytes)} of {total}"


def _gateway_words(gateway: admin_pb2.GatewayStatus) -> Iterator[str]:
    """Yields a line on the gateway, and one each on what waits for a replica and where requests went, if any did."""
    words = [
        f"gateway: {gateway.in_flight}/{gateway.max_in_flight} in flight",
        f"{gateway.queued}/{gateway.max_queued} queued",
        f"up {gateway.uptime_s:.0f} s",
    ]
    if gateway.draining:
        words.append("draining")
    if not gateway.controller_connected:
        words.append("controller lost, serving the last known plan")
    if gateway.fenced_messages:
        words.append(f"{gateway.fenced_messages} messages of old epochs refused")
    yield ", ".join(words)
    for title, counts, words_of in (
        ("requests that wait for a replica", gateway.waiting, _WAITS),
        ("requests so far", gateway.routes, _ROUTES),
    ):
        if counts:
            yield f"{title}: " + ", ".join(f"{item.count} {words_of.get(item.kind, item.kind)}" for item in counts)


def ending(end: inference_pb2.Finished | inference_pb2.ChoiceEnd) -> str:
    """Says in words why an answer ended."""
    if end.HasField("matched_stop"):
        return f"stop string {end.matched_stop!r}"
    return "its length" if end.finish_reason == inference_pb2.FINISH_REASON_LENGTH else "end of text"


def choice_blocks(result: GenerateResult) -> Iterator[str]:
    """Yields the lines of several choices, each under a heading of its own, after the prompt where it was echoed."""
    if result.echo is not None:
        yield f"== prompt: {len(result.echo.tokens)} tokens"
        yield result.echo.text
    for index, (choice, end) in enumerate(zip(result.choices, result.ends, strict=True)):
        yield f"== choice {index}: {end.completion_tokens} tokens, ended by {ending(end)}"
        yield choice.text


def logprob_lines(result: GenerateResult) -> Iterator[str]:
    """Yields the lines of a table of tokens and their log-probabilities, with tabs between the columns."""
    yield "\t".join(("part", "position", "token", "logprob", "alternatives"))
    parts = [] if result.echo is None else [("prompt", result.echo)]
    parts += [(f"choice {index}", choice) for index, choice in enumerate(result.choices)]
    for name, part in parts:
        for position, token in enumerate(part.tokens):
            logprob = f"{token.logprob:.4f}" if token.HasField("logprob") else "-"
            top = " ".join(f"{item.token_id}:{item.logprob:.4f}" for item in token.top)
            yield "\t".join((name, str(position), str(token.id), logprob, top or "-"))
