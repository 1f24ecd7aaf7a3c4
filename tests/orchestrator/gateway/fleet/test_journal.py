import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.gateway.fleet.journal import Journal, JournalEntry, Recorded, TokenConflict, TokenGap
from protos.heterodyne.worker.v1 import worker_pb2

SAMPLING = worker_pb2.Sampling(temperature=0.7, top_k=40, top_p=0.9)


def make_entry(sequence_id: int = 1, *, replica: str = "a", epoch: int = 3) -> JournalEntry:
    return JournalEntry(
        request_id=f"req-{sequence_id}",
        sequence_id=sequence_id,
        replica=replica,
        epoch=epoch,
        prompt_ids=(5, 6),
        sampling=SAMPLING,
        seed=7,
        max_tokens=8,
        stop_token_ids=(2,),
        priority=0,
    )


def open_journal(*entries: JournalEntry) -> Journal:
    journal = Journal()
    for entry in entries:
        journal.open(entry)
    return journal


def test_tokens_in_order_are_new_and_kept() -> None:
    entry = make_entry()
    journal = open_journal(entry)
    assert [journal.record(1, 3, i, 10 + i) for i in range(3)] == [Recorded.NEW] * 3
    assert entry.emitted_ids == [10, 11, 12]


def test_repeated_token_is_a_duplicate_and_not_kept_twice() -> None:
    entry = make_entry()
    journal = open_journal(entry)
    journal.record(1, 3, 0, 10)
    assert journal.record(1, 3, 0, 10) is Recorded.DUPLICATE
    assert entry.emitted_ids == [10]


def test_token_beyond_the_next_position_is_a_gap() -> None:
    entry = make_entry()
    journal = open_journal(entry)
    with pytest.raises(TokenGap) as caught:
        journal.record(1, 3, 1, 10)
    assert (caught.value.sequence_id, caught.value.index, caught.value.expected) == (1, 1, 0)
    assert entry.emitted_ids == []


def test_other_token_at_a_delivered_position_is_a_conflict() -> None:
    entry = make_entry()
    journal = open_journal(entry)
    journal.record(1, 3, 0, 10)
    with pytest.raises(TokenConflict):
        journal.record(1, 3, 0, 11)
    assert entry.emitted_ids == [10]


@pytest.mark.parametrize("epoch", [2, 4])
def test_token_of_another_epoch_is_fenced_and_counted(epoch: int) -> None:
    entry = make_entry(epoch=3)
    journal = open_journal(entry)
    assert journal.record(1, epoch, 5, 10) is Recorded.FENCED  # its position is not even looked at
    assert journal.num_fenced == 1 and entry.emitted_ids == []


def test_token_of_a_closed_sequence_is_neither_new_nor_fenced() -> None:
    entry = make_entry()
    journal = open_journal(entry)
    assert journal.close(1) is entry
    assert journal.record(1, 3, 0, 10) is Recorded.CLOSED
    assert journal.num_fenced == 0


def test_closing_twice_is_harmless() -> None:
    journal = open_journal(make_entry())
    assert len(journal) == 1
    journal.close(1)
    assert journal.close(1) is None
    assert len(journal) == 0


def test_sequence_id_is_opened_once() -> None:
    journal = open_journal(make_entry())
    with pytest.raises(AssertionError):
        journal.open(make_entry())


def test_on_replica_lists_what_one_incarnation_owns() -> None:
    entries = [make_entry(1), make_entry(2, epoch=4), make_entry(3, replica="b"), make_entry(4)]
    journal = open_journal(*entries)
    assert journal.on_replica("a", 3) == [entries[0], entries[3]]
    assert journal.on_replica("c", 3) == []


def test_moved_sequence_goes_on_at_the_next_position_and_fences_its_old_replica() -> None:
    entry = make_entry(epoch=3)
    journal = open_journal(entry)
    journal.record(1, 3, 0, 10)
    assert journal.move(1, replica="b", epoch=9) is entry
    assert journal.on_replica("a", 3) == [] and journal.on_replica("b", 9) == [entry]
    assert journal.record(1, 3, 1, 66) is Recorded.FENCED
    assert journal.record(1, 9, 0, 10) is Recorded.DUPLICATE  # the new replica replays
    assert journal.record(1, 9, 1, 11) is Recorded.NEW
    assert entry.emitted_ids == [10, 11]


def test_tokens_past_a_stop_string_were_never_there() -> None:
    entry = make_entry()
    journal = open_journal(entry)
    for index in range(4):
        journal.record(1, 3, index, 10 + index)
    journal.trim(1, 2)
    assert entry.emitted_ids == [10, 11]


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(1, 3), st.integers(0, 6)), max_size=40))
def test_client_sees_each_token_once_and_in_order(messages: list[tuple[int, int]]) -> None:
    """Messages of any epoch at any position: what is NEW is always the next token of the one true answer."""
    answer = [100 + i for i in range(7)]
    journal = open_journal(make_entry(epoch=1))
    delivered: list[int] = []
    current = fenced = 0
    for number, (epoch, index) in enumerate(messages):
        current = 1 + number // 10
        journal.move(1, replica="a", epoch=current)
        try:
            # A fenced replica says anything.
            recorded = journal.record(1, epoch, index, answer[index] if epoch == current else 0)
        except TokenGap:
            assert epoch == current and index > len(delivered)
            continue
        fenced += recorded is Recorded.FENCED
        assert (recorded is Recorded.FENCED) == (epoch != current)
        if recorded is Recorded.NEW:
            delivered.append(answer[index])
    assert delivered == answer[: len(delivered)]
    assert journal.num_fenced == fenced
