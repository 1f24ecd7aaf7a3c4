"""Records the events of a core and its commands, and plays the events again.

Tests print it; the simulator, which drives the same core, needs it to show what it found.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

from placement.serving.events import Command, Event
from placement.serving.replica import ReplicaCore
from placement.serving.settings import CoreSettings


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One event and the commands that followed from it."""

    now_s: float
    event: Event
    commands: tuple[Command, ...]


@dataclass(slots=True)
class EventLog:
    """Lists all that happened to a core since it was made.

    A failing test prints its text; :meth:`replay` gives the same commands again. The text of refusals and the
    block tables are not compared. An event that raised is the last one, without commands, and raises again.
    """

    settings: CoreSettings
    entries: list[Entry] = field(default_factory=list)

    def replay(self) -> Iterator[tuple[Command, ...]]:
        """Yields the commands that a new core gives for each of the same events."""
        core = ReplicaCore(self.settings)
        for entry in self.entries:
            yield tuple(core.handle(entry.event, entry.now_s))

    def __str__(self) -> str:
        lines = [repr(self.settings)]
        for entry in self.entries:
            lines.append(f"{entry.now_s:.6f} {entry.event!r}")
            lines += [f"    {command!r}" for command in entry.commands]
        return "\n".join(lines)


class RecordedCore(ReplicaCore):
    """A core that keeps a log of its events and commands."""

    def __init__(self, settings: CoreSettings) -> None:
        super().__init__(settings)
        self.log = EventLog(settings)

    def handle(self, event: Event, now_s: float) -> list[Command]:
        """Does what :meth:`ReplicaCore.handle` does, and logs it. An event that raises is logged without commands."""
        try:
            commands = super().handle(event, now_s)
        except BaseException:
            self.log.entries.append(Entry(now_s=now_s, event=event, commands=()))
            raise
        self.log.entries.append(Entry(now_s=now_s, event=event, commands=tuple(commands)))
        return commands
