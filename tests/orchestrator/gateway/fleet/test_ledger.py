"""What a replica has to do between its reports, as the gateway knows it."""

from hypothesis import given
from hypothesis import strategies as st

from orchestrator.gateway.fleet.ledger import Ledger
from placement.planning.plan import Role
from placement.serving.routing.choice import ReplicaLoad
from protos.heterodyne.worker.v1 import worker_pb2 as pb

IDLE = pb.LoadReport(free_blocks=10, total_blocks=10)


def load(ledger: Ledger, report: pb.LoadReport = IDLE) -> ReplicaLoad:
    return ledger.load(report, accepting=True)


def test_what_is_bound_counts_until_a_report_has_as_many_sequences() -> None:
    ledger = Ledger("a", role=Role.DECODE, block_size=4)
    ledger.add(1, 40)
    assert (load(ledger).pending_tokens, load(ledger).num_waiting) == (40, 1)
    assert (load(ledger).role, load(ledger).block_size) == (Role.DECODE, 4)
    ledger.reported(IDLE)
    assert load(ledger).pending_tokens == 40, "that report may be older"
    knows = pb.LoadReport(num_running=1, pending_tokens=33, free_blocks=5, total_blocks=10)
    ledger.reported(knows)
    assert (load(ledger, knows).pending_tokens, load(ledger, knows).num_waiting) == (33, 0)


def test_requests_that_ended_since_the_report_leave_no_trace() -> None:
    ledger = Ledger("a", block_size=4)
    for number in range(100):
        ledger.add(number, 7)
        ledger.begun(number)
        assert load(ledger).pending_tokens == 1
        assert ledger.ended(number, 9) and not ledger.ended(number, 9)
    assert load(ledger).num_sequences == 0 and load(ledger).pending_tokens == 0


def test_the_end_of_a_sequence_that_was_reported_frees_its_place_and_blocks_at_once() -> None:
    ledger = Ledger("a", block_size=4)
    for number in (1, 2):
        ledger.add(number, 7)
    report = pb.LoadReport(num_running=2, pending_tokens=2, free_blocks=3, total_blocks=10)
    ledger.reported(report)
    ledger.ended(1, 12)
    after = load(ledger, report)
    assert (after.num_running, after.pending_tokens, after.prompt_tokens, after.free_blocks) == (1, 1, 0, 6)
    ledger.reported(report)
    assert load(ledger, report).num_running == 2, "a report is believed"


def test_prompts_that_steps_computed_since_the_report_are_no_longer_pending() -> None:
    ledger = Ledger("a")
    report = pb.LoadReport(num_running=1, num_waiting=1, pending_tokens=100, total_blocks=10)
    ledger.reported(report)
    ledger.computed(64)
    assert load(ledger, report).pending_tokens == 36
    ledger.computed(64)
    assert load(ledger, report).pending_tokens == 1


def test_a_pair_takes_blocks_where_the_answer_is_computed() -> None:
    ledger = Ledger("a", block_size=4)
    ledger.add("bound", 2, num_sequences=2, num_blocks=6)
    assert (load(ledger).free_blocks, load(ledger).num_waiting) == (4, 2)
    ledger.drop("bound")
    assert load(ledger).free_blocks == 10 and not load(ledger).num_sequences


def test_what_was_shipped_is_taken_from_those_whose_keys_and_values_move_and_not_from_those_that_run() -> None:
    ledger = Ledger("a", block_size=4)
    ledger.add("own", 7)
    ledger.add("helped", 7, is_shipped=True)
    report = pb.LoadReport(num_running=1, num_waiting=1, num_moving=1, pending_tokens=9, total_blocks=10)
    ledger.reported(report)
    assert ledger.ended("helped")
    after = load(ledger, report)
    assert (after.num_running, after.num_waiting, after.num_moving, after.pending_tokens) == (1, 1, 0, 9)


def test_what_was_shipped_and_is_not_in_the_report_any_more_is_taken_from_nothing() -> None:
    ledger = Ledger("a", block_size=4)
    for key in ("first", "second"):
        ledger.add(key, 7, is_shipped=True)
    ledger.add("own", 7)
    both = pb.LoadReport(num_running=1, num_moving=2, pending_tokens=1, total_blocks=10)
    ledger.reported(both)
    later = pb.LoadReport(num_running=1, num_moving=1, pending_tokens=1, total_blocks=10)
    ledger.reported(later)
    ledger.ended("first")
    assert (load(ledger, later).num_running, load(ledger, later).num_moving) == (1, 1), "its first token came late"
    ledger.ended("second")
    assert (load(ledger, later).num_running, load(ledger, later).num_moving) == (1, 0)


def test_what_was_shipped_since_a_report_in_which_its_prompt_was_computed_no_longer_counts_there() -> None:
    ledger = Ledger("a", block_size=4)
    ledger.add(1, 7, is_shipped=True)
    report = pb.LoadReport(num_running=1, pending_tokens=7, total_blocks=10)
    ledger.reported(report)
    ledger.computed(7)
    ledger.ended(1)
    assert load(ledger, report).num_sequences == load(ledger, report).pending_tokens == 0


def test_what_is_cancelled_while_its_keys_and_values_move_no_longer_counts() -> None:
    ledger = Ledger("a", block_size=4)
    ledger.add(1, 1, num_blocks=3)
    report = pb.LoadReport(num_moving=1, pending_tokens=1, free_blocks=7, total_blocks=10)
    ledger.reported(report)
    assert load(ledger, report).free_blocks == 7, "the report knows of its blocks"
    ledger.ended(1, 12)
    after = load(ledger, report)
    assert (after.num_sequences, after.pending_tokens, after.free_blocks) == (0, 0, 10)


ACTIONS = st.lists(st.tuples(st.sampled_from(("add", "begun", "ended", "computed", "reported")), st.integers(0, 5)))


@given(ACTIONS)
def test_no_figure_is_ever_negative_and_nothing_is_left_once_all_have_ended(actions: list[tuple[str, int]]) -> None:
    ledger, report, there = Ledger("a", block_size=4), IDLE, set[int]()
    for action, number in actions:
        match action:
            case "add" if number not in there:
                ledger.add(number, 10, is_shipped=number % 2 == 1)
                there.add(number)
            case "begun":
                ledger.begun(number)
            case "ended":
                assert ledger.ended(number, 10) == (number in there)
                there.discard(number)
            case "computed":
                ledger.computed(number)
            case "reported":
                report = pb.LoadReport(
                    num_running=len(there), pending_tokens=10 * len(there), free_blocks=5, total_blocks=10
                )
                ledger.reported(report)
        found = load(ledger, report)
        assert found.num_running >= 0 and found.num_waiting >= 0 and 0 <= found.free_blocks <= 10
        assert found.prompt_tokens >= 0 and found.num_sequences >= len(there)
    for number in there:
        ledger.ended(number, 10)
    ledger.reported(IDLE)
    assert load(ledger).num_sequences == load(ledger).pending_tokens == 0
