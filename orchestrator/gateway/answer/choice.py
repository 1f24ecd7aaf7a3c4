"""One choice of a request: the outputs of its sequence go in, its part of the client's chunks comes out. Pure."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from orchestrator.brief import brief
from orchestrator.gateway.answer.text import TextStream
from orchestrator.gateway.errors import ReplicaFault, ReplicaUnavailable
from orchestrator.gateway.fleet.journal import Journal, JournalEntry, JournalError, Recorded
from placement.errors import HeterodyneError
from protos.heterodyne.v1 import inference_pb2 as pb
from protos.heterodyne.worker.v1 import worker_pb2

logger = logging.getLogger(__name__)

# Of what a worker says of its own failure: an error of the device's library is long.
_DETAIL_CHARACTERS = 500

_REASONS = {
    worker_pb2.END_REASON_STOP: pb.FINISH_REASON_STOP,
    worker_pb2.END_REASON_LENGTH: pb.FINISH_REASON_LENGTH,
}


@dataclass(slots=True, kw_only=True)
class ChoiceClock:
    """When things happened to a choice, in seconds since the request arrived. None means not yet."""

    queue_s: float | None = None
    first_token_s: float | None = None
    last_token_s: float | None = None


class Choice:
    """The state of one choice.

    Args:
        index: which of the request's choices, from 0.
        epoch: of the incarnation whose outputs it is given; they are fenced once the journal has moved the sequence on.
        max_tokens: 0 where only the prompt was asked about; the one token that comes then is dropped.

    Attributes:
        entry: its sequence in the journal, where its tokens are.
        end: how it ended; None while it goes on, or when it failed.
        failure: why it failed.
        at_replica: whether the replica still computes it, so that leaving means cancelling.
        cached_tokens: prompt tokens found in the prefix cache; None before the prompt was computed.
    """

    def __init__(
        self, *, index: int, entry: JournalEntry, epoch: int, max_tokens: int, journal: Journal, text: TextStream
    ) -> None:
        self.entry = entry
        self.clock = ChoiceClock()
        self.end: pb.ChoiceEnd | None = None
        self.failure: HeterodyneError | None = None
        self.at_replica = True
        self.cached_tokens: int | None = None
        self._index = index
        self._epoch = epoch
        self._max_tokens = max_tokens
        self._journal = journal
        self._text = text

    @property
    def over(self) -> bool:
        """Whether it ended, well or not."""
        return self.end is not None or self.failure is not None

    def take(
        self, outputs: Sequence[worker_pb2.SequenceOutput], *, submitted_s: float, now_s: float
    ) -> pb.GenerateResponse | None:
        """Take what the replica computed; returns what the client should see of it. None where that is nothing.

        Not to be called once it is over. This is done for every token of every stream: it is as short as it can be.

        Args:
            submitted_s: when the sequence went to the replica, in seconds since the request arrived.
            now_s: the present, likewise.
        """
        response = pb.GenerateResponse()
        chunk = response.chunk
        chunk.choice, chunk.first_index = self._index, len(self.entry.emitted_ids)
        token_ids: list[int] = []
        last: worker_pb2.End | None = None
        error: JournalError | None = None
        for output in outputs:
            if self.clock.first_token_s is None:
                self._note_start(output, submitted_s)
            if output.HasField("index") and self._max_tokens:
                try:
                    self._take_token(output, chunk, token_ids)
                except JournalError as broken:
                    error = broken
                    break
            if output.HasField("end"):
                self.at_replica, last = False, output.end
        if token_ids:
            self._push(token_ids, chunk, now_s)
        if self.end is None and error is not None:
            self.failure = ReplicaFault(str(error))
        elif self.end is None and last is not None:
            self._finish(last, chunk)
        if self.end is not None:
            chunk.end.CopyFrom(self.end)
        return response if token_ids or self.end is not None else None

    def _note_start(self, output: worker_pb2.SequenceOutput, submitted_s: float) -> None:
        if output.HasField("queue_s"):
            self.clock.queue_s = submitted_s + output.queue_s
        if output.HasField("cached_tokens"):
            self.cached_tokens = output.cached_tokens

    def _take_token(self, output: worker_pb2.SequenceOutput, chunk: pb.Chunk, token_ids: list[int]) -> None:
        """Raises JournalError where the replica broke the order of tokens."""
        token_id = output.token_id
        if self._journal.record(self.entry.sequence_id, self._epoch, output.index, token_id) is not Recorded.NEW:
            return
        token_ids.append(token_id)
        token = chunk.tokens.add(id=token_id)
        if output.HasField("logprob"):
            token.logprob = output.logprob
            for top_id, logprob in zip(output.top_ids, output.top_logprobs, strict=True):
                token.top.add(token_id=top_id, logprob=logprob)

    def _push(self, token_ids: list[int], chunk: pb.Chunk, now_s: float) -> None:
        """Turn the new tokens into text; a stop string ends it, and what came after it was never there."""
        if self.clock.first_token_s is None:
            self.clock.first_token_s = now_s
        self.clock.last_token_s = now_s
        delta = self._text.push(*token_ids)
        chunk.text = delta.text
        if delta.matched_stop is not None:
            if num_beyond := len(token_ids) - delta.num_tokens:
                del chunk.tokens[delta.num_tokens :]
                self._journal.trim(self.entry.sequence_id, len(self.entry.emitted_ids) - num_beyond)
            self._end(pb.FINISH_REASON_STOP, delta.matched_stop)

    def _finish(self, end: worker_pb2.End, chunk: pb.Chunk) -> None:
        if end.reason in _REASONS and not self._max_tokens:
            self._end(pb.FINISH_REASON_LENGTH, None)
        elif end.reason in _REASONS:
            rest = self._text.finish()
            chunk.text += rest.text
            self._end(pb.FINISH_REASON_STOP if rest.matched_stop else _REASONS[end.reason], rest.matched_stop)
        elif end.reason == worker_pb2.END_REASON_FAILED:
            # The detail is for the operator: it may name files, and clients are not to see those.
            logger.error(
                'sequence_failed replica=%s detail="%s"', self.entry.replica, brief(end.detail, _DETAIL_CHARACTERS)
            )
            self.failure = ReplicaUnavailable(f"{self.entry.replica} failed while it computed the request")
        else:
            self.failure = ReplicaFault("the replica ended the sequence without being asked")

    def _end(self, reason: pb.FinishReason.ValueType, matched_stop: str | None) -> None:
        self.end = pb.ChoiceEnd(
            finish_reason=reason, matched_stop=matched_stop, completion_tokens=len(self.entry.emitted_ids)
        )
