"""Opens the sessions of a model rank with its attention workers, and opens them again after a loss."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from placement.errors import HeterodyneError
from placement.planning.residency import Residency
from placement.serving.offload.orders import Geometry, Names
from placement.serving.offload.residents import SessionPlace
from workers.attention_worker.client import Life, RemoteSession, connect
from workers.attention_worker.errors import AttentionRefused
from workers.attention_worker.whereabouts import Whereabouts

CONNECT_S = 30.0
"""How long an attention worker is waited for when a rank is loaded."""
_ATTEMPT_S = 2.0
# A worker that is there and takes no session is not asked again at once.
_PAUSE_S = 0.1
# Sessions of one start of a replica have epochs of their own, so that each fences the one before it.
_ATTEMPT_BITS = 12


@dataclass(frozen=True, slots=True, kw_only=True)
class Opening:
    """Describes the sessions of a rank.

    Attributes:
        epoch: of the replica.
        replica: its name, which stays the same when it is started again.
        residency: says which blocks the regions of ``places`` have.
        geometries: of each session, in the order of ``places``.
        resumes: whether keys and values are kept that the workers have from the start before.
    """

    epoch: int
    secret: bytes
    replica: str
    rank: int
    residency: Residency
    places: tuple[SessionPlace, ...]
    geometries: tuple[Geometry, ...]
    resumes: bool


class Sessions:
    """Holds the sessions of a rank that are open."""

    def __init__(self, opening: Opening, whereabouts: Whereabouts, go_on: Callable[[], None] = lambda: None) -> None:
        """``go_on`` is called again and again while the first sessions are waited for; it raises to end the wait."""
        self.whereabouts = whereabouts
        self._opening = opening
        self._num_attempts = 0
        self.all: tuple[RemoteSession, ...] = ()
        self._open(resumes=opening.resumes, timeout_s=CONNECT_S, alive=go_on)

    def reopen(self, timeout_s: float) -> None:
        """Opens all sessions anew, wherever the workers are by then; nothing that they hold is kept.

        Raises:
            AttentionLost: a worker was not found in time.
        """
        self.close()
        self._open(resumes=False, timeout_s=timeout_s, alive=lambda: None)

    def held(self) -> dict[int, Names]:
        """Returns the names of blocks that each worker has kept, as far as all that was told before is there.

        Every session is told all names: only those count that are of blocks of its own region.
        """
        found: dict[int, dict[int, bytes]] = {}
        for place, session in zip(self._opening.places, self.all, strict=True):
            welcome = session.welcome
            own = self._opening.residency.regions[place.region].blocks
            kept = {
                block: name
                for block, (name, number) in welcome.names.items()
                if own.start <= block < own.stop and number <= welcome.last_complete + 1
            }
            found.setdefault(place.holder.worker, {}).update(kept if welcome.resumed else {})
        return dict(found)

    def close(self) -> None:
        """Closes all sessions, whose use raises AttentionLost then. The workers keep what they hold for a time."""
        for session in self.all:
            session.close()

    def _open(self, *, resumes: bool, timeout_s: float, alive: Callable[[], None]) -> None:
        deadline_s = time.monotonic() + timeout_s
        opened: list[RemoteSession] = []
        try:
            for index in range(len(self._opening.places)):
                opened.append(self._connect(index, resumes, deadline_s, alive))
        except BaseException:
            for session in opened:
                session.close()
            raise
        self.all = tuple(opened)  # at once: another thread may be about to use them

    def _connect(self, index: int, resumes: bool, deadline_s: float, alive: Callable[[], None]) -> RemoteSession:
        """Connects with a worker, which may move while it is waited for."""
        opening = self._opening
        place = opening.places[index]
        while True:
            at = self.whereabouts.of(place.holder.worker)
            self._num_attempts += 1
            try:
                return connect(
                    (at.host, at.port),
                    name=at.name or f"attention worker {place.holder.worker}",
                    worker=place.holder.worker,
                    epoch=(opening.epoch << _ATTEMPT_BITS) + self._num_attempts,
                    secret=opening.secret,
                    replica=f"{opening.replica} region {place.region}",
                    rank=opening.rank,
                    geometry=opening.geometries[index],
                    resumes=resumes,
                    deadline_s=min(deadline_s, time.monotonic() + _ATTEMPT_S),
                    life=Life(alive=alive),
                )
            except AttentionRefused:
                raise
            except HeterodyneError:
                if time.monotonic() >= deadline_s:
                    raise
                alive()
                time.sleep(_PAUSE_S)


def geometries(
    places: Sequence[SessionPlace],
    *,
    num_blocks: Sequence[int],
    block_size: int,
    queries_per_kv_head: int,
    head_dim: int,
    itemsize: int,
    layer_windows: Sequence[int | None],
    windows: Sequence[int | None],
    scale: float,
    q_first: bool,
) -> tuple[Geometry, ...]:
    """Returns the sizes of each session.

    Args:
        num_blocks: of each session's region.
        layer_windows: the window of each layer of the rank; ``windows`` has each of them once.
    """
    return tuple(
        Geometry(
            num_layers=len(layer_windows),
            num_heads=len(place.kv_heads) * queries_per_kv_head,
            num_kv_heads=len(place.kv_heads),
            head_dim=head_dim,
            itemsize=itemsize,
            num_blocks=count,
            width=place.holder.slots_per_block(block_size),
            windows=tuple(windows),
            window_of=tuple(windows.index(window) for window in layer_windows),
            scale=scale,
            q_first=q_first,
        )
        for place, count in zip(places, num_blocks, strict=True)
    )
