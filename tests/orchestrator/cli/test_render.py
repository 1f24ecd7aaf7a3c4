"""How status and loading are shown, on a terminal and elsewhere."""

import io
import shlex

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from orchestrator.cli.render import print_status, status_lines
from orchestrator.cli.status_document import status_document
from orchestrator.key_values import key_values
from protos.heterodyne.v1 import admin_pb2

MIB = 2**20


def status() -> admin_pb2.GetStatusResponse:
    loading = admin_pb2.RankStatus(
        rank=0, node="node-1", device="cuda:0", weight_bytes=4 * MIB, loaded_bytes=MIB, load_phase="compiling"
    )
    ready = admin_pb2.RankStatus(
        rank=0,
        node="local",
        worker="big",
        device="cpu",
        address="127.0.0.1:41000",
        pid=77,
        first_layer=0,
        last_layer=12,
        weight_bytes=100 * MIB,
        loaded_bytes=100 * MIB,
        kv_bytes=256 * MIB,
    )
    load = admin_pb2.ReplicaLoad(num_running=3, num_waiting=0, free_blocks=90, total_blocks=100)
    load.prompt_tokens_per_s, load.generated_tokens_per_s = 0.0, 41.25
    return admin_pb2.GetStatusResponse(
        model="demo [bold]",
        context_tokens=2048,
        model_context_tokens=131072,
        gateway=admin_pb2.GatewayStatus(
            in_flight=3, max_in_flight=256, max_queued=1024, uptime_s=12.5, controller_connected=True
        ),
        replicas=[
            admin_pb2.ReplicaStatus(
                name="replica-0", state=admin_pb2.REPLICA_STATE_READY, epoch=2, ranks=[ready], load=load
            ),
            admin_pb2.ReplicaStatus(name="replica-1", state=admin_pb2.REPLICA_STATE_STARTING, epoch=1, ranks=[loading]),
            admin_pb2.ReplicaStatus(
                name="replica-2", state=admin_pb2.REPLICA_STATE_FAILED, epoch=4, cause="rank 0: no GPU"
            ),
        ],
    )


BUDGET = admin_pb2.StepBudget(
    token_budget=128,
    is_auto=True,
    expected_s=0.4123,
    steps=[
        admin_pb2.MeasuredStep(num_tokens=1, duration_s=0.1),
        admin_pb2.MeasuredStep(num_tokens=128, duration_s=0.4123),
    ],
)


@pytest.mark.parametrize(
    ("budget", "words"),
    [
        (BUDGET, "replica-0: token budget 128 (auto: 0.41 s a step)"),
        (admin_pb2.StepBudget(token_budget=256, expected_s=25.6), "replica-0: token budget 256 (26 s a step)"),
        (admin_pb2.StepBudget(token_budget=256), "replica-0: token budget 256"),
    ],
)
def test_a_terminal_shows_how_large_steps_are_and_how_long_they_take(budget: admin_pb2.StepBudget, words: str) -> None:
    shown, replicas = console(terminal=True), status()
    replicas.replicas[0].budget.CopyFrom(budget)
    print_status(shown, replicas)
    assert [line.rstrip() for line in output(shown).splitlines() if "token budget" in line] == [words]


def test_programs_read_how_large_steps_are_and_what_was_measured() -> None:
    replicas = status()
    assert not any("step_budget" in replica for replica in status_document(replicas)["replicas"]), "nothing is known"
    replicas.replicas[0].budget.CopyFrom(BUDGET)
    assert status_document(replicas)["replicas"][0]["step_budget"] == {
        "token_budget": 128,
        "auto": True,
        "expected_s": 0.4123,
        "measured": [{"num_tokens": 1, "duration_s": 0.1}, {"num_tokens": 128, "duration_s": 0.4123}],
    }
    (line,) = [line for line in status_lines(replicas) if "event=step_budget" in line]
    assert line == "event=step_budget replica=replica-0 token_budget=128 auto=true expected_s=0.4123"
    assert [line for line in status_lines(replicas, measured=True) if "event=step " in line] == [
        "event=step replica=replica-0 num_tokens=1 duration_s=0.100000",
        "event=step replica=replica-0 num_tokens=128 duration_s=0.412300",
    ]
    shown = console(terminal=True)
    print_status(shown, replicas, measured=True)
    assert "412.300 ms" in output(shown)


def console(*, terminal: bool) -> Console:
    return Console(file=io.StringIO(), force_terminal=terminal, width=240, color_system=None)


def output(shown: Console) -> str:
    assert isinstance(shown.file, io.StringIO)
    return shown.file.getvalue()


def pairs(line: str) -> dict[str, str]:
    return dict(word.split("=", 1) for word in shlex.split(line))


def test_status_off_a_terminal_is_one_line_a_rank() -> None:
    shown = console(terminal=False)
    print_status(shown, status())
    gateway, ready, loading, failed = map(pairs, output(shown).splitlines())
    assert gateway == {
        "event": "gateway", "model": "demo [bold]", "context_tokens": "2048", "model_context_tokens": "131072",
        "in_flight": "3", "max_in_flight": "256", "queued": "0",
        "max_queued": "1024", "draining": "false", "controller_connected": "true", "fenced_messages": "0",
        "uptime_s": "12.5",
    }  # fmt: skip
    assert ready == {
        "event": "rank", "replica": "replica-0", "state": "READY", "epoch": "2", "rank": "0", "node": "local",
        "worker": "big", "device": "cpu", "pid": "77", "address": "127.0.0.1:41000", "layers": "0-11",
        "weights": "100 MiB", "kv": "256 MiB", "kv_used": "10/100", "running": "3", "waiting": "0",
        "prompt_tokens_per_s": "0.0", "generated_tokens_per_s": "41.2",
    }  # fmt: skip
    assert (loading["weights"], loading["phase"], "running" in loading) == ("1 MiB of 4 MiB", "compiling", False)
    assert (failed["state"], failed["cause"], "rank" in failed) == ("FAILED", "rank 0: no GPU", False)
    assert "weights" not in failed and "layers" not in failed, "they are not known"


def test_what_waits_in_the_gateway_and_what_moves_between_replicas_is_in_the_document_where_there_is_any() -> None:
    known = status()
    before = status_document(known)
    assert "waiting" not in before["gateway"] and "routes" not in before["gateway"]
    known.gateway.waiting.add(kind="no_blocks", count=2)
    known.gateway.routes.add(kind="split", count=7)
    known.replicas[0].load.kv_bytes = 4096
    document = status_document(known)
    assert document["gateway"]["waiting"] == {"no_blocks": 2} and document["gateway"]["routes"] == {"split": 7}
    assert document["replicas"][0]["load"]["kv_bytes"] == 4096
    assert "kv_failures" not in document["replicas"][0]["load"]


def test_a_stage_of_the_first_layer_alone_has_that_layer() -> None:
    ranks = [admin_pb2.RankStatus(rank=0, last_layer=1), admin_pb2.RankStatus(rank=1, first_layer=1, last_layer=4)]
    known = admin_pb2.GetStatusResponse(replicas=[admin_pb2.ReplicaStatus(name="replica-0", ranks=ranks)])
    _, *lines = map(pairs, status_lines(known))
    assert [line["layers"] for line in lines] == ["0", "1-3"]
    (replica,) = status_document(known)["replicas"]
    assert [(rank["first_layer"], rank["last_layer"]) for rank in replica["ranks"]] == [(0, 0), (1, 3)]


def test_status_on_a_terminal_is_a_table_of_all_ranks() -> None:
    shown = console(terminal=True)
    print_status(shown, status())
    text = output(shown)
    assert "model demo [bold], context 2048 of 131072 tokens" in text
    for cell in ("replica-0", "READY", "10/100", "127.0.0.1:41000", "1 MiB of 4 MiB", "rank 0: no GPU"):
        assert cell in text
    assert "gateway: 3/256 in flight, 0/1024 queued, up 12 s" in text


@pytest.mark.parametrize(("width", "missing"), [(80, "layers"), (100, "pid"), (120, "epoch"), (160, "")])
def test_table_drops_columns_before_it_breaks_words(width: int, missing: str) -> None:
    long = status()
    for replica in long.replicas:
        replica.epoch = 1_795_318_332_410
    shown = Console(file=io.StringIO(), force_terminal=True, width=width, color_system=None)
    print_status(shown, long)
    lines = output(shown).splitlines()
    header = next(line.split() for line in lines if "replica " in line)
    assert header[:2] == ["replica", "state"] and header[-1] == "tokens/s" and {"running", "waiting"} < set(header)
    assert missing not in header
    (ready,) = [line.split() for line in lines if "replica-0" in line]
    assert ready[1] == "READY" and "10/100" in ready
    assert "replica-2: rank 0: no GPU" in lines


def test_table_says_when_the_gateway_is_not_well() -> None:
    unwell = status()
    unwell.gateway.draining, unwell.gateway.controller_connected = True, False
    unwell.gateway.fenced_messages = 7
    shown = console(terminal=True)
    print_status(shown, unwell)
    words = "draining, controller lost, serving the last known plan, 7 messages of old epochs refused"
    assert words in output(shown)


@settings(deadline=None)
@given(st.dictionaries(st.sampled_from("abc"), st.text(st.characters(codec="utf-8"), min_size=1)))
def test_key_values_stay_on_one_line_and_can_be_taken_apart(values: dict[str, str]) -> None:
    line = key_values(**values)
    assert line.isprintable()
    assert [word.split("=", 1)[0] for word in shlex.split(line)] == list(values)


def test_table_shows_escape_codes_of_a_cause_instead_of_obeying_them() -> None:
    odd = status()
    odd.replicas[2].cause = "a\x1b[2Jb\nc"
    shown = console(terminal=True)
    print_status(shown, odd)
    assert r"a\x1b[2Jb\nc" in output(shown)


def summing() -> admin_pb2.GetStatusResponse:
    """A replica of two stages of two ranks each, and one of a rank alone."""

    def rank(first_layer: int, *sums: tuple[int, str, float]) -> admin_pb2.RankStatus:
        measured = [admin_pb2.MeasuredSum(num_bytes=size, algorithm=name, duration_s=s) for size, name, s in sums]
        return admin_pb2.RankStatus(first_layer=first_layer, last_layer=first_layer + 3, sums=measured)

    first = [rank(0, (1024, "direct", 5.2e-5), (4 * MIB, "scatter", 0.0123456)), rank(0)]
    second = [rank(3, (1024, "a\x1b[2J", 2.5)), rank(3)]
    return admin_pb2.GetStatusResponse(
        gateway=admin_pb2.GatewayStatus(controller_connected=True),
        replicas=[
            admin_pb2.ReplicaStatus(name="alone", ranks=[rank(0)]),
            admin_pb2.ReplicaStatus(name="cut", ranks=first + second),
        ],
    )


def test_sums_off_a_terminal_are_a_line_for_each_size_of_each_stage() -> None:
    lines = [pairs(line) for line in status_lines(summing(), measured=True)]
    assert [line["event"] for line in lines] == ["gateway", *["rank"] * 5, *["sum"] * 3]
    base = {"event": "sum", "replica": "cut"}
    assert lines[6:] == [
        base | {"stage": "0", "num_bytes": "1024", "algorithm": "direct", "duration_s": "0.000052"},
        base | {"stage": "0", "num_bytes": "4194304", "algorithm": "scatter", "duration_s": "0.012346"},
        base | {"stage": "1", "num_bytes": "1024", "algorithm": r"a\x1b[2J", "duration_s": "2.500000"},
    ]


@pytest.mark.parametrize("width", [60, 240])
def test_sums_on_a_terminal_are_a_table_under_that_of_ranks(width: int) -> None:
    shown = Console(file=io.StringIO(), force_terminal=True, width=width, color_system=None)
    print_status(shown, summing(), measured=True)
    lines = [line.split() for line in output(shown).splitlines() if line.strip()]
    title = lines.index(["all-reduces", "within", "a", "stage"])
    assert lines[title + 1] == ["replica", "stage", "size", "algorithm", "time"]
    assert lines[title + 3 : title + 6] == [
        ["cut", "0", "1", "KiB", "direct", "0.052", "ms"],
        ["cut", "0", "4", "MiB", "scatter", "12.346", "ms"],
        ["cut", "1", "1", "KiB", r"a\x1b[2J", "2500.000", "ms"],
    ]
    assert lines[-1][0] == "gateway:"


def sharing() -> admin_pb2.GetStatusResponse:
    """A replica of two stages: one whose ranks overlap all-reduces, then one whose ranks share sequences."""
    overlap = [
        admin_pb2.MeasuredOverlap(num_tokens=64, alone_s=1e-3, overlapped_s=0.0012),
        admin_pb2.MeasuredOverlap(num_tokens=128, alone_s=2e-3, overlapped_s=0.0015, is_overlapped=True),
    ]
    expected = [
        admin_pb2.ExpectedExchange(num_tokens=512, num_before=0, way="all_gather", layer_s=0.0043211),
        admin_pb2.ExpectedExchange(num_tokens=512, num_before=8192, way="token_ring", layer_s=0.5),
    ]
    exchange = admin_pb2.MeasuredExchange(
        latency_s=2.7e-4, bytes_per_s=194_300_000.4, pairs_per_s=[223_000_000, 198_400_000], call_s=8e-5,
        expected=expected,
    )  # fmt: skip
    first = admin_pb2.RankStatus(first_layer=0, last_layer=3, overlap=overlap)
    second = admin_pb2.RankStatus(first_layer=3, last_layer=4, exchange=exchange)
    ranks = [first, admin_pb2.RankStatus(last_layer=3), second, admin_pb2.RankStatus(first_layer=3, last_layer=4)]
    return admin_pb2.GetStatusResponse(
        gateway=admin_pb2.GatewayStatus(controller_connected=True),
        replicas=[admin_pb2.ReplicaStatus(name="cut", ranks=ranks)],
    )


def test_overlap_and_exchanges_off_a_terminal_are_a_line_each() -> None:
    lines = [pairs(line) for line in status_lines(sharing(), measured=True)]
    base = {"event": "overlap", "replica": "cut", "stage": "0"}
    chunk = {"event": "expected_exchange", "replica": "cut", "stage": "1", "num_tokens": "512"}
    assert lines[5:] == [
        base | {
            "num_tokens": "64", "one_batch_s": "0.001000", "two_micro_batches_s": "0.001200", "micro_batches": "1",
        },
        base | {
            "num_tokens": "128", "one_batch_s": "0.002000", "two_micro_batches_s": "0.001500", "micro_batches": "2",
        },
        {
            "event": "exchange", "replica": "cut", "stage": "1", "latency_s": "0.000270", "bytes_per_s": "194300000",
            "pairs_per_s": "223000000,198400000", "call_s": "0.000080",
        },
        chunk | {"num_before": "0", "exchange": "all_gather", "layer_s": "0.004321"},
        chunk | {"num_before": "8192", "exchange": "token_ring", "layer_s": "0.500000"},
    ]  # fmt: skip


@pytest.mark.parametrize("width", [80, 240])
def test_overlap_and_exchanges_on_a_terminal_are_tables_of_their_own(width: int) -> None:
    shown = Console(file=io.StringIO(), force_terminal=True, width=width, color_system=None)
    print_status(shown, sharing(), measured=True)
    lines = [" ".join(line.split()) for line in output(shown).splitlines() if line.strip()]
    tables = [
        ["cut 0 64 1.000 ms 1.200 ms one", "cut 0 128 2.000 ms 1.500 ms two"],
        ["cut 1 0.270 ms 194.3 MB/s 223, 198 M/s 0.080 ms"],
        ["cut 1 512 0 all_gather 4.321 ms", "cut 1 512 8192 token_ring 500.000 ms"],
    ]
    headers = [
        "replica stage tokens one batch two micro-batches taken",
        "replica stage latency rate queries x tokens call",
        "replica stage tokens before exchange a layer",
    ]
    for header, rows in zip(headers, tables, strict=True):
        at = lines.index(header)
        assert lines[at + 2 : at + 2 + len(rows)] == rows
    assert lines[-1].startswith("gateway:")


@pytest.mark.parametrize("measured", [False, True])
def test_there_is_no_table_of_measurements_where_nothing_was_measured_or_asked_for(measured: bool) -> None:
    shown = console(terminal=True)
    print_status(shown, status() if measured else sharing(), measured=measured)
    assert not any(word in output(shown) for word in ("all-reduces", "micro-batch", "exchange"))
    assert not any("event=overlap" in line for line in status_lines(sharing()))


def test_status_lines_of_nothing_are_the_gateway_alone() -> None:
    assert len(list(status_lines(admin_pb2.GetStatusResponse()))) == 1


def mixed(dtype: str) -> admin_pb2.GetStatusResponse:
    ranks = [admin_pb2.RankStatus(rank=0, target="avx2"), admin_pb2.RankStatus(rank=1, target="cuda NVIDIA H200")]
    return admin_pb2.GetStatusResponse(dtype=dtype, replicas=[admin_pb2.ReplicaStatus(name="replica-0", ranks=ranks)])


MIXED = "The ranks of replica-0 have the targets avx2 and cuda NVIDIA H200: in bfloat16 answers depend on who computes."


def test_the_target_of_each_rank_is_shown_and_what_follows_where_they_differ() -> None:
    shown = console(terminal=True)
    print_status(shown, mixed("bfloat16"))
    assert MIXED in output(shown) and "target" in output(shown)
    _, first, second, note = [pairs(line) for line in status_lines(mixed("bfloat16"))]
    assert (first["target"], second["target"]) == ("avx2", "cuda NVIDIA H200")
    assert note == {"event": "mixed_targets", "replica": "replica-0", "effect": MIXED}
    document = status_document(mixed("bfloat16"))
    (replica,) = document["replicas"]
    assert document["dtype"] == "bfloat16" and replica["mixed_targets"] == MIXED
    assert [rank["target"] for rank in replica["ranks"]] == ["avx2", "cuda NVIDIA H200"]


@pytest.mark.parametrize("dtype", ["float32", ""])
def test_targets_that_differ_are_no_matter_otherwise(dtype: str) -> None:
    assert not any("mixed_targets" in line for line in status_lines(mixed(dtype)))
    assert "mixed_targets" not in status_document(mixed(dtype))["replicas"][0]


def test_roles_are_shown_where_any_replica_has_one_and_number_types_where_they_differ() -> None:
    ranks = [admin_pb2.RankStatus(rank=0)]
    replicas = [
        admin_pb2.ReplicaStatus(name=role, role=role, dtype=dtype, ranks=ranks)
        for role, dtype in (("prefill", "bfloat16"), ("decode", "float32"), ("mixed", "float32"))
    ]
    told = admin_pb2.GetStatusResponse(dtype="float32", replicas=replicas)
    lines = [shlex.split(line) for line in status_lines(told)][1:]
    assert [line[1:4] for line in lines] == [
        [f"replica={each.name}", f"role={each.role}", f"dtype={each.dtype}"] for each in replicas
    ]
    assert [(each["role"], each["dtype"]) for each in status_document(told)["replicas"]] == [
        ("prefill", "bfloat16"), ("decode", "float32"), ("mixed", "float32"),
    ]  # fmt: skip
    shown = console(terminal=True)
    print_status(shown, told)
    assert {"role", "dtype", "prefill", "decode", "mixed", "bfloat16"} <= set(output(shown).split())


def test_roles_and_number_types_that_all_replicas_have_are_not_shown() -> None:
    replicas = [
        admin_pb2.ReplicaStatus(name=name, role="mixed", dtype="float32", ranks=[admin_pb2.RankStatus(rank=0)])
        for name in ("a", "b")
    ]
    told = admin_pb2.GetStatusResponse(dtype="float32", replicas=replicas)
    assert not any("role=" in line or "dtype=" in line for line in status_lines(told))
    assert not any(each.keys() & {"role", "dtype"} for each in status_document(told)["replicas"])


def test_targets_that_differ_matter_by_the_number_type_of_the_replica() -> None:
    told = mixed("float32")
    told.replicas[0].dtype = "bfloat16"
    assert "answers depend on who computes" in status_document(told)["replicas"][0]["mixed_targets"]
