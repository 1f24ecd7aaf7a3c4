"""What waits for a gateway: all of it in order, and never more than fits."""

import asyncio

from hypothesis import given, settings
from hypothesis import strategies as st

from protos.heterodyne.worker.v1 import worker_pb2 as pb
from workers.service.outbox import Outbox


def message(number: int, size: int = 0) -> pb.LeadResponse:
    return pb.LeadResponse(rejected=pb.Rejected(sequence_id=number, message="x" * size))


async def test_messages_come_out_in_order_and_none_after_the_last() -> None:
    outbox = Outbox()
    for number in range(5):
        assert outbox.put(message(number))
    outbox.close()
    found = [taken.rejected.sequence_id for _ in range(5) if (taken := await outbox.take()) is not None]
    assert found == list(range(5))
    assert await outbox.take() is None and await outbox.take() is None


async def test_a_reader_that_waits_is_woken_by_a_message_and_by_the_end() -> None:
    outbox = Outbox()
    for act, expected in ((lambda: outbox.put(message(7)), message(7)), (outbox.close, None)):
        reading = asyncio.create_task(outbox.take())
        await asyncio.sleep(0)
        assert not reading.done()
        act()
        assert await asyncio.wait_for(reading, 10.0) == expected


async def test_a_message_alone_is_kept_whatever_its_size() -> None:
    outbox = Outbox(max_bytes=10)
    assert outbox.put(message(1, size=1000))
    assert not outbox.put(message(2))
    assert await outbox.take() is not None
    assert outbox.put(message(2))


@settings(deadline=None)
@given(st.lists(st.one_of(st.none(), st.integers(0, 60)), max_size=60), st.integers(1, 8), st.integers(1, 200))
def test_no_more_waits_than_fits_and_nothing_is_lost(puts: list[int | None], max_messages: int, max_bytes: int) -> None:
    """Puts messages of these sizes, and takes one at each None."""
    waiting: list[pb.LeadResponse] = []

    async def run() -> None:
        outbox = Outbox(max_messages=max_messages, max_bytes=max_bytes)
        for number, size in enumerate(puts):
            if size is None:
                if waiting:
                    assert await outbox.take() == waiting.pop(0)
                continue
            new = message(number, size)
            total = sum(other.ByteSize() for other in [*waiting, new])
            fits = not waiting or (len(waiting) < max_messages and total <= max_bytes)
            assert outbox.put(new) == fits
            if fits:
                waiting.append(new)
        outbox.close()
        while waiting:
            assert await outbox.take() == waiting.pop(0)
        assert await outbox.take() is None

    asyncio.run(run())
