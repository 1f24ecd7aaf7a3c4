import pytest

from workers.transport.errors import BadFrame
from workers.transport.frames import HEADER_BYTES, Kind, header, parse


def _header(payload: bytes = b"payload", *, epoch: int = 7, number: int = 3) -> bytes:
    return header(Kind.TENSOR, memoryview(payload), epoch=epoch, number=number)


def test_a_header_says_what_follows() -> None:
    parsed = parse(_header(), epoch=7, number=3)
    assert (parsed.kind, parsed.length, len(_header())) == (Kind.TENSOR, 7, HEADER_BYTES)
    parsed.check(memoryview(b"payload"))


def test_a_damaged_payload_is_refused() -> None:
    with pytest.raises(BadFrame, match="damaged"):
        parse(_header(), epoch=7, number=3).check(memoryview(b"paylobd"))


@pytest.mark.parametrize("bit", range(8 * HEADER_BYTES))
def test_no_bit_of_a_header_can_be_flipped_unseen(bit: int) -> None:
    damaged = bytearray(_header())
    damaged[bit // 8] ^= 1 << bit % 8
    with pytest.raises(BadFrame):
        parsed = parse(bytes(damaged), epoch=7, number=3)
        parsed.check(memoryview(b"payload"))
        # The length is checked against the memory that waits for the payload.
        if parsed.length != 7:
            raise BadFrame("another length")


@pytest.mark.parametrize(
    ("epoch", "number", "said"), [(8, 3, "fenced"), (7, 4, "frame 3 came where 4 was due"), (7, 2, "where 2 was due")]
)
def test_a_frame_of_another_time_is_refused(epoch: int, number: int, said: str) -> None:
    with pytest.raises(BadFrame, match=said):
        parse(_header(), epoch=epoch, number=number)


def test_what_is_no_frame_is_refused() -> None:
    with pytest.raises(BadFrame, match="no frame"):
        parse(b"\x80\x04" + bytes(HEADER_BYTES - 2), epoch=7, number=3)
