"""The sequences of an engine, by the core's number and by their sink's."""

import logging
from collections.abc import Sequence as Seq

from placement.serving.admission import repeated
from placement.serving.events import Ended
from workers.engine.answers import ends
from workers.engine.types import Sink, StepStats
from workers.engine.work import Work

logger = logging.getLogger(__name__)


class Works:
    """All sequences that have not ended."""

    def __init__(self) -> None:
        self.by_core_id: dict[int, Work] = {}
        self._core_ids: dict[tuple[Sink, int], int] = {}
        self._num_added = 0

    def next_id(self, sink: Sink, sequence_id: int) -> int:
        """The core's number of a sequence that comes. Raises InvalidRequest where its sink uses its id already."""
        if (sink, sequence_id) in self._core_ids:
            raise repeated(sequence_id)
        self._num_added += 1
        return self._num_added

    def add(self, core_id: int, work: Work) -> None:
        """Keeps a sequence until it has ended."""
        self.by_core_id[core_id] = work
        self._core_ids[work.sink, work.sequence_id] = core_id

    def find(self, sink: Sink, sequence_id: int) -> int | None:
        """The core's number of a sequence; None once it has ended."""
        return self._core_ids.get((sink, sequence_id))

    def of(self, sink: Sink) -> list[int]:
        """The core's numbers of a sink's sequences."""
        return [core_id for core_id, work in self.by_core_id.items() if work.sink is sink]

    def forget(self, core_id: int) -> None:
        """Drops a sequence that has ended."""
        work = self.by_core_id.pop(core_id)
        del self._core_ids[work.sink, work.sequence_id]

    def end(self, ended: Seq[Ended], step: int) -> None:
        """Tells every sink once of sequences that end between two steps, and drops them."""
        told = ends(ended, self.by_core_id)
        for command in ended:
            self.forget(command.sequence_id)
        for sink, items in told.items():
            try:
                sink.step(StepStats(step=step), items)
            except Exception:  # the other sinks are to hear of theirs
                logger.exception("sink_failed")
