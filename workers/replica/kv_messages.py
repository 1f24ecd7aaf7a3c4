"""Converts commands about transfers of keys and values to messages between the ranks of a replica and back. Pure."""

from itertools import chain, pairwise

from google.protobuf.message import DecodeError

from placement.errors import InvalidRequest
from placement.model.part import Span
from placement.model.specs import ModelSpec
from protos.codec.replica_ranks import kv_format_message, ranks_message, read_kv_format, read_ranks, read_transfer_id
from protos.heterodyne.worker.v1 import worker_pb2 as pb
from workers.kv_transfer.awaited import Expected
from workers.kv_transfer.sender import Target
from workers.transport.errors import BadFrame


def expect_message(expected: Expected) -> pb.KvCommand:
    """Returns the command that has a rank expect keys and values."""
    return pb.KvCommand(
        expect=pb.KvExpect(
            transfer_id=expected.transfer_id,
            source=ranks_message(expected.source),
            tokens=_range(expected.tokens),
            runs=chain.from_iterable(expected.runs),
            format=kv_format_message(expected.format),
        )
    )


def open_message(target: Target) -> pb.KvCommand:
    """Returns the command that has a rank get ready to send keys and values."""
    return pb.KvCommand(
        open=pb.KvOpen(
            transfer_id=target.transfer_id,
            target=ranks_message(target.ranks),
            tokens=_range(target.tokens),
            format=kv_format_message(target.format),
        )
    )


def read_expected(message: pb.KvExpect, model: ModelSpec, slot_limit: int) -> Expected:
    """Reads what a rank is to expect. Raises InvalidRequest for what no leader of this replica would say."""
    runs = tuple(pairwise(message.runs))[::2]
    if len(message.runs) % 2 or not all(0 <= start < stop <= slot_limit for start, stop in runs):
        raise InvalidRequest(
            field="runs",
            value=list(message.runs[:8]),
            problem=f"are not ranges within {slot_limit} slots",
            fix="Run the same version on every rank.",
        )
    return Expected(
        transfer_id=read_transfer_id(message.transfer_id),
        source=read_ranks(message.source, model),
        tokens=Span(message.tokens.start, message.tokens.stop),
        runs=runs,
        format=read_kv_format(message.format),
    )


def read_target(message: pb.KvOpen, model: ModelSpec) -> Target:
    """Reads where a rank is to send keys and values. Raises InvalidRequest."""
    return Target(
        transfer_id=read_transfer_id(message.transfer_id),
        ranks=read_ranks(message.target, model),
        tokens=Span(message.tokens.start, message.tokens.stop),
        format=read_kv_format(message.format),
    )


def parse(payload: memoryview) -> pb.KvCommand:
    """Reads a command. Raises BadFrame."""
    try:
        return pb.KvCommand.FromString(bytes(payload))
    except DecodeError as error:
        raise BadFrame("a KV_COMMAND frame holds no command") from error


def _range(span: Span) -> pb.Range:
    return pb.Range(start=span.start, stop=span.stop)
