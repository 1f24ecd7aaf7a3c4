"""Keeps the sequences of an engine, and finds them by the core's number or by their sink's id."""

import logging
from collections.abc import Sequence as Seq

from placement.serving.admission import repeated
from placement.serving.events import Ended
from protos.codec.log_record import said
from workers.engine.answers import end_outputs
from workers.engine.sequence import EngineSequence
from workers.engine.types import Sink, StepStats

logger = logging.getLogger(__name__)


class EngineSequences:
    """Holds all sequences that have not ended.

    Attributes:
        by_core_id: the sequences by the core's number.
    """

    def __init__(self) -> None:
        self.by_core_id: dict[int, EngineSequence] = {}
        self._core_ids: dict[tuple[Sink, int], int] = {}
        self._num_added = 0

    def next_id(self, sink: Sink, sequence_id: int) -> int:
        """Returns the core's number for a new sequence.

        Raises:
            InvalidRequest: its sink uses the id for another sequence already.
        """
        if (sink, sequence_id) in self._core_ids:
            raise repeated(sequence_id)
        self._num_added += 1
        return self._num_added

    def add(self, core_id: int, sequence: EngineSequence) -> None:
        """Keeps a sequence until it has ended."""
        self.by_core_id[core_id] = sequence
        self._core_ids[sequence.sink, sequence.sequence_id] = core_id

    def find(self, sink: Sink, sequence_id: int) -> int | None:
        """Returns the core's number of a sequence, or None once it has ended."""
        return self._core_ids.get((sink, sequence_id))

    def of(self, sink: Sink) -> list[int]:
        """Returns the core's numbers of a sink's sequences."""
        return [core_id for core_id, sequence in self.by_core_id.items() if sequence.sink is sink]

    def forget(self, core_id: int) -> None:
        """Drops a sequence that has ended."""
        sequence = self.by_core_id.pop(core_id)
        del self._core_ids[sequence.sink, sequence.sequence_id]

    def end(self, ended: Seq[Ended], step: int) -> None:
        """Tells each sink, in one call, which of its sequences end between two steps, and drops them."""
        outputs = end_outputs(ended, self.by_core_id)
        for command in ended:
            self.forget(command.sequence_id)
        for sink, sink_outputs in outputs.items():
            try:
                sink.step(StepStats(step=step), sink_outputs)
            except Exception:  # the other sinks are to hear of theirs
                words = "A gateway could not be told of sequences that ended."
                logger.exception(words, extra=said("sink_failed"))
