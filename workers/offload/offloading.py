"""Has attention workers hold the keys and values of a model rank: opens the sessions, and lays steps out for them."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from kernels.protocol import Kernels
from placement.model.part import Part, Span
from placement.model.specs import ModelSpec
from placement.planning.residency import Residency
from placement.serving.offload.adoption import emptiest
from placement.serving.offload.orders import Names
from placement.serving.offload.residents import session_places
from workers.attention_worker.client import RemoteSession
from workers.attention_worker.whereabouts import Whereabouts
from workers.model.decoder_weights import attention_scale
from workers.model.kv_cache import KVCache
from workers.offload.layout import OffloadLayout, OffloadShape
from workers.offload.sessions import Opening, Sessions, geometries
from workers.offload.storing import Storing
from workers.step.types import RECOVER_S


@dataclass(frozen=True, slots=True, kw_only=True)
class OffloadSettings:
    """Describes a rank whose keys and values attention workers hold, and how they are reached.

    Attributes:
        epoch: of the replica, whose name is ``replica``.
        itemsize: bytes of a number of keys and values.
        staggered: whether steps are computed in two micro-batches; only where all ranks of the stage do so.
        resumes: whether keys and values are kept that the workers have from the start before.
    """

    model: ModelSpec
    part: Part
    residency: Residency
    block_size: int
    itemsize: int
    epoch: int
    secret: bytes
    replica: str
    rank: int
    q_first: bool
    staggered: bool
    resumes: bool


class Offloading:
    """Implements :class:`workers.step.layout.Offload`."""

    def __init__(
        self, settings: OffloadSettings, whereabouts: Whereabouts, go_on: Callable[[], None] = lambda: None
    ) -> None:
        """Opens the sessions, for which ``go_on`` is called again and again while they are waited for.

        Raises:
            AttentionLost: an attention worker was not found in time, or refuses this rank.
            NotEnoughMemory: it has not the memory.
        """
        self._settings = settings
        model, part = settings.model, settings.part
        layer_windows = [it.attention.window for it in model.layers[part.layers.start : part.layers.stop]]
        self._windows = tuple(dict.fromkeys(layer_windows))
        self._places = session_places(settings.residency, part.kv_heads)
        shapes = geometries(
            self._places,
            num_blocks=[len(settings.residency.regions[place.region].blocks) for place in self._places],
            block_size=settings.block_size,
            queries_per_kv_head=model.queries_per_kv_head,
            head_dim=model.head_dim,
            itemsize=settings.itemsize,
            layer_windows=layer_windows,
            windows=self._windows,
            scale=attention_scale(model),
            q_first=settings.q_first,
        )
        opening = Opening(
            epoch=settings.epoch,
            secret=settings.secret,
            replica=settings.replica,
            rank=settings.rank,
            residency=settings.residency,
            places=self._places,
            geometries=shapes,
            resumes=settings.resumes,
        )
        self._sessions = Sessions(opening, whereabouts, go_on)
        self._layout: OffloadLayout | None = None
        self._given_up = Span(0, 0)

    @property
    def sessions(self) -> tuple[RemoteSession, ...]:
        """Returns the sessions that are open."""
        return self._sessions.all

    @property
    def whereabouts(self) -> Whereabouts:
        """Returns where the attention workers listen."""
        return self._sessions.whereabouts

    @property
    def residency(self) -> Residency:
        """Returns where the keys and values are."""
        return self._settings.residency

    def held(self) -> dict[int, Names]:
        """Returns the names of the blocks that each attention worker has kept from the start before."""
        given_up = range(self._given_up.start, self._given_up.stop)
        return {
            worker: {block: name for block, name in names.items() if block not in given_up}
            for worker, names in self._sessions.held().items()
        }

    def make_room(self, num_blocks: int) -> Span:
        """Returns some blocks to write to before the first request, and gives up what was kept in them.

        Whoever writes to them tells the attention workers first, with the step.
        """
        kept = {block for names in self._sessions.held().values() for block in names}
        self._given_up = emptiest(kept, self.residency.num_blocks, num_blocks)
        return self._given_up

    def layout(self, *, kernels: Kernels, device: torch.device) -> OffloadLayout:
        """Makes what lays out this rank's steps."""
        settings = self._settings
        shape = OffloadShape(
            residency=settings.residency,
            places=self._places,
            block_size=settings.block_size,
            queries_per_kv_head=settings.model.queries_per_kv_head,
            first_staged=settings.residency.num_local_blocks * settings.block_size,
            staggered=settings.staggered,
        )
        self._layout = OffloadLayout(
            shape, kernels=kernels, windows=self._windows, device=device, sessions=self._sessions.all
        )
        return self._layout

    def storing(self, cache: KVCache) -> Storing:
        """Makes what takes keys and values from other replicas to where they belong; ``cache`` is this rank's."""
        settings = self._settings
        return Storing(
            sessions=lambda: self._sessions.all,
            places=self._places,
            residency=settings.residency,
            block_size=settings.block_size,
            cache=cache,
        )

    def recover(self) -> None:
        """Opens all sessions anew, wherever the workers are by then. Raises AttentionLost."""
        assert self._layout is not None, "no step was laid out"
        self._sessions.reopen(RECOVER_S)
        self._layout.use(self._sessions.all)

    def close(self) -> None:
        """Closes the sessions. The workers keep what they hold for a time."""
        self._sessions.close()
