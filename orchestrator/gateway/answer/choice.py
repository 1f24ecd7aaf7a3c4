"""One choice of a request: the outputs of its sequence go in, what the client is sent of them comes out. Pure."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from orchestrator.brief import brief
from orchestrator.gateway.answer.text import TextStream
from orchestrator.gateway.client import ChoiceEnd, Delta, FinishReason, TokenScore
from orchestrator.gateway.errors import ReplicaFault, ReplicaUnavailable
from orchestrator.gateway.fleet.journal import Journal, JournalEntry, JournalError, Recorded
from orchestrator.gateway.request.structured import cannot_be_followed
from placement.errors import HeterodyneError
from protos.codec.log_record import said
from protos.heterodyne.worker.v1 import worker_pb2

logger = logging.getLogger(__name__)

# Of what a worker says of its own failure: an error of the device's library is long.
_DETAIL_CHARACTERS = 500

_REASONS = {
    worker_pb2.END_REASON_STOP: FinishReason.STOP,
    worker_pb2.END_REASON_LENGTH: FinishReason.LENGTH,
}


@dataclass(slots=True, kw_only=True)
class ChoiceClock:
    """Notes when things happened to a choice, in seconds since the request arrived. None means not yet."""

    queue_s: float | None = None
    first_token_s: float | None = None
    last_token_s: float | None = None


class Choice:
    """Holds the state of one choice.

    Args:
        index: which of the request's choices this is, from 0.
        epoch: the incarnation whose outputs are given to it; once the journal has moved the sequence on, they are
            fenced.
        max_tokens: 0 where only the prompt was asked about; the one token that comes then is dropped.
        grammar: what its answer must match.

    Attributes:
        entry: its sequence in the journal, where its tokens are.
        end: how it ended; None while it goes on, or when it failed.
        failure: why it failed.
        at_replica: whether the replica still computes it, so that leaving means cancelling.
        cached_tokens: prompt tokens found in the prefix cache; None before the prompt was computed.
        transfer: what became of the keys and values that another replica was to send, once that is known.
    """

    def __init__(
        self,
        *,
        index: int,
        entry: JournalEntry,
        epoch: int,
        max_tokens: int,
        journal: Journal,
        text: TextStream,
        grammar: worker_pb2.Grammar | None = None,
    ) -> None:
        self.entry = entry
        self.clock = ChoiceClock()
        self.end: ChoiceEnd | None = None
        self.failure: HeterodyneError | None = None
        self.at_replica = True
        self.cached_tokens: int | None = None
        self.transfer: worker_pb2.KvTransfer | None = None
        self._index = index
        self._epoch = epoch
        self._max_tokens = max_tokens
        self._journal = journal
        self._text = text
        self._grammar = grammar

    @property
    def over(self) -> bool:
        """Says whether it ended, well or not."""
        return self.end is not None or self.failure is not None

    def take(self, outputs: Sequence[worker_pb2.SequenceOutput], *, submitted_s: float, now_s: float) -> Delta | None:
        """Takes what the replica computed; returns what the client is sent of it, None where that is nothing.

        It is not called again once the choice is over. This runs for every token of every stream: it is as short as it
        can be.

        Args:
            submitted_s: when the sequence went to the replica, in seconds since the request arrived.
            now_s: the present, likewise.
        """
        first_index, text = len(self.entry.emitted_ids), ""
        token_ids: list[int] = []
        scores: dict[int, TokenScore] = {}
        last: worker_pb2.End | None = None
        error: JournalError | None = None
        for output in outputs:
            if self.clock.first_token_s is None:
                self._note_start(output, submitted_s, now_s)
            if output.HasField("index") and self._max_tokens:
                try:
                    self._take_token(output, token_ids, scores)
                except JournalError as broken:
                    error = broken
                    break
            if output.HasField("end"):
                self.at_replica, last = False, output.end
        if token_ids:
            text = self._push(token_ids, now_s)
        if self.end is None and error is not None:
            self.failure = ReplicaFault(str(error))
        elif self.end is None and last is not None:
            text += self._finish(last)
        if not token_ids and self.end is None:
            return None
        return Delta(
            choice=self._index, first_index=first_index, token_ids=token_ids, scores=scores, text=text, end=self.end
        )

    def _note_start(self, output: worker_pb2.SequenceOutput, submitted_s: float, now_s: float) -> None:
        if output.HasField("queue_s"):
            self.clock.queue_s = submitted_s + output.queue_s
        if output.HasField("cached_tokens"):
            self.cached_tokens = output.cached_tokens
        if output.HasField("transfer"):
            self.transfer = transfer = output.transfer
            if not transfer.problem and transfer.num_tokens:
                # The other replica's prefill began so long ago: clocks of two machines are not compared.
                self.clock.queue_s = max(submitted_s, now_s - transfer.prefill_s - transfer.exposed_s)

    def _take_token(
        self, output: worker_pb2.SequenceOutput, token_ids: list[int], scores: dict[int, TokenScore]
    ) -> None:
        """Raises JournalError where the replica broke the order of tokens."""
        token_id = output.token_id
        if self._journal.record(self.entry.sequence_id, self._epoch, output.index, token_id) is not Recorded.NEW:
            return
        if output.HasField("logprob"):
            top = tuple(zip(output.top_ids, output.top_logprobs, strict=True))
            scores[len(token_ids)] = TokenScore(logprob=output.logprob, top=top)
        token_ids.append(token_id)

    def _push(self, token_ids: list[int], now_s: float) -> str:
        """Returns the text of new tokens. A stop string ends it; tokens after it are taken out of ``token_ids``."""
        if self.clock.first_token_s is None:
            self.clock.first_token_s = now_s
        self.clock.last_token_s = now_s
        delta = self._text.push(*token_ids)
        if delta.matched_stop is not None:
            if num_beyond := len(token_ids) - delta.num_tokens:
                del token_ids[delta.num_tokens :]
                self._journal.trim(self.entry.sequence_id, len(self.entry.emitted_ids) - num_beyond)
            self._end(FinishReason.STOP, delta.matched_stop)
        return delta.text

    def _finish(self, end: worker_pb2.End) -> str:
        """Ends the choice as the replica did; returns the text that was held back."""
        reason = _REASONS.get(end.reason)
        if reason is not None and not self._max_tokens:
            self._end(FinishReason.LENGTH, None)
        elif reason is not None:
            rest = self._text.finish()
            self._end(FinishReason.STOP if rest.matched_stop else reason, rest.matched_stop)
            return rest.text
        elif end.reason == worker_pb2.END_REASON_FAILED:
            self.failure = self._failed(end)
        else:
            self.failure = ReplicaFault("the replica ended the sequence without being asked")
        return ""

    def _failed(self, end: worker_pb2.End) -> HeterodyneError:
        """Returns the error of a sequence that the replica could not go on with: its own, or else the replica's."""
        # The detail is for the operator: it may name files, and clients are not to see those.
        replica, detail = self.entry.replica, brief(end.detail, _DETAIL_CHARACTERS)
        if self._grammar is not None and end.HasField("grammar_problem"):
            extra = said("grammar_not_followed", replica=replica, detail=detail)
            logger.warning("A grammar could not be followed on %s: %s", replica, detail, extra=extra)
            problem = f"after {len(self.entry.emitted_ids)} tokens, {end.grammar_problem}"
            return cannot_be_followed(self._grammar, problem)
        extra = said("sequence_failed", replica=replica, detail=detail)
        logger.error("%s failed while it computed a sequence: %s", replica, detail, extra=extra)
        return worker_lost(replica)

    def _end(self, reason: FinishReason, matched_stop: str | None) -> None:
        self.end = ChoiceEnd(
            finish_reason=reason, matched_stop=matched_stop, completion_tokens=len(self.entry.emitted_ids)
        )


def worker_lost(replica: str) -> ReplicaUnavailable:
    """Makes the error of a request whose replica is gone, whoever noticed that first: a client can only try again."""
    return ReplicaUnavailable(f"{replica}: one of its workers was lost; the request may be sent again")
