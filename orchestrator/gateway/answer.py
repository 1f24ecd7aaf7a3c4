"""One accepted request: a replica's events go in, the client's messages come out. Decides, sends nothing."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from google.rpc import code_pb2

from orchestrator.gateway.journal import Journal, JournalEntry, JournalError, Recorded
from orchestrator.gateway.leader import Lost, SequenceEvent
from orchestrator.gateway.request import Request
from orchestrator.gateway.status import ReplicaFault, ReplicaUnavailable, code_of
from orchestrator.gateway.text import TextStream
from placement.errors import HeterodyneError
from protos.heterodyne.v1 import inference_pb2 as pb
from protos.heterodyne.worker.v1 import worker_pb2

logger = logging.getLogger(__name__)

_NOT_NOW = (code_pb2.FAILED_PRECONDITION, code_pb2.UNAVAILABLE, code_pb2.RESOURCE_EXHAUSTED)
_REASONS = {
    worker_pb2.END_REASON_STOP: pb.FINISH_REASON_STOP,
    worker_pb2.END_REASON_LENGTH: pb.FINISH_REASON_LENGTH,
}


@dataclass(slots=True, kw_only=True)
class Clock:
    """When things happened, in seconds since the request arrived. None means not yet."""

    queue_s: float | None = None
    first_token_s: float | None = None
    last_token_s: float | None = None
    total_s: float | None = None

    def per_token_s(self, num_tokens: int) -> float | None:
        """Mean time between the tokens after the first."""
        if self.first_token_s is None or self.last_token_s is None or num_tokens < 2:
            return None
        return (self.last_token_s - self.first_token_s) / (num_tokens - 1)

    def message(self, num_tokens: int) -> pb.Timings:
        """The timings as clients see them."""
        return pb.Timings(
            queue_s=self.queue_s,
            time_to_first_token_s=self.first_token_s,
            time_per_output_token_s=self.per_token_s(num_tokens),
            total_s=self.total_s,
        )


class Answer:
    """The state of one accepted request.

    Args:
        epoch: of the incarnation whose events it is given; once the journal has moved the request on, they are fenced.

    Attributes:
        outcome: set when it has ended, by a finish reason or an error.
        at_replica: whether the replica still computes it, so that leaving means cancelling.
    """

    def __init__(
        self, *, request: Request, entry: JournalEntry, epoch: int, journal: Journal, text: TextStream
    ) -> None:
        self.entry = entry
        self.clock = Clock()
        self.outcome: pb.FinishReason.ValueType | HeterodyneError | None = None
        self.at_replica = True
        self.request = request
        self._epoch = epoch
        self._journal = journal
        self._text = text
        self._matched_stop: str | None = None

    def take(self, events: Sequence[SequenceEvent], *, submitted_s: float, now_s: float) -> pb.Chunk | None:
        """Take what the replica said; returns what the client should see of it, if anything.

        Args:
            submitted_s: when the sequence went to the replica, in seconds since the request arrived.
            now_s: the present, likewise.
        """
        chunk = pb.Chunk(first_index=len(self.entry.emitted_ids))
        for event in events:
            if self.outcome is not None:
                break
            match event:
                case worker_pb2.SequenceOutput():
                    self._take_output(event, chunk, submitted_s, now_s)
                case worker_pb2.Rejected():
                    self.at_replica = False
                    self.outcome = self._refused(event)
                case Lost():
                    # The cause names processes and addresses: it is in the log and the status.
                    self.at_replica = False
                    self.outcome = ReplicaUnavailable(f"{self.entry.replica} was lost; the request may be sent again")
        return chunk if chunk.tokens or chunk.text else None

    def _refused(self, event: worker_pb2.Rejected) -> HeterodyneError:
        """A refusal that another replica, or a later time, could mend is not the request's fault."""
        logger.warning('sequence_refused replica=%s message="%s"', self.entry.replica, event.message)
        if event.code in _NOT_NOW:
            return ReplicaUnavailable(f"{self.entry.replica} takes no requests at present; send it again")
        return ReplicaFault(f"{self.entry.replica} refused the request")

    def _take_output(
        self, output: worker_pb2.SequenceOutput, chunk: pb.Chunk, submitted_s: float, now_s: float
    ) -> None:
        if output.HasField("queue_s"):
            self.clock.queue_s = submitted_s + output.queue_s
        if output.HasField("index"):
            self._take_token(output, chunk, now_s)
        if output.HasField("end"):
            self.at_replica = False
            if self.outcome is None:
                self._end(output.end, chunk)

    def _take_token(self, output: worker_pb2.SequenceOutput, chunk: pb.Chunk, now_s: float) -> None:
        entry = self.entry
        try:
            recorded = self._journal.record(entry.sequence_id, self._epoch, output.index, output.token_id)
        except JournalError as error:
            self.outcome = ReplicaFault(str(error))
            return
        if recorded is not Recorded.NEW:
            return
        if self.clock.first_token_s is None:
            self.clock.first_token_s = now_s
        self.clock.last_token_s = now_s
        token = chunk.tokens.add(id=output.token_id)
        if output.HasField("logprob"):
            token.logprob = output.logprob
            for token_id, logprob in zip(output.top_ids, output.top_logprobs, strict=True):
                token.top.add(token_id=token_id, logprob=logprob)
        delta = self._text.push(output.token_id)
        chunk.text += delta.text
        if delta.matched_stop is not None:
            self._matched_stop = delta.matched_stop
            self.outcome = pb.FINISH_REASON_STOP

    def _end(self, end: worker_pb2.End, chunk: pb.Chunk) -> None:
        if end.reason in _REASONS:
            rest = self._text.finish()
            chunk.text += rest.text
            self._matched_stop = rest.matched_stop
            self.outcome = pb.FINISH_REASON_STOP if rest.matched_stop else _REASONS[end.reason]
        elif end.reason == worker_pb2.END_REASON_FAILED:
            # The detail is for the operator: it may name files, and clients are not to see those.
            logger.error('sequence_failed replica=%s detail="%s"', self.entry.replica, end.detail)
            self.outcome = ReplicaUnavailable(f"{self.entry.replica} failed while it computed the request")
        else:
            self.outcome = ReplicaFault("the replica ended the sequence without being asked")

    def fail(self, error: HeterodyneError) -> None:
        """End it from this side."""
        if self.outcome is None:
            self.outcome = error

    def finished(self) -> pb.Finished:
        """The terminal message. Only once ``outcome`` is set."""
        assert self.outcome is not None
        message = pb.Finished(
            usage=pb.Usage(prompt_tokens=len(self.request.prompt_ids), completion_tokens=len(self.entry.emitted_ids)),
            timings=self.clock.message(len(self.entry.emitted_ids)),
            matched_stop=self._matched_stop,
            replica=self.entry.replica,
        )
        if isinstance(self.outcome, HeterodyneError):
            message.error.CopyFrom(pb.Error(code=code_of(self.outcome), message=str(self.outcome)))
        else:
            message.finish_reason = self.outcome
        return message
